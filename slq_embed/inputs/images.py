"""Images: reading a file once, and decoding it into upright, opaque, 8-bit RGB."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from slq_embed.inputs.pdf import PdfPage

IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)
"""How names of image files end. Also of those that Pillow may lack a plugin for: such a file is to be listed as unreadable."""
MAX_DECODED_PIXELS = 16_000_000
"""Larger images are reduced when they are decoded; no vision tower reads more."""
MAX_SOURCE_PIXELS = 178_956_970
"""Larger images are refused before they are decoded, at Pillow's own limit: a decompression bomb, or a mistake."""
MAX_ASPECT_RATIO = 100
"""Longer strips are padded with white: image processors refuse or distort them."""

_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its EXIF orientation."""


def read_image(source: Any) -> Image.Image:
    """Decode an image.

    Args:
        source: PIL image, path (str or ``pathlib.Path``), bytes of an image file, the dict with ``"bytes"``
            and ``"path"`` that ``datasets`` gives for an undecoded image, or a page of :func:`slq_embed.inputs.read_pdf`.
            Or an array or a tensor in uint8: ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``.

    Returns:
        An upright RGB image. The first frame of an animation; EXIF rotation applied; transparency laid on white;
        16-bit grey scaled to 8, and so are float images in 0 to 1; above 16 megapixels reduced (a JPEG file already as it is
        decoded, so it differs a little from its decoded picture); strips beyond 100:1 padded. What was passed in stays as it is.

    Raises:
        ValueError: If the image cannot be decoded or is above 178 megapixels. The message names the file.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _to_rgb(_from_array(source), "an array")
    if isinstance(source, Image.Image):
        return _to_rgb(source, "a PIL image")
    if isinstance(source, PdfPage):
        return _to_rgb(source.render(), repr(str(source)))
    content = read_file(source)
    if content is None:
        raise ValueError(
            f"An image is a {type(source).__name__}, but a PIL image, an array, a path or bytes are needed."
        )
    return decode(content, source)


def _from_array(array: NDArray[Any] | torch.Tensor) -> Image.Image:
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    first = len(shape) == 3 and shape[0] in (1, 3)  # the channels are the first axis, by the host's rule
    channels = 1 if len(shape) == 2 else shape[0 if first else -1] if len(shape) == 3 else 0
    if dtype != "uint8" or channels not in (1, 3, 4):
        raise ValueError(
            f"An image is an array of shape {shape} in {dtype}, but (H, W), (H, W, 1, 3 or 4) or (1 or 3, H, W) in uint8 is needed. "
            "Floats in 0 to 1 become uint8 by (array * 255).astype('uint8'); several images are a list: list(array)."
        )
    values = np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array)
    values = values.transpose(1, 2, 0) if first else values
    return Image.fromarray(values.reshape(values.shape[:2]) if channels == 1 else values)


def read_file(source: Any) -> bytes | None:
    """The bytes of an image file.

    Args:
        source: As for :func:`read_image`.

    Returns:
        The bytes; ``None`` where the source is not a file, such as a PIL image.

    Raises:
        ValueError: If there is no such file.
    """
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if not isinstance(source, str | Path):
        return None
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ValueError(
            f"There is no image file {shortened(Path(source))!r} that can be read "
            f"({getattr(error, 'strerror', None) or 'not a path'}). Check the path (URLs are not fetched)."
        ) from error


def shortened(value: str | Path) -> str:
    """A text or a path, cut for a message: a whole file may come as a path, and a book as a text."""
    text, longest = str(value), 1000 if isinstance(value, Path) else 200
    return text if len(text) <= longest else f"{text[:longest]}..."


def decode(content: bytes, source: Any) -> Image.Image:
    """Decode the bytes of an image file; as :func:`read_image`.

    Args:
        content: The bytes.
        source: Where the bytes come from. An error names it.
    """
    name = _name(content, source)
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # its message names a buffer
        raise ValueError(
            f"{name} is not an image that can be read: its format is unknown, or its header damaged."
        ) from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} is not an image that can be read: {error}") from error
    with image:
        return _to_rgb(image, name, draft=True)


def _name(content: bytes, source: Any) -> str:
    if isinstance(source, Mapping) and source.get("bytes") is None:
        source = source.get("path")
    return repr(str(source)) if isinstance(source, str | Path) else f"an image of {len(content)} bytes"


def pixels(image: bytes | Image.Image | NDArray[Any] | torch.Tensor) -> int:
    """Width times height. An image file's header is read and nothing else; 0 if it cannot be read."""
    if isinstance(image, np.ndarray | torch.Tensor):
        return math.prod(image.shape) // 3
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return 0
    return opened.width * opened.height


def _to_rgb(image: Image.Image, name: str, draft: bool = False) -> Image.Image:
    width, height = image.size
    if width * height > MAX_SOURCE_PIXELS or min(width, height) == 0:
        raise ValueError(
            f"{name} has {width} x {height} pixels, but 1 to {MAX_SOURCE_PIXELS // 10**6} megapixels can be read."
        )
    try:
        if draft and width * height > MAX_DECODED_PIXELS:
            # JPEG decodes straight to a smaller size; other formats are reduced after decoding. A caller's image would stay small.
            image.draft("RGB", (width // 2, height // 2))
        image = _opaque_rgb(_upright(image))
    except Exception as error:  # a damaged file makes a decoder raise any error
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    width, height = image.size
    if (excess := width * height / MAX_DECODED_PIXELS) > 1:
        image = image.reduce(int(np.ceil(excess**0.5)))
    shortest = max(image.size) // MAX_ASPECT_RATIO
    if min(image.size) < shortest:
        canvas = Image.new("RGB", (max(image.width, shortest), max(image.height, shortest)), "white")
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    clean = Image.new("RGB", image.size)  # without metadata, by which another program would turn it again
    clean.paste(image)
    return clean


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the metadata anew, and fails where any of it is malformed.
    image.load()
    try:
        transpose = _TRANSPOSE_BY_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the metadata cannot be read
        transpose = None
    return image if transpose is None else image.transpose(transpose)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0
        if image.mode.startswith("I;16") or values.max() > 255:  # 32 bits a pixel may hold a range of 8 or of 16
            scale = 65535.0
        elif image.mode == "F" and values.max() <= 1:
            scale = 1.0
        return Image.fromarray((values.clip(0, scale) * (255 / scale)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
