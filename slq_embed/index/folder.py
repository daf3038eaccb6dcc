"""The folder of a saved index. Each save writes files of its own. Then, in one step, it replaces the file that names them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from slq_embed.index.table import EMBEDDINGS_FILE, RECORDS_FILE, IndexTable

FORMAT_VERSION = 1
_ABOUT = "index.json"


def write_folder(folder: Path, table: IndexTable, about: dict[str, Any], after: Path | None = None) -> Path:
    """Write an index. If the process is killed in the middle, the earlier save is still whole.

    Args:
        folder: The folder; created if it does not exist.
        table: The rows.
        about: Settings; :func:`read_about` returns them.
        after: The save that this one may replace, where the caller knows one. Another save must not be undone.

    Returns:
        The folder of this save's files.

    Raises:
        ValueError: If another save is there than ``after``, or the ``index.json`` there is not of an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if (folder / _ABOUT).exists():
            current, _ = read_about(folder)  # refuses a file of another program
            if after not in (None, current):
                raise ValueError(
                    f"The index in {folder} was saved anew from elsewhere since it was read here, and saving would "
                    "undo that. Load it again, or save to another folder."
                )
        files = folder / f"v-{uuid.uuid4().hex[:12]}"
        files.mkdir()
        try:
            table.write(files)
            about_file = files / _ABOUT
            content = {"format_version": FORMAT_VERSION, "version": files.name, **about}
            about_file.write_text(json.dumps(content, indent=2) + "\n", "utf8")
            for file in files.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        except BaseException:
            shutil.rmtree(files, ignore_errors=True)  # on a full disk, the next attempt needs the room
            raise
        about_file.replace(folder / _ABOUT)
        for old in folder.iterdir():  # an earlier save, or one that was killed
            if old != files and _is_save(old):
                shutil.rmtree(old, ignore_errors=True)  # Windows keeps what is mapped
    return files


def _is_save(folder: Path) -> bool:
    ours = {_ABOUT, EMBEDDINGS_FILE, RECORDS_FILE, f"{RECORDS_FILE}-journal"}
    return re.fullmatch("v-[0-9a-f]{12}", folder.name) is not None and ours >= {file.name for file in folder.iterdir()}


def read_folder(folder: Path, *, gpu: bool | None, mmap: bool) -> tuple[Path, dict[str, Any], IndexTable]:
    """Read a saved index; again, if another process replaces it meanwhile.

    Args:
        folder: The folder.
        gpu: As for :meth:`IndexTable.read`.
        mmap: As for :meth:`IndexTable.read`.

    Returns:
        The folder of the save's files, the settings, and the rows.

    Raises:
        ValueError: If there is no index, a file is damaged, or a newer version of this package wrote it.
    """
    while True:
        files, about = read_about(folder)
        try:
            return files, about, IndexTable.read(files, about, gpu=gpu, mmap=mmap)
        except (OSError, RuntimeError, sqlite3.Error, KeyError) as error:
            if read_about(folder)[0] == files:
                raise ValueError(
                    f"The index in {folder} is damaged ({type(error).__name__}: {error}). Restore {files.name} and "
                    f"{_ABOUT} from a copy, or build the index anew."
                ) from error


def read_about(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a saved index's files, and its settings.

    Raises:
        ValueError: If there is no index, or a newer version of this package wrote it.
    """
    if not (folder / _ABOUT).is_file():
        raise ValueError(f"{folder} holds no index: there is no {_ABOUT}. Check the path.")
    try:
        about = json.loads((folder / _ABOUT).read_text("utf8"))
        version, name = about["format_version"], about["version"]
        if not isinstance(version, int) or not isinstance(name, str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _ABOUT} is not of a search index of slq-embed. Use another folder.") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The index in {folder} has format {version}, but this slq-embed reads up to {FORMAT_VERSION}. "
            "Upgrade slq-embed."
        )
    return folder / name, about
