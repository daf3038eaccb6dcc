"""FashionIQ: dresses, shirts and tops, each with two captions that lead to another one."""

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

_CATEGORIES = ("dress", "shirt", "toptee")
_COUNTS = {"dress": (2017, 3817), "shirt": (2038, 6346), "toptee": (1961, 5373)}
_SOURCE = "XiaoxiaoGuo/fashion-iq, and for the validation split as royokong/fashioniq_val and fashioniq_val_imgs"


@dataclass(frozen=True)
class FashionIQSet:
    """What :class:`~slq_embed.evaluation.FashionIQEvaluator` takes: ``FashionIQEvaluator(**vars(data))``.

    Args:
        images: Images to search in.
        image_categories: The category of each image.
        references: For each query, the index of its reference image.
        captions: For each query, its two captions.
        targets: For each query, the index of its target.
        categories: The category of each query.
    """

    images: Sequence[Any]
    image_categories: Sequence[str]
    references: Sequence[int]
    captions: Sequence[Sequence[str]]
    targets: Sequence[int]
    categories: Sequence[str]


@dataclass(frozen=True)
class _Query:
    reference: str
    captions: list[str]
    target: str


def load_fashion_iq(folder: str | Path, *, images: str | Path | None = None, limit: int | None = None) -> FashionIQSet:
    """Read the validation split of FashionIQ; the targets of its test split are not published.

    Args:
        folder: A folder with ``captions/cap.dress.val.json`` and so on, ``image_splits/split.dress.val.json`` and so
            on, and ``images/<asin>.jpg``; or with the folders ``fashioniq_val`` and ``fashioniq_val_imgs`` of parquet
            files.
        images: The folder of the image files, if elsewhere.
        limit: Read so many queries a category, and only their images. This lifts the check of the counts: 2,017 queries
            and 3,817 images of dresses, 2,038 and 6,346 of shirts, 1,961 and 5,373 of tops.

    Raises:
        FileNotFoundError: If a file is missing; the message says where it is published.
        ValueError: If the counts or the fields are others.
    """
    require_limit(limit)
    folder = Path(folder)
    from_files = (folder / "captions" / "cap.dress.val.json").is_file()
    if from_files:
        parts = {category: _annotations(folder, category) for category in _CATEGORIES}
    elif has_columns(folder / "fashioniq_val", "val"):
        parts = _parquet(folder)
    else:
        raise FileNotFoundError(
            f"There is neither {folder / 'captions' / 'cap.dress.val.json'} nor {folder / 'fashioniq_val'} with parquet "
            f"files. FashionIQ is published as {_SOURCE}."
        )
    roots = [Path(images)] if images else [folder / name for name in ("images", "resized_images", ".")]
    pictures: list[Any] = []
    image_categories, references, captions, targets, categories = [], [], [], [], []
    for category, (queries, gallery) in parts.items():
        require_count(f"queries of FashionIQ {category}", len(queries), _COUNTS[category][0], limit)
        require_count(f"images of FashionIQ {category}", len(gallery), _COUNTS[category][1], limit)
        queries = queries[:limit]
        if limit is not None:
            needed = {name for query in queries for name in (query.reference, query.target)}
            gallery = {name: value for name, value in gallery.items() if name in needed}
        index = {name: len(pictures) + number for number, name in enumerate(gallery)}
        if absent := {name for query in queries for name in (query.reference, query.target)} - set(index):
            raise ValueError(
                f"A query of FashionIQ {category} names the image {min(absent)!r}, which the split does not have."
            )
        if from_files:
            pictures += locate([f"{name}.jpg" for name in gallery], roots, "royokong/fashioniq_val_imgs")
        else:
            pictures += gallery.values()
        image_categories += [category] * len(gallery)
        references += [index[query.reference] for query in queries]
        captions += [query.captions for query in queries]
        targets += [index[query.target] for query in queries]
        categories += [category] * len(queries)
    return FashionIQSet(pictures, image_categories, references, captions, targets, categories)


def _query(reference: Any, captions: Any, target: Any, where: str) -> _Query:
    if not isinstance(captions, list) or len(captions) != 2:
        raise ValueError(f"{where} has the captions {captions!r}, but a list of two is needed.")
    return _Query(reference, captions, target)


def _annotations(folder: Path, category: str) -> tuple[list[_Query], dict[str, Any]]:
    file = folder / "captions" / f"cap.{category}.val.json"
    queries = []
    for number, row in enumerate(read_json(file, list, _SOURCE)):
        where = f"{file}, entry {number}"
        reference, captions, target = (field_of(row, name, where) for name in ("candidate", "captions", "target"))
        queries.append(_query(reference, captions, target, where))
    names = read_json(folder / "image_splits" / f"split.{category}.val.json", list, _SOURCE)
    return queries, dict.fromkeys(names)


def _parquet(folder: Path) -> dict[str, tuple[list[_Query], dict[str, Any]]]:
    columns = read_columns(
        folder / "fashioniq_val", "val", ["candidate_id", "caption", "target_id", "category"], _SOURCE
    )
    gallery = read_columns(folder / "fashioniq_val_imgs", "val", ["id", "img", "category"], _SOURCE)
    parts: dict[str, tuple[list[_Query], dict[str, Any]]] = {category: ([], {}) for category in _CATEGORIES}
    for name, value, category in zip(gallery["id"], gallery["img"], gallery["category"], strict=True):
        parts[category][1][name] = image_of(value, folder / "fashioniq_val_imgs")
    rows = zip(columns["candidate_id"], columns["caption"], columns["target_id"], columns["category"], strict=True)
    for number, (reference, captions, target, category) in enumerate(rows):
        parts[category][0].append(_query(reference, captions, target, f"fashioniq_val, row {number}"))
    return parts
