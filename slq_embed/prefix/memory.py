"""Prefixes in memory: the entries of a store without a folder, and the rows of one training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from slq_embed.prefix.budget import free_bytes
from slq_embed.prefix.packing import Entry, entry_length, entry_nbytes
from slq_embed.prefix.passes import PrefixRow


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


class MemoryEntries:
    """Entries by key in this process's memory; :class:`slq_embed.prefix.disk.FolderEntries` has the same methods.

    Args:
        counts: Where to count what is read.
    """

    def __init__(self, counts: StoreCounts) -> None:
        self.counts = counts
        self.nbytes = 0
        self.full = False
        """Whether the last entries did not all fit. No prefix is packed while this is true."""
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def lengths(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths in tokens of the prefixes that are kept."""
        return {key: entry_length(self._entries[key]) for key in keys if key in self._entries}

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """The entries that are kept."""
        entries = {key: self._entries[key] for key in keys if key in self._entries}
        self.counts.reused += len(entries)
        return entries

    def write(self, entries: Mapping[bytes, Entry], budget: int) -> int:
        """Keep entries as long as all bytes stay within ``budget``; returns how many did not fit."""
        over = 0
        for key, entry in entries.items():
            size = entry_nbytes(entry)
            if key in self._entries:
                continue
            if self.nbytes + size > budget:
                over += 1
                continue
            self._entries[key] = entry
            self.nbytes += size
        self.full = over > 0
        return over

    def remove(self, keys: Iterable[bytes]) -> int:
        """Remove entries; returns how many were kept until now."""
        removed = [self._entries.pop(key) for key in set(keys) if key in self._entries]
        self.nbytes -= sum(map(entry_nbytes, removed))
        self.full = False
        return len(removed)

    def claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """The keys that this process is to compute: all, because no other process sees this memory."""
        return set(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        """Nothing: see :meth:`claim`."""

    def wait(self, keys: Iterable[bytes]) -> None:
        """Nothing: see :meth:`claim`."""

    def close(self) -> None:
        """Nothing: there are no files."""


class StepMemory:
    """Prefixes of one training step, for its second pass (GradCache) or for other query sets.

    Args:
        budget: Most bytes; by default half of what is free on the device of the first prefix.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.nbytes = 0
        self.rows: dict[bytes, PrefixRow] = {}
        self.used = False
        """Whether a pass with gradients has read these rows. The next pass without gradients is then another step."""

    def keep(self, rows: Mapping[bytes, PrefixRow]) -> None:
        """Keep rows until one does not fit the budget."""
        for key, row in rows.items():
            if self.budget is None:
                device = next(layer for layer in row.layers if layer)[0].device
                self.budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else free_bytes(None)
            if self.nbytes + row.nbytes > self.budget:
                return
            self.nbytes += row.nbytes
            self.rows[key] = row

    def clear(self) -> None:
        """Forget the step."""
        self.rows.clear()
        self.nbytes = 0
        self.used = False
