"""Which frames of a video are read, and what is refused."""

from __future__ import annotations

import wave
from importlib.util import find_spec

import numpy as np
import pytest
import transformers
from PIL import Image

from slq_embed.inputs import videos
from slq_embed.inputs.rows import read_row
from slq_embed.inputs.videos import Video

FRAMES = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)


def chosen(processor, options=None, **value) -> list[int]:
    (video,) = read_row({"video": FRAMES, **value}).videos
    frames, metadata = video.sample(processor, options or {})
    assert frames[:, 0, 0, 0].tolist() == metadata["frames_indices"], "the metadata names the frames that are there"
    return metadata["frames_indices"]


@pytest.fixture
def qwen3():
    return transformers.Qwen3VLVideoProcessor()  # two frames a second, where the rate is known or taken for 24


@pytest.fixture
def qwen2():
    return transformers.Qwen2VLVideoProcessor()  # all frames


@pytest.fixture
def internvl():
    return transformers.InternVLVideoProcessor()  # all frames


def timed(fps: float) -> dict:
    return {"video": {"array": FRAMES, "video_metadata": {"fps": fps}}}


def test_the_processor_chooses_the_frames(qwen3, qwen2, internvl):
    assert chosen(qwen3) == [0, 13, 26, 39]
    assert chosen(qwen3, **timed(10.0)) == [0, 6, 11, 17, 22, 28, 33, 39]
    assert chosen(qwen2) == chosen(internvl) == list(range(40))
    internvl.do_sample_frames, internvl.num_frames = True, 4
    assert chosen(internvl) == [5, 15, 25, 35]
    assert len(chosen(qwen2, {"do_sample_frames": True, "num_frames": 6})) == 6


def test_fps_counts_frames_of_a_second(qwen3, qwen2, internvl):
    assert len(chosen(qwen3, fps=5, **timed(10.0))) == 20
    assert len(chosen(qwen2, fps=5, **timed(10.0))) == 20
    assert len(chosen(internvl, fps=5, **timed(10.0))) == 20
    assert len(chosen(qwen2, fps=12)) == 20, "24 frames a second, where nothing is known"


def test_max_frames_bounds_them(qwen3, qwen2, internvl):
    assert chosen(qwen3, max_frames=3) == [0, 26, 39]
    assert chosen(qwen2, max_frames=4) == [0, 13, 26, 39]
    assert chosen(internvl, max_frames=100) == list(range(40))
    assert len(chosen(qwen2, fps=5, max_frames=6, **timed(10.0))) == 6
    expected = qwen2.sample_frames(transformers.video_utils.VideoMetadata(40, fps=10.0), fps=5, max_frames=6)
    assert chosen(qwen2, fps=5, max_frames=6, **timed(10.0)) == expected.tolist(), "as the host spells it"


def test_frames_that_were_chosen_already_are_not_chosen_again(qwen3):
    metadata = {"fps": 10.0, "total_num_frames": 400, "frames_indices": list(range(0, 400, 10))}
    video = Video(FRAMES, metadata)
    frames, found = video.sample(qwen3, {})
    assert len(frames) == 40
    assert found["frames_indices"] == metadata["frames_indices"]
    _, found = Video(FRAMES, metadata, max_frames=2).sample(qwen3, {})
    assert found["frames_indices"] == [0, 390]
    assert metadata["frames_indices"] == list(range(0, 400, 10)), "what the caller gave stays"


def test_a_processor_of_a_fixed_number_of_frames_refuses_a_rate(internvl):
    internvl.num_frames = 8
    with pytest.raises(ValueError, match=r"fps=2 does not apply.*reads 8 frames"):
        chosen(internvl, fps=2)


def test_a_processor_that_cannot_choose_is_quoted(internvl):
    internvl.do_sample_frames, internvl.num_frames = True, 64
    with pytest.raises(ValueError, match=r"No frames can be chosen from a video of 40 frames: .*64"):
        chosen(internvl)


def test_no_frame_past_the_end_is_chosen(qwen2):
    """Qwen2-VL's processor rounds: it asks for frame 367 of 367, the 31st of 30."""
    (video,) = read_row({"video": np.zeros((367, 2, 2, 3), np.uint8), "fps": 2}).videos
    frames, metadata = video.sample(qwen2, {})
    assert len(frames) == len(metadata["frames_indices"]) == 30
    assert max(metadata["frames_indices"]) == 354


def test_a_video_that_is_too_short_for_a_rate_is_refused(internvl, qwen3):
    assert len(chosen(qwen3, fps=0.1, **timed(10.0))) == 4, "this processor reads four at least"
    with pytest.raises(ValueError, match=r"A video of 40 frames is too short for fps=0.1: none would be read"):
        chosen(internvl, fps=0.1, **timed(10.0))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (FRAMES.astype(np.float32), r"in float32, but .* uint8"),
        (FRAMES[0], r"shape \(16, 16, 3\)"),
        (FRAMES[..., :2], r"shape \(40, 16, 16, 2\)"),
        (FRAMES[:0], "no frames"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], r"different sizes \(4x4x3, 4x5x3\)"),
        ([Image.new("RGB", (4, 4)), 5], r"Frame 1 of a video of 2: An image is a int"),
        ("gone.mp4", "no video file 'gone.mp4'"),
        ({"array": 5, "video_metadata": None}, "A video is a int, but a path, a list of frames, or an array"),
        ({"array": [], "video_metadata": None}, "A video has no frames"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    with pytest.raises(ValueError, match=message):
        read_row({"video": video}).read_files()


def test_digests_tell_videos_apart(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode())
    timed = {"fps": 2.0, "frames_indices": np.arange(40)}
    several = [
        Video(FRAMES),
        Video(FRAMES[::-1]),
        Video(FRAMES[:20]),
        Video(FRAMES.transpose(0, 3, 1, 2)),
        Video(FRAMES, fps=1),
        Video(FRAMES, max_frames=1),
        Video(FRAMES, timed),
        Video(FRAMES, {**timed, "fps": 3.0}),
        Video(tmp_path / "a.mp4"),
        Video(tmp_path / "b.mp4"),
        Video(tmp_path / "a.mp4", fps=1),
    ]
    assert len({video.digest() for video in several}) == len(several)
    assert Video(list(FRAMES)).digest() == Video(FRAMES).digest()


def test_without_a_decoder_the_error_says_what_to_install(tmp_path, qwen3, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"video")
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"there is none. Install torchcodec.*pip install av"):
        Video(tmp_path / "a.mp4").sample(qwen3, {})


def test_torchcodec_without_ffmpeg_is_passed_over(tmp_path, qwen3, monkeypatch):
    """pip installs it without FFmpeg. Else each video would count as damaged, and be skipped."""
    installed = ["torchcodec", "av"]

    def load_video(path, backend, sample_indices_fn):
        if backend == "torchcodec":
            raise RuntimeError("Could not load libtorchcodec. Likely causes:\n 1. FFmpeg is not properly installed.")
        metadata = transformers.video_utils.VideoMetadata(40, fps=10.0)
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return FRAMES[metadata.frames_indices], metadata

    (tmp_path / "a.mp4").write_bytes(b"video")
    monkeypatch.setattr(videos, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(videos, "load_video", load_video)
    assert len(Video(tmp_path / "a.mp4").sample(qwen3, {})[0]) == 8
    installed.remove("av")
    with pytest.raises(ImportError, match=r"there is none. torchcodec is installed, but FFmpeg is not.*pip install av"):
        Video(tmp_path / "a.mp4").sample(qwen3, {})


@pytest.mark.parametrize(
    ("stated", "there", "message"),
    [
        (40, 40, None),
        (0, 40, "it does not say how many frames it has"),
        (40, 20, "it has fewer frames than it says: it was cut off"),
    ],
)
def test_a_file_with_another_number_of_frames_than_it_says_is_refused(
    tmp_path, qwen3, monkeypatch, stated, there, message
):
    """PyAV takes the number as the file states it, and leaves out what is not there."""

    def load_video(path, backend, sample_indices_fn):
        metadata = transformers.video_utils.VideoMetadata(stated, fps=10.0)
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return FRAMES[[n for n in metadata.frames_indices if n < there]], metadata

    (tmp_path / "a.mp4").write_bytes(b"video")
    monkeypatch.setattr(videos, "find_spec", lambda name: name == "av" or None)
    monkeypatch.setattr(videos, "load_video", load_video)
    if message is None:
        assert len(Video(tmp_path / "a.mp4").sample(qwen3, {})[0]) == 8
    else:
        with pytest.raises(ValueError, match=rf"a.mp4' cannot be read: {message}.*Install torchcodec"):
            Video(tmp_path / "a.mp4").sample(qwen3, {})


@pytest.mark.skipif(find_spec("av") is None, reason="needs av (PyAV)")
def test_a_file_is_decoded_and_its_own_rate_is_known(tmp_path, qwen3, monkeypatch):
    import av

    monkeypatch.setattr(videos, "_DECODERS", {"av": "pyav"})
    for name in ("a.mp4", "a.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
            for value in range(40):
                frame = av.VideoFrame.from_ndarray(np.full((48, 48, 3), 6 * value, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    for options in ({}, {"fps": 5}, {"max_frames": 3}):
        frames, metadata = Video(tmp_path / "a.mp4", **options).sample(qwen3, {})
        assert metadata["frames_indices"] == chosen(qwen3, **options, **timed(10.0))
        assert frames[:, 0, 0, 0].tolist() == pytest.approx([6 * n for n in metadata["frames_indices"]], abs=8)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for name, reason in (("bad.mp4", ""), ("a.mkv", "it does not say how many"), ("sound.mp4", "it has no pictures")):
        with pytest.raises(ValueError, match=rf"The video '.*{name}' cannot be read: {reason}"):
            Video(tmp_path / name).sample(qwen3, {})


@pytest.mark.parametrize("name", ["missing.mp4", "x" * 5000])
def test_a_file_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"There is no video file '{name[:10]}"):
        read_row({"video": name}).read_files()
