"""Prefixes kept for the next time: across epochs, captions, query sets and runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from slq_embed.store.budget import free_bytes, parse_bytes
from slq_embed.store.entries import Precision, StoreCounts
from slq_embed.store.folder import FolderEntries
from slq_embed.store.memory import MemoryEntries

Level = Literal["keys_values", "vision"]


class PrefixStore:
    """Keeps what the frozen backbone computed, in memory or in a folder.

    Attach it with ``model.prefix_store = PrefixStore(...)``. A prefix that does not fit the budget or the disk is computed again
    each time. Nothing is removed to make room: an epoch needs every prefix once, so the oldest is as useful as the newest.

    The key of a prefix covers backbone, precision, image processing, prompt and content. So a store never gives the
    prefix of another input, and models with other queries, losses, seeds and learning rates share it. Processes may share
    a folder: each prefix is computed by one of them.

    Args:
        folder: Where to keep prefixes, a file for each; without a folder, in memory.
        budget: Most bytes: a number or ``"40GB"``. The default is half of the free memory (shared out among the
            processes of a machine); for a folder, what it holds and four fifths of the free disk. Processes that fill a
            folder at once may pass the budget by what they write in some seconds.
        level: ``"keys_values"`` of all layers: only the queries remain to be run. ``"vision"``: the vision tower's
            features, several times smaller; the language model runs again, and texts are not kept.
        precision: How keys, values and features are kept: ``"exact"`` as computed, ``"bfloat16"``, or ``"int8"`` with
            a scale for each token and head.
        one_by_one: Whether each prefix is computed in a pass of its own. The first epoch is slower. In return, the bits of
            a prefix do not depend on its neighbours in a batch, and so not on whether one of them is forgotten later.

    Attributes:
        counts: What the store did in this process: ``reused``, ``computed``, ``over_budget`` and ``damaged`` prefixes.

    Raises:
        ValueError: If an argument is none of its choices.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        budget: int | str | None = None,
        level: Level = "keys_values",
        precision: Precision = "exact",
        one_by_one: bool = False,
    ) -> None:
        for name, value, choices in (("level", level, Level), ("precision", precision, Precision)):
            if value not in get_args(choices):
                raise ValueError(f"{name} is {value!r}, but one of {get_args(choices)} is needed.")
        self.folder = None if folder is None else Path(folder).absolute()  # the working folder may change
        self.level, self.precision, self.one_by_one = level, precision, one_by_one
        self.counts = StoreCounts()
        limit = free_bytes(self.folder) if budget is None else parse_bytes(budget)
        self._entries = (
            MemoryEntries(self.counts) if self.folder is None else FolderEntries(self.folder, self.counts)
        )  # for PrefixSource, which alone reads and writes
        self.budget = limit + self.nbytes if budget is None else limit

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {self.folder}"
        counts = self.counts
        return (
            f"PrefixStore({where}: {len(self)} prefixes, {self.nbytes / 1e9:.2f} of {self.budget / 1e9:.2f} GB; "
            f"{self.level}, {self.precision}; reused {counts.reused}, computed {counts.computed}, "
            f"over the budget {counts.over_budget}, damaged {counts.damaged})"
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        """True: an empty store is a store, and ``store or other`` keeps it."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._entries.nbytes

    @property
    def _tag(self) -> bytes:
        """The settings that are part of an entry's key."""
        return f"{self.level} {self.precision} {self.one_by_one}".encode()

    def forget(self, keys: Iterable[bytes]) -> int:
        """Remove prefixes for good; in a folder, their bytes are overwritten.

        In a folder, this also overwrites what killed processes have left. Do not forget while a model trains from the
        store. :meth:`slq_embed.SLQEncoder.forget` takes inputs instead of keys.

        Args:
            keys: The keys of the prefixes, 16 bytes each.

        Returns:
            How many were there.
        """
        return self._entries.remove(keys)

    def close(self) -> None:
        """Close files; the entries of a folder stay."""
        self._entries.close()
