"""An estimate before training: the bytes that kept prefixes take, and the time that they save."""

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

from slq_embed.encoder import SLQEncoder
from slq_embed.inputs.columns import LABELS, require_inputs
from slq_embed.store.budget import free_bytes, parse_bytes
from slq_embed.store.entries import Precision
from slq_embed.store.prefix_store import Level, PrefixStore
from slq_embed.training.read_rows import ReadRows


@dataclass(frozen=True)
class Option:
    """A way to keep prefixes.

    Args:
        level: What is kept; ``None`` for nothing.
        nbytes: Bytes of all prefixes.
        kept: Share of the prefixes that fits into the budget.
        first: Seconds of the first epoch.
        later: Seconds of each later epoch.
    """

    level: Level | None
    nbytes: int
    kept: float
    first: float
    later: float

    def seconds(self, epochs: int) -> float:
        """Seconds of a run of so many epochs."""
        return self.first + (epochs - 1) * self.later


@dataclass(frozen=True)
class Plan:
    """The ways to keep prefixes with their times, and the choice; its ``str`` is a table.

    Args:
        options: The ways; the first keeps nothing.
        epochs: Epochs of the run.
        folder: The folder of the store; ``None`` for memory.
        budget: The most bytes to keep.
        precision: The precision of the store.
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
        """Time without a store, divided by the time with the chosen one."""
        return self.options[0].seconds(self.epochs) / self.choice.seconds(self.epochs)

    def store(self) -> PrefixStore | None:
        """A store of the chosen level, for ``model.prefix_store``; ``None`` if no store is fastest."""
        if (level := self.choice.level) is None:
            return None
        return PrefixStore(self.folder, budget=self.budget, level=level, precision=self.precision)

    def __str__(self) -> str:
        chosen = self.choice
        size = f"{chosen.nbytes * chosen.kept / 1e9:.3g} GB" if chosen.level else "no store"
        lines = [f"{self.epochs} epochs: {size}, {self.speedup:.1f}x faster"]
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
        model: The encoder. Its own store, if it has one, does not change.
        dataset: The training set, or image-text pairs: rows with an image, a text or both in each column. Rows of one
            ``label`` count as rows with the same image.
        epochs: Epochs of the run.
        folder: As for :class:`PrefixStore`.
        budget: As for :class:`PrefixStore`.
        precision: As for :class:`PrefixStore`.
        levels: The levels to choose from; by default all that the backbone and the version of transformers allow.
        sample: Number of rows to measure, as one batch.

    Returns:
        The plan. Print it, and set ``model.prefix_store = plan.store()``.

    Raises:
        ValueError: If ``epochs`` or ``sample`` is below 1, the dataset is streamed or empty, or a column holds no inputs.
    """
    dataset = getattr(dataset, "dataset", dataset)
    for name, number in (("epochs", epochs), ("sample", sample)):
        if number < 1:
            raise ValueError(f"{name} is {number}, but at least 1 is needed.")
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise ValueError(
            "The dataset is streamed or empty, but the estimate needs its number of rows. Load it without streaming."
        )
    require_inputs(dataset)
    folder = None if folder is None else Path(folder)
    limit = free_bytes(folder) if budget is None else parse_bytes(budget)
    columns = [name for name in dataset.column_names if name not in LABELS]
    rows = len(dataset)
    different = np.arange(rows)
    if "label" in dataset.column_names:
        different = np.unique(dataset["label"], return_index=True)[1]
    spread = np.linspace(0, len(different) - 1, min(sample, len(different))).astype(int)
    chosen = [dataset[int(index)] for index in different[spread]]
    batches = {name: [row[name] for row in chosen] for name in columns}
    levels = _levels(model, batches) if levels is None else levels
    distinct = _distinct(dataset, columns)
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
                    bytes_before, entries_before = store.nbytes, len(store)
                    computed |= _pass(model, {name: batch}, store)
                    sizes[name] = (store.nbytes - bytes_before) / max(1, len(store) - entries_before)
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


def _levels(model: SLQEncoder, batches: Mapping[str, Sequence[Any]]) -> list[Level]:
    """The levels at which something of these inputs can be kept."""
    videos = any(row.videos for batch in batches.values() for row in model.transformer.reader.read(batch))
    levels = [level for level in get_args(Level) if level != "vision" or not videos]
    return [level for level in levels if model.transformer.store_refusal(level) is None]


def _pass(model: SLQEncoder, batches: Mapping[str, Sequence[Any]], store: PrefixStore | None) -> dict[str, float]:
    """Seconds for a row of each column in a training step, preprocessing included."""
    model.prefix_store = store
    was_training = model.training
    gradients = [(weight, weight.grad) for weight in model.parameters() if weight.requires_grad]
    for weight, _ in gradients:
        weight.grad = None  # backward would add to the gradient that is kept
    model.train()
    seconds = {}
    try:
        for name, batch in batches.items():
            started = time.perf_counter()
            features = batch_to_device(model.preprocess(batch), model.device)
            model(features)["sentence_embedding"].sum().backward()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = (time.perf_counter() - started) / len(batch)
    finally:
        for weight, gradient in gradients:
            weight.grad = gradient
        model.train(was_training)
    return seconds


def _distinct(dataset: Any, columns: Sequence[str]) -> dict[str, int]:
    """How many values each column has. A value that mined columns share counts in the first of them."""
    transform = (dataset.format["format_kwargs"] or {}).get("transform")
    sources = transform.sources if isinstance(transform, ReadRows) else {}
    seen: dict[int, set[int]] = {}
    counts = {}
    for name in columns:
        if name in sources:
            numbers = set(dataset.with_format(None)[name])
            already = seen.setdefault(id(sources[name]), set())
            counts[name] = len(numbers - already)
            already |= numbers
        elif "label" in dataset.column_names and type(dataset.features[name]).__name__ == "Image":
            counts[name] = len(set(dataset["label"]))
        elif getattr(dataset.features[name], "dtype", None) == "string":
            counts[name] = len(set(dataset[name]))
        else:
            counts[name] = len(dataset)
    return counts


def _existing(folder: Path | None) -> Path | None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
