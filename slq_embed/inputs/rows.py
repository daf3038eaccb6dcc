"""What people pass in, brought into one form: a text, an image, or an image with a text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from slq_embed.inputs.images import decode, pixels, read_file, read_image

ONE_INPUT = (str, Path, Mapping, Image.Image)
"""Types of one input; a list of them is a batch."""

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
    """One line that names every skipped input, with the reason."""
    if not skipped:
        return "nothing was skipped"
    return f"{len(skipped)} skipped: " + "; ".join(f"{row.name} ({row.reason})" for row in skipped)


@dataclass(frozen=True)
class Row:
    """One input. A file is read once, at the first use, and decoded where pixels are needed.

    Args:
        text: The text.
        source: The image, as :func:`slq_embed.inputs.read_image` takes it.
    """

    text: str | None = None
    source: Any = None

    @cached_property
    def content(self) -> bytes | None:
        """The bytes of the image file; ``None`` where there is no file.

        Raises:
            ValueError: If there is no such file.
        """
        return read_file(self.source)

    @cached_property
    def image(self) -> Image.Image | None:
        """The decoded image, RGB.

        Raises:
            ValueError: If it cannot be decoded.
        """
        if self.source is None:
            return None
        return read_image(self.source) if self.content is None else decode(self.content, self.source)

    @property
    def size(self) -> float:
        """About how many tokens the input has. Nothing is decoded."""
        image = self.source if self.content is None else self.content
        area = pixels(image) if isinstance(image, bytes | Image.Image) else 0
        return len(self.text or "") / _CHARACTERS_PER_TOKEN + area / _PIXELS_PER_TOKEN

    def messages(self, prompt: str | None = None) -> list[dict[str, Any]]:
        """The input as a chat without pixels, the prompt as its system message: as Sentence Transformers sends it."""
        content: list[dict[str, Any]] = [] if self.source is None else [{"type": "image"}]
        if self.text is not None:
            content.append({"type": "text", "text": self.text})
        chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if prompt:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt}]})
        return chat

    def image_digest(self) -> bytes:
        """What tells images apart: a digest of the file, which need not be decoded, or of decoded pixels.

        Raises:
            ValueError: If there is no such file, or the image is of an unknown type.
        """
        if self.source is None:
            return b""
        if self.content is not None:
            return hashlib.sha256(self.content).digest()
        assert self.image is not None
        return hashlib.sha256(repr(self.image.size).encode() + self.image.tobytes()).digest()


def read_row(value: Any) -> Row:
    """Read one input.

    Args:
        value: A str (always text, never a path or URL), a PIL image, a ``pathlib.Path`` of an image, a dict
            with ``"text"`` (str), ``"image"`` (PIL image, path, or bytes of an image file), or both, the dict
            with ``"bytes"`` and ``"path"`` that ``datasets`` gives for an undecoded image, or a :class:`Row`.

    Raises:
        ValueError: If it is none of these. (Not TypeError: Sentence Transformers answers that by trying again
            without the prompt.)
    """
    if isinstance(value, Row):
        return value
    if isinstance(value, str):
        return Row(text=_unicode(value))
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:
            return Row(source=value)
        if not value or not set(value) <= {"text", "image"}:
            raise ValueError(f"An input dict has the keys {list(value)}, but 'text', 'image' or both are needed.")
        text, image = value.get("text"), value.get("image")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"The 'text' of an input is a {type(text).__name__}, but a str is needed.")
        if text is None and image is None:
            raise ValueError("An input dict holds None only. Give it a text, an image, or both.")
        return Row(text and _unicode(text), image)
    if isinstance(value, Image.Image | Path):
        return Row(source=value)
    raise ValueError(
        f"An input is a {type(value).__name__}. Pass a str (text), a PIL image, a pathlib.Path of an image, or a "
        'dict such as {"image": image, "text": text}.'
    )


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A text holds half a character, {text[error.start]!r}, at position {error.start}. "
            "Clean it with text.encode(errors='ignore').decode()."
        ) from error
    return text
