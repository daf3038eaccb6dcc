"""What the functions of this folder hand to the host's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slq_embed.inputs import Skipped, report

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class TrainingSet:
    """A training set and what was left out of it.

    Args:
        dataset: Rows for the trainer, in the order of the columns that its losses expect.
        skipped: Rows that were left out, by name, with their index in the source.
    """

    dataset: Dataset
    skipped: list[Skipped] = field(default_factory=list)

    def report(self) -> str:
        """One line that names every skipped row."""
        return report(self.skipped)


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
