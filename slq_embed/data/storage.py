"""Images as ``datasets`` stores them, however many bytes they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, concatenate_datasets
from PIL import Image as PILImage

from slq_embed.inputs import read_image

_PART_BYTES = 2**28


def stored_image(image: Any) -> dict[str, Any]:
    """An image as a dict of ``bytes`` and ``path``; a picture is compressed.

    Raises:
        ValueError: If it is no image.
    """
    known = isinstance(image, str | Path | bytes | bytearray | Mapping | PILImage.Image)
    stored: dict[str, Any] = Image().encode_example(image if known else read_image(image))
    return stored


def dataset_of(rows: Iterable[dict[str, Any]], features: Features) -> Dataset | None:
    """Build a dataset in parts: Arrow takes no more than 2 GiB of images in one.

    Args:
        rows: Rows with an ``image`` of :func:`stored_image`.
        features: Their columns.

    Returns:
        The dataset; ``None`` if there are no rows.
    """
    parts = [Dataset.from_list(part, features) for part in _parts(rows)]
    return concatenate_datasets(parts) if parts else None


def _parts(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        part.append(row)
        size += len(row["image"]["bytes"] or b"")
        if size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
