"""The lock of a backbone: its modules and tokenizers are not safe for two threads at once."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(backbone: PreTrainedModel) -> threading.RLock:
    """The lock under which a backbone and its tokenizers are used; one for all that share the backbone."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(backbone, threading.RLock())
