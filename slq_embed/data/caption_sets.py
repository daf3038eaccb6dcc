"""The test sets of COCO and Flickr30K, for retrieval both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slq_embed.data.published import (
    field_of,
    has_columns,
    image_of,
    locate,
    read_columns,
    read_json,
    require_count,
    require_limit,
)

_CAPTIONS = 5
_TEXT_COLUMNS = ("text", "caption", "captions")


@dataclass(frozen=True)
class RetrievalSet:
    """What :class:`~slq_embed.evaluation.ImageTextRetrievalEvaluator` takes: ``Evaluator(**vars(data))``.

    Args:
        images: Images, undecoded.
        texts: Captions. Those of COCO and Flickr30K are at most five an image.
        image_of: For each text, the index of its image.
    """

    images: Sequence[Any]
    texts: Sequence[str]
    image_of: Sequence[int]


@dataclass(frozen=True)
class _Published:
    name: str
    images: int
    captions: int
    parquet: str
    karpathy: tuple[str, ...]
    image_folders: tuple[str, ...]


_COCO = _Published(
    *("COCO", 5000, 25010, "royokong/coco_test"), ("dataset_coco.json", "coco/dataset.json"), (".", "images", "coco")
)
_FLICKR30K = _Published(
    *("Flickr30K", 1000, 5000, "royokong/flickr30k_test"),
    ("dataset_flickr30k.json", "flickr30k/dataset.json"),
    ("flickr30k-images", "flickr30k_images", "images", "."),
)


def load_coco(folder: str | Path, *, images: str | Path | None = None, limit: int | None = None) -> RetrievalSet:
    """Read the 5,000 test images of COCO with their captions.

    Args:
        folder: A folder with the parquet files of ``royokong/coco_test`` (split ``test``: ``image``, ``text``), or
            with the Karpathy file ``dataset_coco.json`` and COCO's image folders (``val2014``).
        images: Where the image folders are, if elsewhere.
        limit: Read so many images only. This lifts the check of the counts: 5,000 images, 25,010 captions.

    Returns:
        The first five captions of each image, as the data set is evaluated.

    Raises:
        FileNotFoundError: If a file is missing; the message says where it is published.
        ValueError: If the counts or the columns are others, or an image has no caption.
    """
    return _load(Path(folder), images, limit, _COCO)


def load_flickr30k(folder: str | Path, *, images: str | Path | None = None, limit: int | None = None) -> RetrievalSet:
    """Read the 1,000 test images of Flickr30K with their captions.

    Args:
        folder: A folder with the parquet files of ``royokong/flickr30k_test`` or another copy with the split ``test``,
            or with the Karpathy file ``dataset_flickr30k.json`` and the images.
        images: Where the images are, if elsewhere.
        limit: Read so many images only. This lifts the check of the counts: 1,000 images, 5,000 captions.

    Returns:
        The five captions of each image.

    Raises:
        FileNotFoundError: If a file is missing; the message says where it is published.
        ValueError: If the counts or the columns are others, or an image has no caption.
    """
    return _load(Path(folder), images, limit, _FLICKR30K)


def _load(folder: Path, images: str | Path | None, limit: int | None, published: _Published) -> RetrievalSet:
    require_limit(limit)
    source = f"the dataset {published.parquet} and as a Karpathy split file, {published.karpathy[0]}"
    annotations = next((folder / name for name in published.karpathy if (folder / name).is_file()), None)
    if annotations is None:
        pictures, captions = _parquet(folder, source)
    else:
        rows = field_of(read_json(annotations, dict, source), "images", str(annotations))
        rows = [row for row in rows if field_of(row, "split", str(annotations)) == "test"]
        captions = [[sentence["raw"] for sentence in field_of(row, "sentences", str(annotations))] for row in rows]
        names = [str(Path(row.get("filepath", "")) / row["filename"]) for row in rows[:limit]]
        roots = [Path(images)] if images else [folder / name for name in published.image_folders]
        pictures = locate(names, roots, f"the images of {published.name}")
    require_count(f"images of {published.name}", len(captions), published.images, limit)
    require_count(f"captions of {published.name}", sum(map(len, captions)), published.captions, limit)
    texts, owners = [], []
    for number, row in enumerate(captions[:limit]):
        kept = [text for text in row[:_CAPTIONS] if isinstance(text, str) and text.strip()]
        if len(kept) < min(_CAPTIONS, len(row)) or not kept:
            raise ValueError(f"Image {number} of {folder} has an empty caption, or none. Take the data as published.")
        texts += kept
        owners += [number] * len(kept)
    return RetrievalSet(pictures[:limit], texts, owners)


def _parquet(folder: Path, source: str) -> tuple[list[Any], list[list[Any]]]:
    if not has_columns(folder, "test"):
        raise FileNotFoundError(
            f"There is neither a parquet file of the split 'test' nor a Karpathy file in {folder}. The data are "
            f"published as {source}."
        )
    columns = read_columns(folder, "test", ["image"], source, optional=_TEXT_COLUMNS)
    texts = next((columns[name] for name in _TEXT_COLUMNS if name in columns), None)
    if texts is None:
        raise ValueError(f"{folder} has no column of captions, but one of {', '.join(_TEXT_COLUMNS)} is needed.")
    rows = [row if isinstance(row, list) else [row] for row in texts]
    return [image_of(value, folder) for value in columns["image"]], rows
