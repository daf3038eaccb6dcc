"""What is put into an index: image files of a folder, and names and metadata where none are given."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Metadata = Mapping[str, Any]

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def image_files(folder: str | Path) -> list[Path]:
    """All image files below a folder, in order; for :meth:`EmbeddingIndex.add`."""
    return sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file())


def own_name(value: Any) -> str:
    """An id: a path's own name, and for anything else a random one."""
    # A file's name is bytes, and need not be Unicode.
    return str(value).encode("utf8", "backslashreplace").decode() if isinstance(value, Path) else uuid.uuid4().hex


def as_json(metadata: Metadata) -> str:
    """Metadata as it is stored.

    Raises:
        ValueError: If JSON cannot hold it.
    """
    try:
        return json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Metadata {dict(metadata)!r} cannot be stored: {error}. Use what JSON can hold.") from error


def described(value: Any) -> dict[str, Any]:
    """Metadata: the path or the text."""
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return {key: str(part) for key, part in value.items() if isinstance(part, str | Path)}
    return {}
