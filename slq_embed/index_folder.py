"""The folder of a saved index: each save writes files of its own, and then, in one step, the file that names them."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from slq_embed.index_faiss import import_faiss
from slq_embed.index_records import IndexRecords

FORMAT_VERSION = 1
_ABOUT = "index.json"


def write_folder(folder: Path, index: Any, records: IndexRecords, about: dict[str, Any]) -> Path:
    """Write an index; killed in the middle, what was saved before is still whole.

    Args:
        folder: Made if it is not there.
        index: The FAISS index, on the CPU.
        records: Ids and metadata.
        about: What :func:`read_about` is to give.

    Returns:
        Where the files lie.
    """
    files = folder / f"v-{uuid.uuid4().hex[:12]}"
    files.mkdir(parents=True)
    import_faiss().write_index(index, str(embeddings_file(files)))
    records.save(records_file(files))
    fresh = files / _ABOUT
    fresh.write_text(json.dumps({"format_version": FORMAT_VERSION, "version": files.name, **about}, indent=2) + "\n")
    for file in files.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    fresh.replace(folder / _ABOUT)
    for old in folder.glob("v-*"):  # an earlier save, or one that was killed
        if old.name != files.name:
            shutil.rmtree(old)
    return files


def read_about(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the files of a saved index lie, and what was written about it.

    Raises:
        ValueError: If there is no index, or a newer version of this package wrote it.
    """
    if not (folder / _ABOUT).is_file():
        raise ValueError(f"{folder} holds no index: there is no {_ABOUT}. Was it saved there?")
    about = json.loads((folder / _ABOUT).read_text("utf8"))
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"The index in {folder} has format {about['format_version']}, but this slq-embed reads up to "
            f"{FORMAT_VERSION}. Upgrade slq-embed."
        )
    return folder / about["version"], about


def embeddings_file(files: Path) -> Path:
    """The FAISS index."""
    return files / "embeddings.faiss"


def records_file(files: Path) -> Path:
    """Ids and metadata."""
    return files / "records.sqlite"
