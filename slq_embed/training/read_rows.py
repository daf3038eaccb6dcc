"""Rows that are stored as row numbers, and read when a batch is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class ReadRows:
    """A transform of ``datasets``: columns hold row numbers, and are read where they point when a batch is read.

    An image that stands in many rows is so stored once.

    Args:
        sources: For each column with row numbers, the dataset of one column that they count.
    """

    def __init__(self, sources: Mapping[str, Dataset]) -> None:
        self.sources = dict(sources)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with values in place of row numbers."""
        return {name: self._read(name, values) if name in self.sources else values for name, values in batch.items()}

    def _read(self, name: str, rows: Any) -> list[Any]:
        (values,) = self.sources[name][list(rows)].values()
        return list(values)
