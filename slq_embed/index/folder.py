"""The folder of a saved index: each save writes files of its own, and then, in one step, the file that names them."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from slq_embed.index.faiss_types import import_faiss
from slq_embed.index.records import IndexRecords

FORMAT_VERSION = 1
_ABOUT, _EMBEDDINGS, _RECORDS = "index.json", "embeddings.faiss", "records.sqlite"


def write_folder(
    folder: Path, index: Any, records: IndexRecords, about: dict[str, Any], after: Path | None = None
) -> Path:
    """Write an index; killed in the middle, what was saved before is still whole.

    Args:
        folder: Made if it is not there.
        index: The FAISS index, on the CPU.
        records: Ids and metadata.
        about: What :func:`read_about` is to give.
        after: What the folder was last known to hold, if it is known: another save in between must not be undone.

    Returns:
        Where the files lie.

    Raises:
        ValueError: If something else was saved there in between, or the folder has another ``index.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if (folder / _ABOUT).exists():
            found, _ = read_about(folder)  # whoever else wrote it will miss it
            if after not in (None, found):
                raise ValueError(
                    f"The index in {folder} was saved anew from elsewhere since it was read here, and saving would "
                    "undo that. Load it again, or save to another folder."
                )
        files = folder / f"v-{uuid.uuid4().hex[:12]}"
        files.mkdir()
        import_faiss().write_index(index, str(embeddings_file(files)))
        records.save(records_file(files))
        fresh = files / _ABOUT
        fresh.write_text(
            json.dumps({"format_version": FORMAT_VERSION, "version": files.name, **about}, indent=2) + "\n"
        )
        for file in files.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        fresh.replace(folder / _ABOUT)
        for old in folder.iterdir():  # an earlier save, or one that was killed
            if old != files and _is_save(old):
                shutil.rmtree(old, ignore_errors=True)  # Windows keeps what is mapped
    return files


def _is_save(folder: Path) -> bool:
    ours = {_ABOUT, _EMBEDDINGS, _RECORDS, f"{_RECORDS}-journal"}
    return re.fullmatch("v-[0-9a-f]{12}", folder.name) is not None and ours >= {file.name for file in folder.iterdir()}


def read_about(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Where the files of a saved index lie, and what was written about it.

    Raises:
        ValueError: If there is no index, or a newer version of this package wrote it.
    """
    if not (folder / _ABOUT).is_file():
        raise ValueError(f"{folder} holds no index: there is no {_ABOUT}. Was it saved there?")
    about = json.loads((folder / _ABOUT).read_text("utf8"))
    if not isinstance(about, dict) or not {"format_version", "version"} <= set(about):
        raise ValueError(f"{folder / _ABOUT} is not of a search index of slq-embed. Use another folder.")
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"The index in {folder} has format {about['format_version']}, but this slq-embed reads up to "
            f"{FORMAT_VERSION}. Upgrade slq-embed."
        )
    return folder / about["version"], about


def embeddings_file(files: Path) -> Path:
    """The FAISS index."""
    return files / _EMBEDDINGS


def records_file(files: Path) -> Path:
    """Ids and metadata."""
    return files / _RECORDS
