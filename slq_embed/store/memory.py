"""Entries in memory: a store without a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slq_embed.store.entries import Entry, StoreCounts, entry_length, entry_nbytes


class MemoryEntries:
    """Entries by key in this process's memory; :class:`slq_embed.store.folder.FolderEntries` has the same methods.

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
