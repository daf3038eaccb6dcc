"""Budgets in bytes: what a store may take by default, and how a caller spells a number of bytes."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def free_bytes(folder: Path | None) -> int:
    """The budget of a store for which the caller names none.

    Args:
        folder: Where the store keeps prefixes; ``None`` for memory. The folder need not exist.

    Returns:
        Half of the free memory, shared out among the processes of this machine, or four fifths of the free disk.
    """
    if folder is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun and accelerate
        return max(0, min(psutil.virtual_memory().available, _free_in_container()) // (2 * processes))
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free * 4 // 5


def _free_in_container() -> int:
    """What the container may still take, without file caches, which the system gives back; else more than any machine has."""
    try:
        limit, current = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        caches = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return sys.maxsize
    return limit - current + (int(caches[1]) if caches else 0)


def parse_bytes(size: int | str) -> int:
    """A number of bytes.

    Args:
        size: A number, or a string such as ``"40GB"``.

    Raises:
        ValueError: If ``size`` is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise ValueError(f'budget is {size!r}, but a number of bytes or a string such as "40GB" is needed.')
    return int(float(match[1]) * _UNITS[match[2].upper()])
