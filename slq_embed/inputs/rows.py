"""What people pass in, brought into one form: a text, images or videos, or media with a text."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from slq_embed.inputs.images import IMAGE_SUFFIXES, decode, pixels, read_file, read_image
from slq_embed.inputs.pdf import PdfPage
from slq_embed.inputs.videos import Video, read_limit, read_videos

logger = logging.getLogger(__name__)

_ONE_INPUT = (str, Path, Mapping, Image.Image, PdfPage, torch.Tensor)
_NO_INPUT = (bytes, bytearray, io.BufferedIOBase)  # a file's content: an input only in a dict, and never a list
_MOST_NAMED = 10
_PIXELS_PER_TOKEN, _CHARACTERS_PER_TOKEN = 1024, 4


@dataclass(frozen=True)
class Skipped:
    """An input that was left out.

    Args:
        name: The file, or the index among the inputs.
        reason: What is wrong with it.
        index: Its index among the inputs, where it has one.
    """

    name: str
    reason: str
    index: int | None = None


def report(skipped: Sequence[Skipped]) -> str:
    """One line that names the first ten skipped inputs, with the reasons, and counts the others."""
    if not skipped:
        return "nothing was skipped"
    return f"{len(skipped):,} skipped: {name_some([f'{row.name} ({row.reason})' for row in skipped])}"


def name_some(parts: Sequence[str]) -> str:
    """The first ten parts of a message, and how many more there are: a folder may hold thousands of bad files."""
    more = [f"... and {len(parts) - _MOST_NAMED:,} more"] if len(parts) > _MOST_NAMED else []
    return "; ".join([*parts[:_MOST_NAMED], *more])


def is_one_input(value: Any) -> bool:
    """Whether this is one input and not a batch; a chat and an array of numbers are one input."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "UO"  # texts, objects
    chat = isinstance(value, list) and bool(value) and all(map(_is_message, value))
    return chat or isinstance(value, _ONE_INPUT)


def require_list(inputs: Any, name: str = "inputs") -> None:
    """Check that inputs come as a list, or as anything else that is gone through.

    Args:
        inputs: What came.
        name: Its name.

    Raises:
        ValueError: If it is one input, whose characters or keys would be taken for inputs, a table, or no list of any kind.
    """
    listed = hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")
    listed = listed and getattr(inputs, "ndim", 1) == 1  # going through a DataFrame gives the names of its columns
    if is_one_input(inputs) or isinstance(inputs, _NO_INPUT) or not listed:
        hint = ' The bytes of an image file are {"image": data}.' if isinstance(inputs, _NO_INPUT) else ""
        kind = "chat" if isinstance(inputs, list) else type(inputs).__name__
        raise ValueError(f"{name} is a {kind}, but a list is needed. Pass a list, also of one input: [value].{hint}")


@dataclass(frozen=True)
class Picture:
    """One image. A file is read once, at the first use, and decoded where pixels are needed.

    Args:
        source: The image, as :func:`slq_embed.inputs.read_image` takes it.
    """

    source: Any

    @cached_property
    def content(self) -> bytes | None:
        """The bytes of the image file; ``None`` where there is no file.

        Raises:
            ValueError: If there is no such file.
        """
        return read_file(self.source)

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image, RGB.

        Raises:
            ValueError: If it cannot be decoded.
        """
        return read_image(self.source) if self.content is None else decode(self.content, self.source)

    @property
    def pixels(self) -> int:
        """Width times height. Nothing is decoded."""
        if isinstance(self.source, PdfPage):
            return self.source.pixels
        image = self.source if self.content is None else self.content
        return pixels(image) if isinstance(image, bytes | Image.Image | np.ndarray | torch.Tensor) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the image file, or of the pixels where there is none. Those of a page are not there yet."""
        if self.content is not None:
            return len(self.content)
        return 0 if isinstance(self.source, PdfPage) else 3 * self.pixels

    def digest(self) -> bytes:
        """What tells images apart: a digest of the file, which need not be decoded, or of decoded pixels.

        Raises:
            ValueError: If there is no such file, or the image is of an unknown type.
        """
        if self.content is not None:
            return hashlib.sha256(self.content).digest()
        return hashlib.sha256(repr(self.image.size).encode() + self.image.tobytes()).digest()


@dataclass(frozen=True)
class Row:
    """One input.

    Args:
        text: The text.
        pictures: Its images, in order.
        videos: Its videos, in order.
        chat: The messages that it came as, if it did, without their media.
    """

    text: str | None = None
    pictures: tuple[Picture, ...] = ()
    videos: tuple[Video, ...] = ()
    chat: tuple[dict[str, Any], ...] | None = None

    @property
    def media(self) -> tuple[Picture | Video, ...]:
        """All images, then all videos."""
        return (*self.pictures, *self.videos)

    def read_files(self) -> None:
        """Read the image files, which are held from now on, and look for the video files.

        Raises:
            ValueError: If there is no such file.
        """
        for picture in self.pictures:
            _ = picture.content
        for video in self.videos:
            video.require()

    @property
    def nbytes(self) -> int:
        """Bytes of its media as they came: of image files, or of pixels in memory."""
        return sum(part.nbytes for part in self.media)

    @property
    def size(self) -> float:
        """About how many tokens the input has. Nothing is decoded."""
        area = sum(part.pixels for part in self.media)
        return len(self.text or "") / _CHARACTERS_PER_TOKEN + area / _PIXELS_PER_TOKEN

    def messages(self, prompt: str | None = None) -> list[dict[str, Any]]:
        """The input as a chat without pixels, the prompt as its system message: as Sentence Transformers sends it.

        A system message of the chat's own takes the place of the prompt.
        """
        content: list[dict[str, Any]] = [{"type": "image"} for _ in self.pictures]
        content += [{"type": "video"} for _ in self.videos]
        if self.text is not None:
            content.append({"type": "text", "text": self.text})
        chat = [{"role": "user", "content": content}] if self.chat is None else list(self.chat)
        if prompt and all(message["role"] != "system" for message in chat):
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt}]})
        return chat

    def media_digest(self) -> bytes:
        """What tells media apart, in their order; nothing where there are none.

        Raises:
            ValueError: If one of them cannot be read.
        """
        return b"".join(part.digest() for part in self.media)


def read_row(value: Any) -> Row:
    """Read one input.

    Args:
        value: One of these:

            - a str: always text, never a path or URL,
            - an image: a PIL image, a ``pathlib.Path`` of one, an array or tensor as for :func:`slq_embed.inputs.read_image`,
              or a page of :func:`slq_embed.inputs.read_pdf`,
            - a dict of ``"text"`` (str) and media. ``"image"`` or ``"images"``: an image or a list of images, each a PIL image,
              an array, a path, or bytes of an image file. ``"video"``: a path, a list of frames, an array ``(frames, H, W, 3)`` in
              uint8, ``{"array": frames, "video_metadata": {...}}``, or a list of such. Beside a video, ``"fps"`` (frames of a
              second that are read) and ``"max_frames"`` (most frames that are read),
            - a chat: a list of dicts with ``"role"`` and ``"content"``, or one such dict,
            - the dict with ``"bytes"`` and ``"path"`` that ``datasets`` gives for an undecoded image, or the dict with
              ``"array"`` and ``"video_metadata"`` that Sentence Transformers takes for a video,
            - a :class:`Row`.

    Raises:
        ValueError: If it is none of these. (Not TypeError: Sentence Transformers answers that by trying again
            without the prompt.)
    """
    if isinstance(value, Row):
        return value
    if isinstance(value, str):
        if (ending := value[-5:].lower()).endswith(IMAGE_SUFFIXES):  # a text may be long
            _warn_of_a_path(ending.rpartition(".")[2])
        return Row(text=_unicode(value))
    if isinstance(value, Mapping):
        return _read_dict(value)
    if isinstance(value, list) and value and all(_is_message(part) for part in value):
        return _read_chat(value)
    if isinstance(value, Image.Image | Path | PdfPage | np.ndarray | torch.Tensor):
        return Row(pictures=(Picture(value),))
    raise ValueError(
        f"An input is a {type(value).__name__}. Pass a str (text), a PIL image, an array, a pathlib.Path of an image, or a "
        'dict such as {"image": image, "text": text}, {"images": [first, second]} or {"video": frames}. The bytes of an '
        'image file are {"image": data}; of an open file, {"image": file.read()}. Several inputs are a list: list(values).'
    )


@cache  # once for each ending
def _warn_of_a_path(suffix: str) -> None:
    logger.warning(
        "A str that ends in .%s was read as a text, as every str is. For the image, pass pathlib.Path(name) or "
        '{"image": name}; for the text, {"text": string} says so.',
        suffix,
    )


_KEYS = {"text", "image", "images", "video", "fps", "max_frames"}


def _read_dict(value: Mapping[str, Any]) -> Row:
    if set(value) == {"bytes", "path"}:
        return Row(pictures=(Picture(value),))
    if set(value) == {"array", "video_metadata"}:
        return Row(videos=read_videos(value))
    if _is_message(value):
        return _read_chat([value])
    if not value or not set(value) <= _KEYS:
        raise ValueError(
            f"An input dict has the keys {list(value)}, but some of 'text', 'image', 'images', 'video', 'fps' and "
            "'max_frames' are needed."
        )
    text, video = value.get("text"), value.get("video")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"The 'text' of an input is a {type(text).__name__}, but a str is needed.")
    fps = read_limit(value.get("fps"), "fps", whole=False)
    most = read_limit(value.get("max_frames"), "max_frames", whole=True)
    if video is None and (fps is not None or most is not None):
        raise ValueError(
            "An input has 'fps' or 'max_frames', but no 'video' that they could be of. Add it, or drop them."
        )
    row = Row(text and _unicode(text), _read_pictures(value), () if video is None else read_videos(video, fps, most))
    if row.text is None and not row.media:
        raise ValueError("An input dict holds None only. Give it a text, an image, or both.")
    return row


def _read_pictures(value: Mapping[str, Any]) -> tuple[Picture, ...]:
    one, several = value.get("image"), value.get("images")
    if one is not None and several is not None:
        raise ValueError("An input has both 'image' and 'images'. Put all of its images into one list, under 'images'.")
    if several is not None and not isinstance(several, list | tuple):
        raise ValueError(f"The 'images' of an input are a {type(several).__name__}, but a list of images is needed.")
    name, given = ("image", one) if several is None else ("images", several)
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError(
                f"The {name!r} of an input is an empty list. Give at least one image, or leave the key out."
            )
        return tuple(Picture(image) for image in given)
    return () if given is None else (Picture(given),)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _read_chat(messages: Sequence[Mapping[str, Any]]) -> Row:
    """The chat is rendered as it came; its images and videos are taken out, as transformers takes them."""
    chat: list[dict[str, Any]] = []
    texts: list[str] = []
    pictures: list[Picture] = []
    videos: list[Video] = []
    for message in messages:
        parts = message["content"]
        if not isinstance(parts, str) and not (
            isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts)
        ):
            raise ValueError(
                f"The 'content' of a message is a {type(parts).__name__}, but a str or a list of dicts is needed."
            )
        content: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            kind = str(part.get("type"))
            source = next((part[key] for key in (kind, "path") if part.get(key) is not None), None)
            if kind == "text" and isinstance(source, str):
                content.append({"type": "text", "text": _unicode(source)})
                texts += [source] if message["role"] != "system" else []
            elif kind in ("image", "video") and source is not None:
                content.append({"type": kind})
                pictures += [Picture(source)] if kind == "image" else []
                videos += read_videos(source) if kind == "video" else []
            else:
                raise ValueError(
                    f"A message has a part with the keys {list(part)} and the type {kind!r}, but a 'text' (str), an 'image' or a "
                    "'video' is needed, under the key of its type."
                )
        chat.append({"role": message["role"], "content": content[0]["text"] if isinstance(parts, str) else content})
    return Row("".join(texts) if texts else None, tuple(pictures), tuple(videos), tuple(chat))


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A text holds half a character, {text[error.start]!r}, at position {error.start}. "
            "Clean it with text.encode(errors='ignore').decode()."
        ) from error
    return text
