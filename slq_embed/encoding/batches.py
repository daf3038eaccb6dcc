"""From inputs to features: files are read ahead, batches are of like size, workers decode beside a GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from slq_embed.backbone.lock import FairLock
from slq_embed.inputs.images import shortened
from slq_embed.inputs.pdf import PdfPage
from slq_embed.inputs.rows import Row, Skipped, read_row
from slq_embed.prefix.features import Features

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder

logger = logging.getLogger(__name__)

WINDOW = 32
"""Batches that are sorted by size together: more pad less, fewer hold less in memory."""
WINDOW_BYTES = 256 << 20
"""Bytes of images after which a window ends: of files, or of pixels that are in memory."""
_FILES_AT_ONCE = 8  # files that are read at the same time: a network disk answers late
_SHARED_MEMORY = 2 << 30

Batch = list[tuple[int, Row | Skipped]]


def _read(item: tuple[int, Any]) -> tuple[int, Row | Skipped]:
    index, value = item
    try:
        row = read_row(value)
        row.read_files()
    except ValueError as error:
        return index, Skipped(input_name(index, value), str(error), index)
    return index, row


def input_name(index: int, value: Any) -> str:
    """How an error names an input: by its index, and its file or the start of its text."""
    if isinstance(value, Row):
        value = value.media[0].source if value.media else value.text
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("image", "images", "video", "path") if value.get(key) is not None), None)
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, PdfPage):
        value = Path(str(value))
    if not isinstance(value, Path | str):
        return f"input {index}"
    return f"input {index} ({shortened(value)})".encode(errors="backslashreplace").decode()  # so that it can be printed


def sorted_windows(inputs: Iterable[tuple[int, Any]], batch_size: int) -> Iterator[list[Batch]]:
    """Read inputs a window at a time, each file once, and sort each window into batches of like size.

    Args:
        inputs: Inputs with their indices, any number of them.
        batch_size: Inputs a batch.

    Yields:
        The batches of a window, largest inputs first. An input that cannot be read is a :class:`Skipped`.
    """
    waiting = iter(inputs)
    window: Batch = []
    nbytes = 0
    while part := list(islice(waiting, batch_size)):
        if all(isinstance(value, str) for _, value in part):
            window += map(_read, part)
        else:
            with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                window += pool.map(_read, part)
        nbytes += sum(row.nbytes for _, row in window[-len(part) :] if isinstance(row, Row))
        if len(window) >= WINDOW * batch_size or nbytes > WINDOW_BYTES:
            yield _sorted(window, batch_size)
            window, nbytes = [], 0
    if window:
        yield _sorted(window, batch_size)


def _sorted(window: Batch, batch_size: int) -> list[Batch]:
    """The batches of a window, which is emptied: an image that was decoded lives as long as its row."""
    window.sort(key=lambda item: -item[1].size if isinstance(item[1], Row) else 0.0)
    batches = [window[start : start + batch_size] for start in range(0, len(window), batch_size)]
    window.clear()
    return batches


def _taken(batches: list[Batch]) -> Iterator[Batch]:
    while batches:
        yield batches.pop(0)


@dataclass
class FeatureDataset(Dataset[Any]):
    """Turns batches of inputs into features; runs in workers.

    Args:
        model: The encoder.
        prompt: A system message.
        processing_kwargs: For the model's ``preprocess``.
    """

    model: SLQEncoder
    prompt: str | None
    processing_kwargs: Mapping[str, Any] | None

    def __getitem__(self, batch: Batch) -> tuple[list[int], Features, list[Skipped]]:
        """Indices, features and what cannot be read."""
        skipped = [row for _, row in batch if isinstance(row, Skipped)]
        rows = [(index, row) for index, row in batch if isinstance(row, Row)]
        try:
            features = self._preprocess([row for _, row in rows])
        except (ValueError, OSError, RuntimeError):  # which of them was it?
            readable = []
            for index, row in rows:
                try:
                    self._preprocess([row])
                    readable.append((index, row))
                except (ValueError, OSError, RuntimeError) as error:
                    reason = str(error).removeprefix("Input 0 of 1: ")
                    skipped.append(Skipped(input_name(index, row), reason, index))
            rows, features = readable, self._preprocess([row for _, row in readable])
        return [index for index, _ in rows], features, skipped

    def _preprocess(self, rows: list[Row]) -> Features:
        keyed = self.model.prefix_store is not None
        return self.model.transformer.preprocess(
            rows, self.prompt, keyed=keyed, processing_kwargs=self.processing_kwargs
        )


@cache
def default_workers(kind: str) -> int:
    """Processes that read ahead: up to 8 beside a GPU; none beside a CPU that computes, which they would slow down.

    Args:
        kind: Type of the device.
    """
    shared = Path("/dev/shm")
    if kind == "cpu" or sys.platform != "linux" or not shared.is_dir():
        return 0
    if shutil.disk_usage(shared).free < _SHARED_MEMORY:
        logger.warning("Images are read in the main process: workers need 2 GB in %s (docker: --shm-size).", shared)
        return 0
    return min(8, max(0, len(os.sched_getaffinity(0)) - 1))


def _start_worker(number: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def read_features(
    dataset: FeatureDataset, inputs: Iterable[tuple[int, Any]], batch_size: int, lock: FairLock
) -> Iterator[tuple[list[int], Features, list[Skipped]]]:
    """Features of all inputs, batch by batch.

    Args:
        dataset: Makes them.
        inputs: Inputs with their indices. They are awaited without the lock.
        batch_size: Inputs a batch.
        lock: Held while the model's tokenizer is used.

    Yields:
        Indices of a batch, its features, and what cannot be read.
    """
    device = dataset.model.device
    workers = dataset.model.num_workers
    if multiprocessing.current_process().daemon:  # may have no children, as in the host's start_multi_process_pool
        workers = 0
    elif workers is None:
        workers = default_workers(device.type)
    windows = sorted_windows(inputs, batch_size)
    first = next(windows, [])
    # A worker pays for images and videos only, and one batch leaves nothing to read ahead.
    workers = min(workers, sum(any(getattr(row, "media", ()) for _, row in batch) for batch in first) - 1)
    batches = chain.from_iterable(map(_taken, chain([first], windows)))
    if workers < 1:
        for batch in batches:
            with lock:
                item = dataset[batch]
            yield item
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        collate_fn=lambda item: item,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        multiprocessing_context="fork",
    )
    with lock:  # a tokenizer in use cannot be forked
        items = iter(loader)
    yield from items
