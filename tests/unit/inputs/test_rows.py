from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slq_embed.inputs.rows import Skipped, _warn_of_a_path, read_row, report

RED = Image.new("RGB", (8, 6), "red")
FRAMES = np.zeros((3, 6, 8, 3), np.uint8)


def test_rows_are_texts_images_or_both(tmp_path):
    image = Image.new("RGB", (8, 6), "red")
    path = tmp_path / "a.png"
    image.save(path)
    assert read_row("a.png").media == ()
    assert read_row(str(path)).media == ()
    assert read_row(path).pictures[0].image.size == image.size
    assert read_row({"image": str(path)}).text is None
    both = read_row({"text": "t", "image": image})
    assert (both.text, both.pictures[0].image.size) == ("t", image.size)
    kinds = [part["type"] for part in both.messages("p")[1]["content"]]
    assert kinds == ["image", "text"]
    assert both.messages("p")[0]["role"] == "system"


def test_a_str_that_looks_like_an_image_file_is_named_once(caplog):
    """Plain Sentence Transformers would open it: who comes from there would get the embedding of the name without a word."""
    _warn_of_a_path.cache_clear()
    for value in ("photos/A.PNG", "b.png", {"text": "c.jpg"}, Path("d.jpg"), "what is a .png file?"):
        read_row(value)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "A str that ends in .png was read as a text"
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"is a int\. Pass a str"),
        (None, "is a NoneType"),
        (b"an image file", r'is a bytes\..*\{"image": data\}'),
        (io.BytesIO(b"an image file"), r'is a BytesIO\..*\{"image": file\.read\(\)\}'),
        ({"label": 1}, "keys"),
        ({}, "keys"),
        ({"text": 5}, "'text' of an input is a int"),
        ({"text": None, "image": None}, "None only"),
        ({"image": 5}, "An image is a int"),
        ({"image": Path("gone.png")}, "no image file"),
        ({"images": []}, "'images' of an input is an empty list"),
        ({"image": []}, "'image' of an input is an empty list"),
        ({"images": Path("a.png")}, "'images' of an input are a PosixPath, but a list"),
        ({"images": [5]}, "An image is a int"),
        ({"images": [RED], "image": RED}, "both 'image' and 'images'"),
        ({"text": "a", "fps": 1}, "'fps' or 'max_frames', but no 'video'"),
        ({"image": RED, "max_frames": 1}, "'fps' or 'max_frames', but no 'video'"),
        ({"video": FRAMES, "fps": 0}, r"fps is 0, but a positive number"),
        ({"video": FRAMES, "fps": "2"}, r"fps is '2', but a positive number"),
        ({"video": FRAMES, "max_frames": 2.5}, r"max_frames is 2\.5, but a positive int"),
        ({"video": FRAMES, "max_frames": True}, r"max_frames is True"),
        ({"video": []}, "no frames"),
        ({"video": 5}, "A video is a int"),
        ({"video": {"array": FRAMES}}, "'array' .* and 'video_metadata' are needed"),
        ({"video": {"array": FRAMES, "video_metadata": 5}}, "'video_metadata' is a int"),
        ({"video": {"array": FRAMES, "video_metadata": {"rate": 5}}}, r"unknown keys \['rate'\]"),
        ([], "is a list"),
        ([RED, RED], r"is a list.*\{\"images\": \[first, second\]\}"),
        ([{"role": "user", "content": 5}], "'content' of a message is a int"),
        ([{"role": "user", "content": [{"type": "audio", "audio": 5}]}], "the type 'audio'"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}], "under the key of its type"),
    ],
)
def test_anything_else_gets_a_message_that_says_what_to_do(value, message):
    with pytest.raises(ValueError, match=message):
        _ = read_row(value).pictures[0].image


def kinds_of(value) -> list[str]:
    return [part["type"] for part in read_row(value).messages()[0]["content"]]


def test_several_images_and_videos_come_under_any_of_their_names(tmp_path):
    RED.save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    several = [RED, tmp_path / "a.png", raw, str(tmp_path / "a.png")]
    for name in ("image", "images"):
        row = read_row({name: several, "text": "t"})
        assert [picture.image.size for picture in row.pictures] == [RED.size] * 4
        assert kinds_of({"text": "t", name: several}) == ["image"] * 4 + ["text"]
    assert kinds_of({"video": FRAMES, "text": "t", "image": RED}) == ["image", "video", "text"]
    named = {"array": FRAMES, "video_metadata": {"fps": 2.0}}
    for video in (FRAMES, torch.from_numpy(FRAMES), list(FRAMES), [RED, RED, RED], named, [FRAMES], [named]):
        (read,) = read_row({"video": video, "fps": 1, "max_frames": 2}).videos
        assert (len(read.frames), read.fps, read.max_frames) == (3, 1.0, 2)
    assert read_row(named).videos[0].metadata == {"fps": 2.0}
    assert kinds_of({"video": [FRAMES, list(FRAMES)]}) == ["video", "video"]
    assert kinds_of({"video": [tmp_path / "a.mp4", "b.MP4"]}) == ["video", "video"]
    assert kinds_of({"video": [str(tmp_path / "a.png")] * 2}) == ["video"], "files of images are frames"


def test_a_chat_is_rendered_as_it_came():
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": RED}, {"type": "video", "video": FRAMES}]
    chat = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": content},
        {"role": "user", "content": "b"},
    ]
    row = read_row(chat)
    assert (row.text, len(row.pictures), len(row.videos)) == ("ab", 1, 1)
    assert row.messages() == row.messages("p"), "its own system message takes the place of a prompt"
    assert row.messages()[0] == chat[0]
    assert row.messages()[1]["content"] == [content[0], {"type": "image"}, {"type": "video"}]
    assert read_row(chat[2]).messages() == [chat[2]]
    assert [message["role"] for message in read_row(chat[2]).messages("p")] == ["system", "user"]


@pytest.mark.parametrize(("count", "end"), [(10, "9.png (damaged)"), (3000, "9.png (damaged); ... and 2,990 more")])
def test_a_report_names_ten_and_counts_the_others(count, end):
    line = report([Skipped(f"{number}.png", "damaged") for number in range(count)])
    assert line.startswith(f"{count:,} skipped: 0.png (damaged); 1.png")
    assert line.endswith(end)
    assert line.count(".png") == 10
