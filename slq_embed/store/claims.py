"""Claims: which process computes which prefix, said in files that the processes of a shared folder read."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slq_embed.store.entries import KEY_BYTES, NO_SPACE

_INHERITED: list[FileLock | None] = []  # a forked child must not release the lock of its parent


class Claims:
    """The keys that this owner, one store in one process, computes, and those that others compute.

    An owner has a name of its own, a file of keys, and a lock file that it keeps locked. The system ends the lock with the
    process, so the claims of a killed process are free again.

    | file | content |
    | --- | --- |
    | ``<owner>.keys`` | the keys that the owner is computing, one after the other |
    | ``<owner>.lock`` | locked as long as the owner lives |
    | ``all.lock`` | locked while claims change |

    Args:
        folder: Where the files are; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._process, self._name = 0, ""
        self._alive: FileLock | None = None
        self._keys: set[bytes] = set()
        self._lock = threading.Lock()

    def owner(self) -> str:
        """The name of this store in this process. From the first call on, a lock shows the others that it lives."""
        with self._lock:
            if self._process != os.getpid():  # a new store, or a process that was forked
                _INHERITED.append(self._alive)
                self._process, self._name, self._keys = os.getpid(), uuid.uuid4().hex, set()
                self._alive = FileLock(self._file("lock"))
                self._alive.acquire()
            return self._name

    def add(self, keys: Iterable[bytes]) -> set[bytes]:
        """Claim keys; returns those that no other living owner has claimed."""
        self.owner()  # locks its file before any of its claims can be read
        with self._changing():
            claimed = set(keys) - self.elsewhere()
            self._keys |= claimed
            self._write()
        return claimed

    def release(self, keys: Iterable[bytes]) -> None:
        """End claims of this owner."""
        with self._changing():
            self._keys -= set(keys)
            self._write()

    def _write(self) -> None:
        try:
            self._file("keys").write_bytes(b"".join(self._keys))
        except OSError as error:
            if error.errno not in NO_SPACE:  # then others compute the same
                raise

    def elsewhere(self) -> set[bytes]:
        """The keys that other living owners have claimed."""
        keys: set[bytes] = set()
        for path in self.folder.glob("*.keys"):
            if path.stem == self._name:
                continue
            if self.lives(path.stem):
                with suppress(FileNotFoundError):
                    whole = path.read_bytes()
                    keys |= {whole[start : start + KEY_BYTES] for start in range(0, len(whole), KEY_BYTES)}
            else:
                path.unlink(missing_ok=True)
        return keys

    def lives(self, owner: str) -> bool:
        """Whether an owner's process lives and has not closed its store."""
        path = self.folder / f"{owner}.lock"
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        return False

    def close(self) -> None:
        """End this owner; the next claim has another."""
        if self._process == os.getpid() and self._alive is not None:
            self._alive.release()
            for kind in ("keys", "lock"):
                self._file(kind).unlink(missing_ok=True)
            self._process, self._name, self._alive = 0, "", None

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self._name}.{kind}"

    def _changing(self) -> AbstractContextManager[Any]:
        return FileLock(self.folder / "all.lock").acquire(poll_interval=0.002)
