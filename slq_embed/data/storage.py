"""Images as ``datasets`` stores them, however many bytes they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, concatenate_datasets

from slq_embed.inputs import read_image

_PART_BYTES = 2**28


def stored_image(image: Any) -> dict[str, Any]:
    """An image as a dict of ``bytes`` and ``path``; a picture that is in no file is compressed without loss.

    Raises:
        ValueError: If it is no image.
    """
    if isinstance(image, Mapping):
        # Beside bytes, a path is only a name. datasets would take the file of that name, if the working directory has one.
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    elif _is_its_file(image):
        image = Path(image.filename)
    if isinstance(image, Path):
        image = str(image.absolute())  # datasets 3.6 knows no pathlib.Path
    elif not isinstance(image, str | bytes | bytearray):
        image = read_image(image)
    stored: dict[str, Any] = Image().encode_example(image)
    return stored


def _is_its_file(image: Any) -> bool:
    """Whether a picture is what is in the file that it was opened from: datasets asks for the name only."""
    with suppress(ValueError):  # the file is gone
        return bool(getattr(image, "filename", "")) and read_image(image.filename) == read_image(image)
    return False


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
