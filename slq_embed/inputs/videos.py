"""Videos: frames or a file, and which of the frames are read. The host decodes: no file format is known here."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.video_utils import VideoMetadata, load_video

from slq_embed.inputs.images import read_image, shortened

UNKNOWN_FPS = 24.0
"""Frames a second of frames that come without a rate; Qwen3-VL's processor assumes the same."""

_DECODERS = {"torchcodec": "torchcodec", "av": "pyav"}
"""Packages that decode, best first, and how transformers names them. Plain Sentence Transformers uses the first only."""

_NO_FFMPEG = "Could not load libtorchcodec"
_COUNT = "Install torchcodec, which counts them (pip install torchcodec, and FFmpeg), or pass frames."

Sampled = tuple[Any, dict[str, Any]]
"""Frames, ``(frames, H, W, 3)`` or ``(frames, 3, H, W)`` in uint8, and their metadata in the form of transformers."""


@dataclass(frozen=True, eq=False)
class Video:
    """One video. Frames are brought into one array at the first use; a file is decoded where pixels are needed.

    Args:
        source: A path (str or ``pathlib.Path``), a list of frames (PIL images, paths, or arrays ``(H, W, 3)``), or an
            array ``(frames, H, W, 3)`` or ``(frames, 3, H, W)`` in uint8.
        metadata: What is known of frames, in the form of transformers: ``fps``, ``total_num_frames``,
            ``frames_indices``, ``duration``.
        fps: How many frames of a second are read; by default what the processor does.
        max_frames: Most frames that are read; they are spread evenly over those that ``fps`` leaves.
    """

    source: Any
    metadata: Mapping[str, Any] | None = None
    fps: float | None = None
    max_frames: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file, which says itself how many frames a second it has."""
        return isinstance(self.source, str | Path)

    @cached_property
    def frames(self) -> NDArray[np.uint8]:
        """All frames of a video that is no file; see :data:`Sampled`.

        Raises:
            ValueError: If they are no frames, or differ in size.
        """
        source = self.source
        if isinstance(source, list | tuple):
            source = _stack(source)
        if isinstance(source, torch.Tensor):
            source = source.cpu().numpy()
        if not isinstance(source, np.ndarray):
            raise ValueError(
                f"A video is a {type(source).__name__}, but a path, a list of frames, or an array (frames, height, "
                "width, 3) is needed."
            )
        if source.ndim != 4 or 3 not in (source.shape[1], source.shape[3]) or source.dtype != np.uint8:
            raise ValueError(
                f"A video is an array of shape {source.shape} in {source.dtype}, but (frames, height, width, 3) in uint8 is "
                "needed."
            )
        if not source.size:
            raise ValueError("A video has no frames. Pass at least one.")
        return source

    def require(self) -> None:
        """Look whether it is there, without decoding a file.

        Raises:
            ValueError: If there is no such file, or no frames.
        """
        if not self.is_file:
            _ = self.frames
        elif not os.path.isfile(self.source):  # noqa: PTH113 - Path.is_file raises an error for a name that is too long
            raise ValueError(
                f"There is no video file {shortened(Path(self.source))!r}. Check the path (URLs are not fetched)."
            )

    @property
    def pixels(self) -> int:
        """Width times height times frames; of a file, which is not opened, those of 16 frames of 480 x 360."""
        return 16 * 480 * 360 if self.is_file else self.frames.size // 3

    @property
    def nbytes(self) -> int:
        """Bytes of its frames in memory; those of a file are not there yet."""
        return 0 if self.is_file else self.frames.nbytes

    def digest(self) -> bytes:
        """What tells videos apart: a digest of the file or of the frames, and of what is read of them.

        Raises:
            ValueError: As for :meth:`require`.
        """
        self.require()
        digest = hashlib.sha256(repr(("video", self.fps, self.max_frames)).encode())
        if self.is_file:
            with Path(self.source).open("rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
        else:
            known = sorted((key, np.asarray(value).tolist()) for key, value in (self.metadata or {}).items())
            digest.update(repr((self.frames.shape, known)).encode())
            digest.update(np.ascontiguousarray(self.frames).data)
        return digest.digest()

    def sample(self, processor: Any, options: Mapping[str, Any]) -> Sampled:
        """Choose frames as a video processor does, and decode them.

        Args:
            processor: The video processor.
            options: What a call changes of its settings.

        Raises:
            ValueError: If the frames cannot be chosen, or a file cannot be decoded.
            ImportError: If nothing that decodes files is installed.
        """
        self.require()
        if self.is_file:
            return self._decode(processor, options)
        known = {"total_num_frames": len(self.frames), **(self.metadata or {})}
        metadata = VideoMetadata(**known)
        # Frames of a longer video were chosen already.
        whole = metadata.frames_indices is None and metadata.total_num_frames == len(self.frames)
        if not whole and metadata.frames_indices is None:
            metadata.frames_indices = list(range(len(self.frames)))
        if whole:
            if metadata.fps is None and self.fps is not None:
                metadata.fps = UNKNOWN_FPS
            chosen = self._choose(metadata, processor, options)
            metadata.frames_indices = chosen.tolist()
        else:
            chosen = _spread(np.arange(len(self.frames)), self.max_frames)
            metadata.frames_indices = np.asarray(metadata.frames_indices)[chosen].tolist()
        return self.frames[chosen], dict(metadata)

    def _decode(self, processor: Any, options: Mapping[str, Any]) -> Sampled:
        found = ""
        for package, backend in _DECODERS.items():
            if find_spec(package) is not None:
                try:
                    return self._decode_by(backend, processor, options)
                except RuntimeError:  # of FFmpeg: what else a decoder raises is a ValueError by now
                    found = " torchcodec is installed, but FFmpeg is not, or they do not fit."
        raise ImportError(
            f"A video file needs a decoder, and there is none.{found} Install torchcodec, which plain Sentence Transformers "
            "needs as well (pip install torchcodec, and FFmpeg), or PyAV (pip install av); or pass frames."
        )

    def _decode_by(self, backend: str, processor: Any, options: Mapping[str, Any]) -> Sampled:
        def choose(metadata: VideoMetadata, **kwargs: Any) -> NDArray[np.int64]:
            if not metadata.total_num_frames:
                raise ValueError(f"it does not say how many frames it has, as WebM and MKV files do not. {_COUNT}")
            return self._choose(metadata, processor, options)

        try:
            frames, metadata = load_video(str(self.source), backend=backend, sample_indices_fn=choose)
            # PyAV gives the chosen frames that it finds, and no error where they end early.
            if len(frames) != len(metadata.frames_indices):
                raise ValueError(f"it has fewer frames than it says: it was cut off, or trimmed. {_COUNT}")
        except ImportError:
            raise
        except IndexError as error:  # of PyAV's list of streams
            raise ValueError(
                f"The video {str(self.source)!r} cannot be read: it has no pictures. Is it an audio file?"
            ) from error
        except Exception as error:  # a damaged file makes a decoder raise any error
            if str(error).startswith(_NO_FFMPEG):  # nothing is wrong with the file
                raise
            raise ValueError(f"The video {str(self.source)!r} cannot be read: {error}") from error
        found = dict(metadata)
        found["frames_indices"] = np.asarray(found["frames_indices"]).tolist()
        return np.asarray(frames), found

    def _choose(self, metadata: VideoMetadata, processor: Any, options: Mapping[str, Any]) -> NDArray[np.int64]:
        """Indices of the frames that are read, as the video processor itself chooses them where it does."""
        settings = {name: getattr(processor, name, None) for name in processor.valid_kwargs.__annotations__}
        settings |= options
        if self.fps is not None:
            if settings.get("num_frames") is not None and settings.get("fps") is None:
                raise ValueError(
                    f"fps={self.fps:g} does not apply: this model's processor reads {settings['num_frames']} frames of "
                    "every video. Pass max_frames, or frames."
                )
            settings |= {"fps": self.fps, "do_sample_frames": True}
        if self.max_frames is not None and (own := settings.get("max_frames")) is not None:
            settings["max_frames"] = min(own, self.max_frames)
        indices = np.arange(metadata.total_num_frames)
        if settings.get("do_sample_frames"):
            try:
                indices = np.asarray(processor.sample_frames(metadata=metadata, **settings))
            except ZeroDivisionError as error:
                raise ValueError(
                    f"A video of {metadata.total_num_frames} frames is too short for fps={settings.get('fps')}: none would be read. "
                    "Pass a larger fps, or its frames as images."
                ) from error
            except Exception as error:
                raise ValueError(
                    f"No frames can be chosen from a video of {metadata.total_num_frames} frames: {error}"
                ) from error
            indices = indices[indices < metadata.total_num_frames]  # Qwen2-VL's rounding may add one past the end
        return _spread(indices, self.max_frames)


def is_frames(value: Any) -> bool:
    """Whether a list holds the frames of one video, and not several videos."""
    return isinstance(value, list | tuple) and not any(
        isinstance(part, list | tuple)
        or (isinstance(part, Mapping) and "array" in part)
        or getattr(part, "ndim", 3) == 4
        or (isinstance(part, str | Path) and Path(part).suffix.lower() in _VIDEO_SUFFIXES)
        for part in value
    )


_VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm"}


def _stack(frames: Sequence[Any]) -> NDArray[np.uint8]:
    arrays = []
    for index, frame in enumerate(frames):
        if isinstance(frame, torch.Tensor):
            frame = frame.cpu().numpy()
        try:
            arrays.append(frame if isinstance(frame, np.ndarray) else np.asarray(read_image(frame)))
        except ValueError as error:
            raise ValueError(f"Frame {index} of a video of {len(frames)}: {error}") from error
    if not arrays:
        raise ValueError("A video has no frames. Pass at least one.")
    if len({array.shape for array in arrays}) > 1:
        sizes = sorted({"x".join(map(str, array.shape)) for array in arrays})
        raise ValueError(f"The frames of a video have different sizes ({', '.join(sizes)}). Make them of one size.")
    return np.stack(arrays)


def _spread(indices: NDArray[np.int64], most: int | None) -> NDArray[np.int64]:
    if most is None or len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(int)]


def read_limit(value: Any, name: str, whole: bool) -> Any:
    """Check ``fps`` or ``max_frames``.

    Args:
        value: What came.
        name: Its name.
        whole: Whether it counts something.

    Raises:
        ValueError: If it is no positive number.
    """
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, but a positive {'int' if whole else 'number'} is needed.")
    return int(value) if whole else float(value)


def read_videos(value: Any, fps: float | None = None, max_frames: int | None = None) -> tuple[Video, ...]:
    """Read what stands under ``"video"``: one video, or several in a list.

    Args:
        value: A path, frames, the dict with ``"array"`` and ``"video_metadata"`` of Sentence Transformers, or a list of
            such.
        fps: As for :class:`Video`.
        max_frames: As for :class:`Video`.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(value, list | tuple) and not value:
        raise ValueError("A video has no frames. Pass at least one.")
    if isinstance(value, list | tuple) and not is_frames(value):
        return tuple(video for part in value for video in read_videos(part, fps, max_frames))
    if isinstance(value, Mapping):
        if set(value) != {"array", "video_metadata"}:
            raise ValueError(
                f"A video dict has the keys {list(value)}, but 'array' (frames) and 'video_metadata' are needed."
            )
        metadata = value["video_metadata"]
        if metadata is not None and not isinstance(metadata, Mapping):
            raise ValueError(f"The 'video_metadata' is a {type(metadata).__name__}, but a dict is needed.")
        if unknown := set(metadata or {}) - set(VideoMetadata(0)):
            raise ValueError(
                f"The 'video_metadata' has the unknown keys {sorted(unknown)}: use {list(VideoMetadata(0))}."
            )
        return (Video(value["array"], metadata, fps, max_frames),)
    if not isinstance(value, str | Path | list | tuple | np.ndarray | torch.Tensor):
        raise ValueError(
            f"A video is a {type(value).__name__}, but a path, a list of frames, or an array (frames, height, width, 3) "
            "is needed."
        )
    return (Video(value, None, fps, max_frames),)
