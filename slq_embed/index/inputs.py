"""What is put into an index: image files of a folder, and names and metadata where none are given."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from slq_embed.inputs.rows import ONE_INPUT

Metadata = Mapping[str, Any]

_NONE_LEFT = object()

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def image_files(folder: str | Path) -> list[Path]:
    """All image files below a folder, in order; for :meth:`EmbeddingIndex.add`.

    Raises:
        ValueError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    return sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file())


def own_name(value: Any) -> str:
    """An id: a path's own name, and for anything else a random one."""
    # A file's name is bytes, and need not be Unicode.
    return str(value).encode("utf8", "backslashreplace").decode() if isinstance(value, Path) else uuid.uuid4().hex


def as_json(metadata: Metadata) -> str:
    """Metadata as it is stored.

    Raises:
        ValueError: If it is no mapping, or JSON cannot hold it.
    """
    if not isinstance(metadata, Mapping):
        raise ValueError(f"Metadata of one input is a {type(metadata).__name__}, but a dict is needed.")
    try:
        return json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Metadata {dict(metadata)!r} cannot be stored: {error}. Use what JSON can hold.") from error


def with_ids_and_metadata(
    inputs: Any, ids: Iterable[Any] | None, metadata: Iterable[Metadata] | Metadata | None
) -> Iterator[tuple[Any, str, str]]:
    """Inputs, each with its id and its metadata as it is stored; one input, id and dict need not be lists.

    Raises:
        ValueError: If there are more of one than of another, or metadata cannot be stored.
    """
    if isinstance(inputs, ONE_INPUT):
        inputs, ids = [inputs], [ids] if isinstance(ids, str) else ids
        metadata = [metadata] if isinstance(metadata, Mapping) else metadata
    columns = [column for column in (inputs, ids, metadata) if column is not None]
    for place, row in enumerate(zip_longest(*columns, fillvalue=_NONE_LEFT)):
        if any(value is _NONE_LEFT for value in row):
            raise ValueError(f"Inputs, ids and metadata are not equally many: at place {place} some have ended.")
        value, *rest = row
        id_ = own_name(value) if ids is None else str(rest[0])
        yield value, id_, as_json(described(value) if metadata is None else rest[-1])


def described(value: Any) -> dict[str, Any]:
    """Metadata: the path or the text."""
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return {key: str(part) for key, part in value.items() if isinstance(part, str | Path)}
    return {}
