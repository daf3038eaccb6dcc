"""CIRR: an image, a text that says what to change, and the image that is meant."""

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

_COUNTS = {"train": (28225, 16939), "val": (4181, 2297), "test1": (4148, 2315)}
_SOURCE = "Cuberick-Orion/CIRR, branch cirr_dataset, and for the validation split as royokong/cirr_val and cirr_imgs"


@dataclass(frozen=True)
class CIRRSet:
    """What :class:`~slq_embed.evaluation.CIRREvaluator` takes: ``CIRREvaluator(**vars(data))``.

    Args:
        images: Images to search in.
        references: For each query, the index of its reference image.
        texts: For each query, what to change.
        targets: For each query, the index of its target; ``None`` in the test split.
        subsets: For each query, the indices of its subset of similar images; ``None`` where they are not known.
        names: The name of each image.
        pair_ids: The ``pairid`` of each query; ``None`` in the parquet form.
    """

    images: Sequence[Any]
    references: Sequence[int]
    texts: Sequence[str]
    targets: Sequence[int] | None
    subsets: Sequence[Sequence[int]] | None
    names: Sequence[str]
    pair_ids: Sequence[int] | None


@dataclass(frozen=True)
class _Query:
    reference: str
    text: str
    target: str | None
    members: tuple[str, ...] | None
    pair_id: int | None


def load_cirr(
    folder: str | Path, split: str = "val", *, images: str | Path | None = None, limit: int | None = None
) -> CIRRSet:
    """Read a split of CIRR.

    Args:
        folder: A folder with ``captions/cap.rc2.val.json``, ``image_splits/split.rc2.val.json`` and the images; or, for
            the validation split, with the folders ``cirr_val`` and ``cirr_imgs`` of parquet files.
        split: ``"val"``, ``"test1"`` or ``"train"``.
        images: The folder that the paths of ``image_splits`` are relative to, if it is neither ``folder`` nor
            ``img_raw`` or ``images`` below it.
        limit: Read so many queries, and only their images. This lifts the check of the counts: 4,181 queries and 2,297
            images for validation, 4,148 and 2,315 for the test.

    Raises:
        FileNotFoundError: If a file is missing; the message says where it is published.
        ValueError: If the counts or the fields are others.
    """
    require_limit(limit)
    folder = Path(folder)
    annotations = folder / "captions" / f"cap.rc2.{split}.json"
    pictures: dict[str, Any]
    if annotations.is_file():
        queries = [
            _query(row, f"{annotations}, entry {n}") for n, row in enumerate(read_json(annotations, list, _SOURCE))
        ]
        pictures = read_json(folder / "image_splits" / f"split.rc2.{split}.json", dict, _SOURCE)
    elif split == "val" and has_columns(folder / "cirr_val", split):
        queries, pictures = _parquet(folder, split)
    else:
        raise FileNotFoundError(
            f"There is neither {annotations} nor {folder / 'cirr_val'} with parquet files. CIRR is published as {_SOURCE}."
        )
    expected = _COUNTS.get(split, (None, None))
    require_count(f"queries of CIRR {split}", len(queries), expected[0], limit)
    require_count(f"images of CIRR {split}", len(pictures), expected[1], limit)
    queries = queries[:limit]
    if limit is not None:
        needed = {name for query in queries for name in (query.reference, query.target, *(query.members or ()))}
        pictures = {name: picture for name, picture in pictures.items() if name in needed}
    if annotations.is_file():
        roots = [Path(images)] if images else [folder, folder / "img_raw", folder / "images"]
        pictures = dict(
            zip(pictures, locate(pictures.values(), roots, "the NLVR2 images that CIRR names"), strict=True)
        )
    index = {name: number for number, name in enumerate(pictures)}

    def at(name: str) -> int:
        if name not in index:
            raise ValueError(f"A query of CIRR {split} names the image {name!r}, which the split does not have.")
        return index[name]

    targets = [at(query.target) for query in queries if query.target is not None]
    subsets = [[at(name) for name in query.members] for query in queries if query.members is not None]
    pair_ids = [query.pair_id for query in queries if query.pair_id is not None]
    return CIRRSet(
        list(pictures.values()),
        [at(query.reference) for query in queries],
        [query.text for query in queries],
        targets if len(targets) == len(queries) else None,
        subsets if len(subsets) == len(queries) else None,
        list(pictures),
        pair_ids if len(pair_ids) == len(queries) else None,
    )


def _query(row: Any, where: str) -> _Query:
    members = field_of(field_of(row, "img_set", where), "members", f"{where}, img_set")
    return _Query(
        field_of(row, "reference", where),
        field_of(row, "caption", where),
        row.get("target_hard"),
        tuple(members),
        field_of(row, "pairid", where),
    )


def _parquet(folder: Path, split: str) -> tuple[list[_Query], dict[str, Any]]:
    columns = read_columns(
        folder / "cirr_val", split, ["candidate_id", "caption", "target_id"], _SOURCE, optional=["group"]
    )
    gallery = read_columns(folder / "cirr_imgs", split, ["id", "img"], _SOURCE)
    groups = columns.get("group") or [None] * len(columns["caption"])
    queries = [
        _Query(reference, text, target, tuple(group) if isinstance(group, list) else None, None)
        for reference, text, target, group in zip(
            columns["candidate_id"], columns["caption"], columns["target_id"], groups, strict=True
        )
    ]
    pictures = [image_of(value, folder / "cirr_imgs") for value in gallery["img"]]
    return queries, dict(zip(gallery["id"], pictures, strict=True))
