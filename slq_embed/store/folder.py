"""Prefixes in a folder that processes share: a safetensors file for each."""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from slq_embed.store.claims import Claims
from slq_embed.store.entries import NO_SPACE, Entry, StoreCounts, entry_length

logger = logging.getLogger(__name__)

ENTRY, UNFINISHED = ".safetensors", ".part"
CHECKED_LIMIT = 4096
"""Most entries that wait, open and checked, for their :meth:`FolderEntries.read`."""


class FolderEntries:
    """Entries by key in a folder that several processes may use at once.

    An entry is written under another name and renamed once it is whole, so a killed writer leaves no half entry. Each
    file carries a CRC-32 of its tensors; an entry that does not match it is removed. The folder holds

    | file | content |
    | --- | --- |
    | ``3f/3f0a...safetensors`` | an entry; the first byte of the key names the subfolder |
    | ``3f/3f0a...-<owner>-....part`` | an entry that an owner, one store in one process, is writing or erasing |
    | ``claims/`` | which process computes which entry: :class:`slq_embed.store.claims.Claims` |

    Args:
        folder: Created if it does not exist.
        counts: Where to count what is read and what is damaged.
    """

    def __init__(self, folder: Path, counts: StoreCounts) -> None:
        self.folder, self.counts = folder, counts
        self.full = False
        """Whether the last entries did not all fit. No prefix is packed while this is true."""
        folder.mkdir(parents=True, exist_ok=True)
        self._claims = Claims(folder / "claims")
        self._checked: OrderedDict[bytes, tuple[int, Entry]] = OrderedDict()
        self._bytes, self._next_scan = 0, float("-inf")

    def __reduce__(self) -> tuple[type[FolderEntries], tuple[Path, StoreCounts]]:
        return FolderEntries, (self.folder, self.counts)  # another process has claims of its own

    def __len__(self) -> int:
        return sum(1 for _ in self._files(ENTRY))

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        started = time.monotonic()
        self._bytes = sum(map(_size, self._files(ENTRY)))
        self._next_scan = started + 20 * (time.monotonic() - started)
        return self._bytes

    def _path(self, key: bytes) -> Path:
        return self.folder / key[:1].hex() / f"{key.hex()}{ENTRY}"

    def _files(self, suffix: str) -> Iterator[os.DirEntry[str]]:
        for number in range(256):
            with suppress(FileNotFoundError), os.scandir(self.folder / f"{number:02x}") as files:
                yield from (file for file in files if file.name.endswith(suffix))

    def lengths(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths in tokens of the prefixes that are kept and undamaged.

        The entries stay open for the next :meth:`read`, so that each is opened and checked once.
        """
        lengths = {}
        for key in dict.fromkeys(keys):
            if (checked := self._open(key)) is not None:
                self._checked[key] = checked
                lengths[key] = entry_length(checked[1])
        while len(self._checked) > CHECKED_LIMIT:
            self._checked.popitem(last=False)
        return lengths

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """The entries that are kept and undamaged. Their tensors are mapped from the files."""
        entries = {}
        for key in dict.fromkeys(keys):
            checked = self._checked.pop(key, None)
            if checked is None or checked[0] != _inode(self._path(key)):  # forgotten since, and maybe written again
                checked = self._open(key)
            if checked is not None:
                entries[key] = checked[1]
        self.counts.reused += len(entries)
        return entries

    def _open(self, key: bytes) -> tuple[int, Entry] | None:
        """The inode and the tensors of an entry, if it is there and undamaged."""
        path = self._path(key)
        if (inode := _inode(path)) is None:
            return None
        entry: Entry = {}
        checksum = None
        try:
            with safe_open(path, "pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
                checksum = (file.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except SafetensorError:
            pass
        if checksum == _checksum(key, entry):
            return inode, entry
        logger.warning("The prefix in %s is damaged. It will be computed again.", path)
        self.counts.damaged += 1
        entry.clear()
        self._erase([path])
        return None

    def write(self, entries: Mapping[bytes, Entry], budget: int) -> int:
        """Keep entries as long as all bytes stay within ``budget`` and the disk has room; returns how many did not fit."""
        over = 0
        # A scan takes a twentieth of the time at most; what this store has written since the last one is known.
        left = budget - (self.nbytes if time.monotonic() >= self._next_scan else self._bytes)
        for key, entry in entries.items():
            path = self._path(key)
            if path.exists():
                continue
            payload = safetensors.torch.save(entry, {"crc32": _checksum(key, entry)})
            if len(payload) > left:
                over += 1
                continue
            try:
                self._write_file(path, payload)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                logger.warning("No space is left in %s: prefixes that are not kept are computed again.", self.folder)
                over, left = over + 1, 0
                continue
            left -= len(payload)
            self._bytes += len(payload)
        self.full = over > 0
        return over

    def _write_file(self, path: Path, payload: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        unfinished = self._unfinished(path)
        try:
            unfinished.write_bytes(payload)
            unfinished.replace(path)
        except BaseException:
            _overwrite_and_remove([unfinished])
            raise

    def _unfinished(self, path: Path) -> Path:
        return path.with_name(f"{path.stem}-{self._claims.owner()}-{threading.get_ident()}{UNFINISHED}")

    def remove(self, keys: Iterable[bytes]) -> int:
        """Overwrite entries with zeros and remove them; returns how many were there.

        What killed processes have left unfinished is overwritten and removed too.
        """
        for key in (keys := set(keys)):
            self._checked.pop(key, None)
        removed = self._erase([self._path(key) for key in keys])
        _overwrite_and_remove(
            Path(file.path) for file in self._files(UNFINISHED) if not self._claims.lives(owner=file.name.split("-")[1])
        )
        self.full, self._next_scan = False, float("-inf")
        return removed

    def _erase(self, paths: Iterable[Path]) -> int:
        renamed = []
        for path in paths:
            # No reader takes the zeros for an entry, and what a killed process has begun, the next one finishes.
            with suppress(FileNotFoundError):
                renamed.append(path.replace(self._unfinished(path)))
        _overwrite_and_remove(renamed)
        return len(renamed)

    def claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """Say that this process computes these; returns those that no other living process has claimed."""
        return self._claims.add(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        """End what :meth:`claim` began, whether or not the prefixes were kept."""
        self._claims.release(keys)

    def wait(self, keys: Iterable[bytes], poll_s: float = 0.01) -> None:
        """Wait until each prefix is kept, or claimed by no other living process."""
        missing = set(keys)
        while missing := {key for key in missing & self._claims.elsewhere() if not self._path(key).exists()}:
            time.sleep(poll_s)

    def close(self) -> None:
        """Close files; the entries stay."""
        self._checked.clear()
        self._claims.close()


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _size(file: os.DirEntry[str]) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # another process has just removed it
        return 0


def _overwrite_and_remove(paths: Iterable[Path]) -> None:
    paths = list(paths)
    for path in paths:
        with suppress(FileNotFoundError), path.open("r+b") as file:
            left = path.stat().st_size
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 20)))
    for path in paths:  # in a second round: the first fsync brings most of the others to the disk as well
        with suppress(FileNotFoundError):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
            path.unlink()


def _checksum(key: bytes, entry: Entry) -> str:
    """CRC-32 of a key and of names, dtypes, shapes and bytes of the tensors, in hexadecimal."""
    value = zlib.crc32(key)
    for name, part in sorted(entry.items()):
        value = zlib.crc32(f"{name} {part.dtype} {tuple(part.shape)}".encode(), value)
        value = zlib.crc32(part.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
