"""An entry of a store, and what a store counts."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

KEY_BYTES = 16
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk. They end no run: a prefix that cannot be kept is computed again."""
Precision = Literal["exact", "bfloat16", "int8"]
Entry = dict[str, Tensor]
"""A packed prefix. Keys and values: ``states`` ``(layers, 2, heads, seq, head_dim)`` and ``position`` ``(2,)`` int64, the
last position and the number of axes. Where not every layer has keys, ``has_keys`` ``(layers,)`` bool says which; states of fixed
size are under ``fixed.`` and their name, always exact. Vision features: what :func:`slq_embed.prefix.vision.run_vision` gives for a row.
With int8, each tensor of states has its scales beside it, under its name and ``.scale``."""


@dataclass
class StoreCounts:
    """What a store did in this process.

    Args:
        reused: Prefixes that were read back.
        computed: Prefixes that the backbone had to run for.
        over_budget: Computed prefixes that were not kept, for lack of space.
        damaged: Prefixes of a folder that did not read back right and were removed.
    """

    reused: int = 0
    computed: int = 0
    over_budget: int = 0
    damaged: int = 0


def entry_length(entry: Entry) -> int:
    """How many tokens a packed prefix has."""
    return int(entry["states"].shape[-2]) if "states" in entry else len(entry["input_ids"])


def entry_nbytes(entry: Entry) -> int:
    """Bytes of a packed prefix's tensors."""
    return sum(part.nbytes for part in entry.values())
