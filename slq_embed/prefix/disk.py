"""Prefixes on disk: append-only shards, one writer each, and an index that processes share."""

from __future__ import annotations

import logging
import mmap
import os
import sqlite3
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30
"""A writer starts a new file when its last one is larger."""
_INHERITED: list[Any] = []  # what a forked process got from its parent: closing it would take the parent's locks
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB UNIQUE NOT NULL, shard TEXT NOT NULL,
    start INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL, length INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS removals (id INTEGER PRIMARY KEY AUTOINCREMENT);
"""


@dataclass(frozen=True)
class _Place:
    shard: str
    start: int
    size: int
    crc: int
    length: int


class DiskEntries:
    """Payloads by key in a folder that several processes may use at once.

    A payload is appended to a shard first and indexed after, in a transaction, so a killed writer leaves nothing that
    is half there. Whatever is read is checked against its CRC-32; what does not match counts as absent.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self.damaged = 0
        self._reset()
        self._open()

    def _reset(self) -> None:
        if self.__dict__.get("_pid", os.getpid()) != os.getpid():
            _INHERITED.append((self._database, self._alive))
        self._pid = os.getpid()
        self._database: sqlite3.Connection | None = None
        self._places: dict[bytes, _Place] = {}
        self._last_id, self._version, self._removed, self._bytes = 0, -1, 0, 0
        self._maps: dict[str, mmap.mmap] = {}
        self._verified: set[bytes] = set()
        self._owner, self._shard = uuid.uuid4().hex, ""
        self._alive: Any = None  # a file lock

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _open(self) -> sqlite3.Connection:
        if self._database is None or self._pid != os.getpid():  # a connection must not cross a fork
            self._reset()
            # One at a time: SQLite does not wait for a lock while it changes the journal mode.
            with FileLock(self.folder / "opening.lock"):
                self._database = self._connect_or_start_anew()
        return self._database

    def _connect_or_start_anew(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # no damage: locked, no permission, no space
                raise
            logger.warning("The index of the prefix store %s is damaged (%s): starting anew.", self.folder, error)
            for file in [*self.folder.glob("index.sqlite*"), *self.folder.glob("*.bin")]:
                file.unlink(missing_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self.folder / "index.sqlite", timeout=60, isolation_level=None, check_same_thread=False
        )
        try:
            database.executescript(_SCHEMA)
            if (found := database.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
        except sqlite3.DatabaseError:
            database.close()
            raise
        return database

    def _refresh(self) -> sqlite3.Connection:
        """Learn what other processes have added or removed."""
        database = self._open()
        version = database.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            removed = database.execute("SELECT COALESCE(MAX(id), 0) FROM removals").fetchone()[0]
            if removed != self._removed:
                self._removed, self._last_id, self._bytes = removed, 0, 0
                self._places.clear()
                self._verified.clear()
            columns = "SELECT id, key, shard, start, size, crc, length FROM entries WHERE id > ?"
            for number, key, *place in database.execute(columns, (self._last_id,)):
                self._places[key] = _Place(*place)
                self._bytes += self._places[key].size
                self._last_id = max(self._last_id, number)
        return database

    def __len__(self) -> int:
        with self._lock:
            self._refresh()
            return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        with self._lock:
            self._refresh()
            return self._bytes

    def lengths(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths of those that are there and, on this process's first touch, read back right."""
        with self._lock:
            self._refresh()
            found = {}
            for key in set(keys):
                if key in self._places and (key in self._verified or self._payload(key) is not None):
                    found[key] = self._places[key].length
            return found

    def read(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Payloads of those that are there and read back right."""
        with self._lock:
            self._refresh()
            found = ((key, self._payload(key)) for key in set(keys) if key in self._places)
            return {key: payload for key, payload in found if payload is not None}

    def _payload(self, key: bytes) -> bytes | None:
        place = self._places[key]
        end = place.start + place.size
        mapped = self._maps.get(place.shard)
        try:
            if mapped is None or len(mapped) < end:
                with (self.folder / place.shard).open("rb") as file:
                    self._maps[place.shard] = mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            payload = mapped[place.start : end]
        except (OSError, ValueError):  # gone, or empty
            payload = b""
        if len(payload) == place.size and _checksum(key, place.length, payload) == place.crc:
            self._verified.add(key)
            return payload
        logger.warning("A prefix in %s/%s is damaged and will be computed again.", self.folder, place.shard)
        self.damaged += 1
        self._delete([key])
        return None

    def _delete(self, keys: Iterable[bytes]) -> None:
        # These very payloads: another process may have replaced one already.
        gone = [(key, self._places[key].shard, self._places[key].start) for key in keys]
        with self._transaction() as database:
            database.executemany("DELETE FROM entries WHERE key = ? AND shard = ? AND start = ?", gone)
            database.execute("INSERT INTO removals DEFAULT VALUES")
        self._version = -1
        self._refresh()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing; its own commits leave data_version as it is, so the next refresh is told to look."""
        database = self._open()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise
        self._version = -1

    def write(self, payloads: Mapping[bytes, tuple[bytes, int]]) -> None:
        """Add payloads with their lengths; what is there already stays."""
        with self._lock:
            self._refresh()
            rows: list[tuple[Any, ...]] = []
            new = {key: value for key, value in payloads.items() if key not in self._places}
            path = self._writable_shard()
            with path.open("ab") as file:
                for key, (payload, length) in new.items():
                    start = file.tell()
                    file.write(payload)
                    rows.append((key, path.name, start, len(payload), _checksum(key, length, payload), length))
            with self._transaction() as database:
                database.executemany(
                    "INSERT OR IGNORE INTO entries (key, shard, start, size, crc, length) VALUES (?, ?, ?, ?, ?, ?)",
                    rows,
                )

    def _writable_shard(self) -> Path:
        path = self.folder / self._shard
        if not self._shard or path.stat().st_size > SHARD_BYTES:
            self._shard = f"{uuid.uuid4().hex}.bin"
            path = self.folder / self._shard
            path.touch()
        return path

    def remove(self, keys: Iterable[bytes]) -> int:
        """Remove payloads: first from the index, then every byte that no entry names is overwritten with zeros.

        That takes in what an earlier removal that was killed, or a killed writer, has left.
        """
        with self._lock:
            self._refresh()
            gone = [key for key in set(keys) if key in self._places]
            self._delete(gone)
            for path in self.folder.glob("*.bin"):
                named = sorted((p.start, p.start + p.size) for p in self._places.values() if p.shard == path.name)
                with path.open("r+b") as file:
                    end = 0
                    for start, stop in [*named, (path.stat().st_size, 0)]:
                        _overwrite(file, end, start)
                        end = stop
                    file.flush()
                    os.fsync(file.fileno())
            return len(gone)

    def claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """Say that this process computes these; returns those that no other living process has claimed."""
        with self._lock:
            self._open()
            if self._alive is None:
                self._alive = FileLock(self.folder / f"{self._owner}.lock")  # held while this process lives
                self._alive.acquire()
            mine = set()
            with self._transaction() as database:
                for key in set(keys):
                    row = database.execute("SELECT owner FROM claims WHERE key = ?", (key,)).fetchone()
                    if row is None or row[0] == self._owner or not self._lives(row[0]):
                        database.execute("INSERT OR REPLACE INTO claims VALUES (?, ?)", (key, self._owner))
                        mine.add(key)
            return mine

    def release(self, keys: Iterable[bytes]) -> None:
        """Take claims back."""
        with self._lock:
            rows = [(key, self._owner) for key in keys]
            self._open().executemany("DELETE FROM claims WHERE key = ? AND owner = ?", rows)

    def wait(self, keys: Iterable[bytes], poll: float = 0.01) -> None:
        """Wait until each is there, or claimed by no other living process."""
        waiting = set(keys)
        while waiting := waiting - set(self.lengths(waiting)):
            free = self.claim(waiting)
            self.release(free)
            waiting -= free
            if waiting:
                time.sleep(poll)

    def _lives(self, owner: str) -> bool:
        path = self.folder / f"{owner}.lock"
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        return False

    def close(self) -> None:
        """Close files; the entries stay."""
        with self._lock:
            if self._database is not None and self._pid == os.getpid():
                self._database.close()
            if self._alive is not None and self._pid == os.getpid():
                self._alive.release()
                (self.folder / f"{self._owner}.lock").unlink(missing_ok=True)
            for mapped in self._maps.values():
                mapped.close()
            self._reset()


def _overwrite(file: BinaryIO, start: int, stop: int) -> None:
    file.seek(start)
    while (left := stop - file.tell()) > 0:
        file.write(bytes(min(left, 1 << 20)))


def _checksum(key: bytes, length: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(key + length.to_bytes(8, "little")))
