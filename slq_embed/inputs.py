"""What people pass in, brought into one form: a text, an image, or an image with a text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_DECODED_PIXELS = 16_000_000
"""Larger images are reduced on the way in; no vision tower reads more."""
MAX_SOURCE_PIXELS = 178_956_970
"""Larger images are refused before they are decoded, at Pillow's own limit: a decompression bomb, or a mistake."""
MAX_ASPECT_RATIO = 100
"""Longer strips are padded with white: image processors refuse or distort them."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: what brings it upright."""

ONE_INPUT = (str, Path, Mapping, Image.Image)
"""Types of one input; a list of them is a batch."""


@dataclass(frozen=True)
class Skipped:
    """A record that was left out.

    Args:
        name: The file, or the place among the inputs.
        reason: What is wrong with it.
        place: The place among the inputs, counted from 0, where they have one.
    """

    name: str
    reason: str
    place: int | None = None


@dataclass(frozen=True)
class Row:
    """One input: a text, an image that is decoded when it is asked for, or both.

    Args:
        text: The text.
        source: The image, as :func:`read_image` takes it.
    """

    text: str | None = None
    source: Any = None

    @cached_property
    def image(self) -> Image.Image | None:
        """The decoded image, RGB.

        Raises:
            ValueError: If it cannot be decoded.
        """
        return None if self.source is None else read_image(self.source)

    def messages(self, prompt: str | None = None, decode: bool = True) -> list[dict[str, Any]]:
        """The row as a chat, the prompt as its system message: the form in which Sentence Transformers sends it."""
        content: list[dict[str, Any]] = []
        if self.source is not None:
            content.append({"type": "image", "image": self.image} if decode else {"type": "image"})
        if self.text is not None:
            content.append({"type": "text", "text": self.text})
        chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if prompt:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt}]})
        return chat

    def image_digest(self) -> bytes:
        """What tells images apart: a digest of the file, which need not be decoded, or of decoded pixels.

        Raises:
            ValueError: If there is no such file.
        """
        source = self.source
        if source is None:
            return b""
        if isinstance(source, Mapping):
            source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if isinstance(source, str | Path):
            source = _existing(source).read_bytes()
        if isinstance(source, bytes | bytearray):
            return hashlib.sha256(source).digest()
        image = self.image
        assert image is not None
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def shortened(value: str | Path) -> str:
    """A text or a path for a message: what was meant for a path may be a whole file, and a text a book."""
    text, longest = str(value), 1000 if isinstance(value, Path) else 200
    return text if len(text) <= longest else f"{text[:longest]}..."


def read_row(value: Any) -> Row:
    """Read one input.

    Args:
        value: A str (always text, never a path or URL), a PIL image, a ``pathlib.Path`` of an image, a dict
            with ``"text"`` (str), ``"image"`` (PIL image, path, or bytes of an image file), or both, or the dict
            with ``"bytes"`` and ``"path"`` that ``datasets`` gives for an undecoded image.

    Raises:
        ValueError: If it is none of these. (Not TypeError: Sentence Transformers answers that by trying again
            without the prompt.)
    """
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
        raise ValueError(f"A text holds half a character, {text[error.start]!r}, at place {error.start}.") from error
    return text


def read_image(source: Any) -> Image.Image:
    """Decode an image into upright, opaque, 8-bit RGB.

    Args:
        source: PIL image, path (str or ``pathlib.Path``), bytes of an image file, or the dict with ``"bytes"``
            and ``"path"`` that ``datasets`` gives for an undecoded image.

    Returns:
        An RGB image. The first frame of an animation; EXIF rotation applied; transparency laid on white;
        16-bit grey scaled to 8; above 16 megapixels reduced; strips beyond 100:1 padded.

    Raises:
        ValueError: If it cannot be decoded or is above 178 megapixels, with the file's name where there is one.
    """
    if isinstance(source, Mapping):
        raw, path = source.get("bytes"), source.get("path")
        source = raw if raw is not None else path
    if isinstance(source, Image.Image):
        return _to_rgb(source, "a PIL image")
    if isinstance(source, bytes | bytearray):
        return _open(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, str | Path):
        return _open(_existing(source), repr(str(source)))
    raise ValueError(f"An image is a {type(source).__name__}, but a PIL image, a path or bytes are needed.")


def _existing(path: str | Path) -> Path:
    try:
        there = Path(path).is_file()
    except OSError:  # a name too long for a file
        there = False
    if not there:
        raise ValueError(f"There is no image file {shortened(Path(path))!r}. Check the path (URLs are not fetched).")
    return Path(path)


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} is not an image that can be read: {error}") from error
    with image:
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_SOURCE_PIXELS or min(width, height) == 0:
        raise ValueError(
            f"{name} has {width} x {height} pixels, but 1 to {MAX_SOURCE_PIXELS // 10**6} megapixels can be read."
        )
    try:
        if width * height > MAX_DECODED_PIXELS:
            # JPEG decodes straight to a smaller size; other formats are reduced after decoding.
            image.draft("RGB", (width // 2, height // 2))
        image = _opaque_rgb(_upright(image))
    except Exception as error:  # damage makes decoders raise whatever they like
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    width, height = image.size
    if (excess := width * height / MAX_DECODED_PIXELS) > 1:
        image = image.reduce(int(np.ceil(excess**0.5)))
    short = max(image.size) // MAX_ASPECT_RATIO
    if min(image.size) < short:
        canvas = Image.new("RGB", (max(image.width, short), max(image.height, short)), "white")
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    clean = Image.new("RGB", image.size)  # without metadata, by which others would turn it again
    clean.paste(image)
    return clean


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: that writes the metadata anew, and fails where any of it is malformed.
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # no metadata that can be read
        turn = None
    return image if turn is None else image.transpose(turn)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        scale = 65535.0 if values.max() > 255 else 255.0  # a float image may hold 0-255 as it is
        return Image.fromarray((values.clip(0, scale) * (255 / scale)).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
