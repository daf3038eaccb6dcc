"""What keeping prefixes would take and save, measured on a sample before the run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from sentence_transformers.util import batch_to_device

from slq_embed.backbone.families import decoder_of
from slq_embed.encoder import SLQEncoder
from slq_embed.prefix.budget import free_bytes, parse_bytes
from slq_embed.prefix.packing import Precision
from slq_embed.prefix.store import Level, PrefixStore
from slq_embed.prefix.vision import takes_vision_features

LABELS = ("label", "labels", "score", "scores")  # columns that the host does not encode


@dataclass(frozen=True)
class Option:
    """A way to keep prefixes.

    Args:
        level: What is kept; ``None`` for nothing.
        nbytes: What all prefixes would take, in bytes.
        kept: Share of the prefixes that fits the budget.
        first: Seconds of the first epoch.
        later: Seconds of each later one.
    """

    level: Level | None
    nbytes: int
    kept: float
    first: float
    later: float

    def seconds(self, epochs: int) -> float:
        """Of a run."""
        return self.first + (epochs - 1) * self.later


@dataclass(frozen=True)
class Plan:
    """What was measured, and the choice; its ``str`` says both.

    Args:
        options: Keeping nothing first.
        epochs: Of the run.
        folder: Where prefixes would be kept; ``None`` for memory.
        budget: Most bytes.
        precision: Of what is kept.
    """

    options: tuple[Option, ...]
    epochs: int
    folder: Path | None
    budget: int
    precision: Precision

    @property
    def choice(self) -> Option:
        """The option that takes the least time over all epochs."""
        return min(self.options, key=lambda option: option.seconds(self.epochs))

    @property
    def speedup(self) -> float:
        """Time without a store over time with the chosen one."""
        return self.options[0].seconds(self.epochs) / self.choice.seconds(self.epochs)

    def store(self) -> PrefixStore | None:
        """The chosen store, for ``model.prefix_store``; ``None`` if keeping nothing is fastest."""
        if (level := self.choice.level) is None:
            return None
        return PrefixStore(self.folder, budget=self.budget, level=level, precision=self.precision)

    def __str__(self) -> str:
        chosen = self.choice
        taken = f"{chosen.nbytes * chosen.kept / 1e9:.3g} GB" if chosen.level else "no store"
        lines = [f"{self.epochs} epochs: {taken}, {self.speedup:.1f}x faster"]
        for option in self.options:
            mark = "->" if option is chosen else "  "
            lines.append(
                f"{mark} {option.level or 'nothing':>11}: {option.nbytes / 1e9:8.3g} GB in all, {option.kept:4.0%} kept, "
                f"first epoch {option.first:.3g} s, later {option.later:.3g} s, run {option.seconds(self.epochs):.3g} s"
            )
        where = "memory" if self.folder is None else str(self.folder)
        lines.append(f"   budget {self.budget / 1e9:.3g} GB in {where}; precision {self.precision}")
        return "\n".join(lines)


def plan_prefixes(
    model: SLQEncoder,
    dataset: Any,
    epochs: int,
    *,
    folder: str | Path | None = None,
    budget: int | str | None = None,
    precision: Precision = "exact",
    levels: Sequence[Level] | None = None,
    sample: int = 16,
) -> Plan:
    """Estimate bytes and seconds of a training run with and without a prefix store, and choose.

    Args:
        model: The encoder; its store, if it has one, is left alone.
        dataset: What it will be trained on: rows with an image, a text or both in each column. With a ``label``
            column, rows of one label are taken to have the same image.
        epochs: Of the run.
        folder: As for :class:`PrefixStore`.
        budget: As for :class:`PrefixStore`.
        precision: As for :class:`PrefixStore`.
        levels: What may be chosen; by default every level that the backbone and transformers' version allow.
        sample: Rows that are measured, a batch.

    Returns:
        The plan: print it, and give ``model.prefix_store`` its :meth:`Plan.store`.
    """
    decoder = decoder_of(model.backbone)
    if levels is None:
        levels = [level for level in get_args(Level) if level != "vision" or takes_vision_features(decoder)]
    folder = None if folder is None else Path(folder)
    limit = free_bytes(folder) if budget is None else parse_bytes(budget)
    columns = [name for name in dataset.column_names if name not in LABELS]
    rows = len(dataset)
    different = np.arange(rows)
    if "label" in dataset.column_names:
        different = np.unique(dataset["label"], return_index=True)[1]
    spread = np.linspace(0, len(different) - 1, min(sample, len(different))).astype(int)
    chosen = [dataset[int(place)] for place in different[spread]]
    batches = {name: [row[name] for row in chosen] for name in columns}
    distinct = {name: _distinct(dataset, name) for name in columns}
    before = model.prefix_store
    options = []
    try:
        _pass(model, batches, None)  # the first pass of a process is slower
        plain = _pass(model, batches, None)
        alone = sum(plain.values()) * rows
        options.append(Option(None, 0, 0.0, alone, alone))
        for level in levels:
            with tempfile.TemporaryDirectory(dir=_existing(folder)) as temporary:
                store = PrefixStore(None if folder is None else temporary, level=level, precision=precision)
                sizes: dict[str, float] = {}
                computed: dict[str, float] = {}
                for name, batch in batches.items():
                    taken = store.nbytes
                    computed |= _pass(model, {name: batch}, store)
                    sizes[name] = (store.nbytes - taken) / len(chosen)
                read = _pass(model, batches, store)
                store.close()
            nbytes = int(sum(sizes[name] * distinct[name] for name in columns))
            kept = min(1.0, limit / nbytes) if nbytes else 1.0
            later = sum(rows * (kept * read[name] + (1 - kept) * plain[name]) for name in columns)
            first = later + sum(distinct[name] * kept * (computed[name] - read[name]) for name in columns)
            options.append(Option(level, nbytes, kept, first, later))
    finally:
        model.prefix_store = before
    return Plan(tuple(options), epochs, folder, limit, precision)


def _pass(model: SLQEncoder, batches: Mapping[str, Sequence[Any]], store: PrefixStore | None) -> dict[str, float]:
    """Seconds a row of a training step on each column, preprocessing included."""
    model.prefix_store = store
    was_training, gradient = model.training, model.queries.grad
    model.train()
    taken = {}
    for name, batch in batches.items():
        started = time.perf_counter()
        features = batch_to_device(model.preprocess(batch), model.device)
        model(features)["sentence_embedding"].sum().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        taken[name] = (time.perf_counter() - started) / len(batch)
    model.queries.grad = gradient
    model.train(was_training)
    return taken


def _distinct(dataset: Any, column: str) -> int:
    if "label" in dataset.column_names and type(dataset.features[column]).__name__ == "Image":
        return len(set(dataset["label"]))
    if getattr(dataset.features[column], "dtype", None) == "string":
        return len(set(dataset[column]))
    return len(dataset)


def _existing(folder: Path | None) -> Path | None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
