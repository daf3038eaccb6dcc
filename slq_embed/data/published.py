"""Reading data sets as their authors publish them: parquet files, annotation files, folders of images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Image, load_from_disk


def read_columns(
    folder: Path, split: str, columns: Sequence[str], source: str, optional: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Read columns of a split; images stay undecoded.

    Args:
        folder: A folder with the split's parquet files (``test-00000-of-00001.parquet``), at any depth, or one that
            ``datasets`` saved with ``save_to_disk``.
        split: The split.
        columns: Columns that are needed.
        source: Where the data set is published, for messages.
        optional: Columns that are read where they are.

    Returns:
        The values of each column that is there.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If a column is missing.
    """
    dataset = _saved(folder, split)
    files = _parquet_files(folder, split) if dataset is None else []
    if dataset is None and not files:
        raise FileNotFoundError(
            f"There is no parquet file of the split {split!r} in {folder}, such as {split}-00000-of-00001.parquet. "
            f"It is published as {source}."
        )
    there = pq.read_schema(files[0]).names if dataset is None else dataset.column_names
    if missing := [column for column in columns if column not in there]:
        raise ValueError(
            f"{folder} has the columns {', '.join(there)}, but {', '.join(missing)} is needed. See {source}."
        )
    kept = [column for column in (*columns, *optional) if column in there]
    # Not the other columns: they may hold gigabytes of images that stand elsewhere too.
    dataset = Dataset(pq.read_table(files, columns=kept)) if dataset is None else dataset.select_columns(kept)
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return {name: dataset[name][:] for name in kept}


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(folder: Path, split: str) -> Dataset | None:
    """What ``save_to_disk`` wrote, if it did."""
    if not _is_saved(folder):
        return None
    loaded = load_from_disk(str(folder))
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"{folder} has the splits {', '.join(loaded)}, but {split!r} is needed.")
    return loaded[split]


def _parquet_files(folder: Path, split: str) -> list[Path]:
    patterns = (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet")
    return next((files for pattern in patterns if (files := sorted(folder.rglob(pattern)))), [])


def has_columns(folder: Path, split: str) -> bool:
    """Whether :func:`read_columns` finds a split there."""
    return folder.is_dir() and (_is_saved(folder) or bool(_parquet_files(folder, split)))


def image_of(value: Any, folder: Path) -> Any:
    """An image of a column, in a form that a model encodes: a path is relative to the folder."""
    if isinstance(value, str):
        return folder / value
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value


def read_json(file: Path, kind: type, source: str) -> Any:
    """Read an annotation file.

    Args:
        file: The file.
        kind: ``list`` or ``dict``: what it holds.
        source: Where it is published.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}. It is published as {source}.")
    try:
        content = json.loads(file.read_text("utf8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON in UTF-8: {error}. It is published as {source}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds a {type(content).__name__}, but a {kind.__name__} is needed: see {source}.")
    return content


def field_of(row: Any, name: str, where: str) -> Any:
    """A field of an annotation.

    Raises:
        ValueError: If the annotation is no object, or has no such field.
    """
    if not isinstance(row, Mapping) or name not in row:
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where} has {has}, but {name!r} is needed.")
    return row[name]


def locate(names: Iterable[str], roots: Sequence[Path], source: str) -> list[Path]:
    """Paths of image files.

    Args:
        names: Paths relative to one of the roots; the same root for all.
        roots: Folders where the images may be.
        source: Where the images are published.

    Raises:
        FileNotFoundError: If an image is missing; the message counts them and names the first.
    """
    names = list(names)
    missing = {root: [name for name in names if not (root / name).is_file()] for root in roots}
    best = min(roots, key=lambda root: len(missing[root]))
    if missing[best]:
        raise FileNotFoundError(
            f"{len(missing[best]):,} of {len(names):,} images are missing, such as {best / missing[best][0]}. Looked in: "
            f"{', '.join(map(str, roots))}. They are published as {source}; pass images=... if they are elsewhere."
        )
    return [best / name for name in names]


def require_limit(limit: int | None) -> None:
    """Raise a ValueError if a limit is below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but at least 1 is needed. Leave it out to read all.")


def require_count(name: str, count: int, expected: int | None, limit: int | None) -> None:
    """Compare a number with the published one, unless a limit says that only a part is read.

    Raises:
        ValueError: If they differ.
    """
    if limit is None and expected is not None and count != expected:
        raise ValueError(
            f"There are {count:,} {name}, but {expected:,} are published: this is another version, or a part. Results "
            "on it cannot be compared. Pass limit=..., which lifts this check, to use it all the same."
        )
