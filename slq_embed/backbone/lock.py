"""The lock of a backbone: its modules and tokenizers are not safe for two threads at once."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel


class FairLock:
    """A reentrant lock that is fair: a waiting thread gets it before the thread that has just released it.

    An ``RLock`` may go back to the thread that has just released it. Then a query waits for many batches of a corpus that another
    thread embeds.
    """

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()
        self._owner, self._depth = 0, 0

    def __enter__(self) -> None:
        if self._owner != threading.get_ident():
            with self._next:
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            self._lock.release()


_LOCKS: WeakKeyDictionary[PreTrainedModel, FairLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(backbone: PreTrainedModel) -> FairLock:
    """The lock under which a backbone and its tokenizers are used; one for all that share the backbone."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(backbone, FairLock())
