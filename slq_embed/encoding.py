"""Encoding as a stream: inputs are read ahead, batches are of like size, results come as they are ready."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from sentence_transformers.util import truncate_embeddings
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.autonotebook import tqdm

from slq_embed.chat_template import replace_queries
from slq_embed.inputs import Skipped, read_row, shortened
from slq_embed.prefix import Prefix

if TYPE_CHECKING:
    from slq_embed.latent_query_encoder import LatentQueryEncoder

logger = logging.getLogger(__name__)

WINDOW = 32
"""Batches that are sorted by size together: more pad less, fewer hold less in memory."""
_SHARED_MEMORY = 2 << 30
_PIXELS_PER_TOKEN, _CHARACTERS_PER_TOKEN = 1024, 4

Batch = list[tuple[int, Any]]


@dataclass
class Encoded:
    """Some results of a stream.

    Args:
        places: Which inputs they are of, counted from 0.
        embeddings: ``(len(places), H)``, on the model's device; one for each query set, by name.
        skipped: Inputs of the batch that could not be read.
    """

    places: list[int]
    embeddings: dict[str, Tensor]
    skipped: list[Skipped] = field(default_factory=list)


@dataclass
class Reader(Dataset[Any]):
    """Turns batches of inputs into features; runs in workers.

    Args:
        model: The encoder.
        prompt: A system message.
        options: For the model's ``preprocess``.
    """

    model: LatentQueryEncoder
    prompt: str | None
    options: Mapping[str, Any]

    def __getitem__(self, batch: Batch) -> tuple[list[int], dict[str, Any], list[Skipped]]:
        skipped: list[Skipped] = []
        try:
            features = self._preprocess(batch)
        except (ValueError, OSError, RuntimeError):  # which of them was it?
            good: Batch = []
            for place, value in batch:
                try:
                    self._preprocess([(place, value)])
                    good.append((place, value))
                except (ValueError, OSError, RuntimeError) as error:
                    reason = str(error).removeprefix("Input 0 of 1: ")
                    skipped.append(Skipped(_name(place, value), reason, place))
            if not skipped:
                raise
            batch, features = good, self._preprocess(good)
        return [place for place, _ in batch], features, skipped

    def _preprocess(self, batch: Batch) -> dict[str, Any]:
        keyed = self.model.prefix_store is not None
        module: Any = self.model[0]
        features: dict[str, Any] = module.preprocess([v for _, v in batch], self.prompt, keyed=keyed, **self.options)
        return features


def _name(place: int, value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("image", value.get("path"))
    if not isinstance(value, Path | str):
        return f"input {place}"
    return f"input {place} ({shortened(value)})".encode(errors="backslashreplace").decode()  # so that it can be printed


def input_size(value: Any) -> float:
    """About how many tokens an input has; reads no more of an image file than its header."""
    try:
        row = read_row(value)
        size = len(row.text or "") / _CHARACTERS_PER_TOKEN
        source = row.source
        if isinstance(source, Mapping):
            source = source.get("path")
        if isinstance(source, str | Path):
            with Image.open(source) as image:
                width, height = image.size
        else:
            width, height = getattr(source, "size", (0, 0))
        return size + width * height / _PIXELS_PER_TOKEN
    except (ValueError, OSError, SyntaxError, TypeError, Image.DecompressionBombError):
        return 0.0


def sorted_batches(inputs: Iterable[tuple[int, Any]], batch_size: int) -> Iterator[Batch]:
    """Batches of like size, largest first in each window; never holds more than a window."""
    waiting = iter(inputs)
    while window := list(islice(waiting, WINDOW * batch_size)):
        window.sort(key=lambda item: -input_size(item[1]))
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


@cache
def default_workers(kind: str, daemon: bool) -> int:
    """Processes that read ahead: up to 8 beside a GPU; none beside a CPU that computes, which they would slow down.

    Args:
        kind: Type of the device.
        daemon: Whether this process may have no children, as in ``SentenceTransformer.start_multi_process_pool``.
    """
    shared = Path("/dev/shm")
    if kind == "cpu" or daemon or sys.platform != "linux" or not shared.is_dir():
        return 0
    if shutil.disk_usage(shared).free < _SHARED_MEMORY:
        logger.warning("Images are read in the main process: workers need 2 GB in %s (docker: --shm-size).", shared)
        return 0
    return min(8, max(0, len(os.sched_getaffinity(0)) - 1))


def _as_it_is(value: Any) -> Any:
    return value


def _start_worker(number: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def stream(
    model: LatentQueryEncoder,
    inputs: Iterable[tuple[int, Any]],
    *,
    batch_size: int,
    prompt: str | None,
    strict: bool,
    truncate_dim: int | None = None,
    query_sets: Mapping[str, LatentQueryEncoder] | None = None,
    most_workers: int | None = None,
    **options: Any,
) -> Iterator[Encoded]:
    """Encode inputs as they come.

    Args:
        model: The encoder.
        inputs: Inputs with their places, any number of them.
        batch_size: Inputs a batch.
        prompt: A system message.
        strict: Whether an input that cannot be read is an error, or skipped and listed.
        truncate_dim: How much of the model's embeddings to give; query sets have their own.
        query_sets: Encoders on the same backbone that read their inputs alike; by default the model alone, under
            the name ``""``.
        most_workers: Where more would have nothing to do.
        **options: For the model's ``preprocess``.

    Raises:
        ValueError: If ``strict`` and an input cannot be read, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but at least 1 is needed.")
    device = model.device
    workers = model.num_workers
    if workers is None:
        workers = default_workers(device.type, multiprocessing.current_process().daemon)
    workers = workers if most_workers is None else min(workers, most_workers)
    loader = DataLoader(
        Reader(model, prompt, options),
        batch_size=None,
        sampler=sorted_batches(inputs, batch_size),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    model.eval()
    for places, features, skipped in loader:
        if skipped and strict:
            name = skipped[0].name
            raise ValueError(f"{name[0].upper()}{name[1:]}: {skipped[0].reason}")
        found: dict[str, Tensor] = {}
        if places:
            with torch.inference_mode():
                features = {
                    key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                    for key, value in features.items()
                }
                if query_sets is None:
                    found[""] = _truncated(model(features)["sentence_embedding"], truncate_dim)
                else:
                    first: Any = model[0]
                    prefix = first.prefix(features)
                    for name, other in query_sets.items():
                        found[name] = _after_prefix(other, prefix)
        yield Encoded(places, found, skipped)


def _after_prefix(model: LatentQueryEncoder, prefix: Prefix) -> Tensor:
    first: Any = model[0]
    features = {"token_embeddings": first.query_states(prefix).float()}
    for module in list(model)[1:]:
        features = module(features)
    return _truncated(features["sentence_embedding"], model.truncate_dim)


def _truncated(embeddings: Tensor, truncate_dim: int | None) -> Tensor:
    return embeddings if truncate_dim is None else truncate_embeddings(embeddings, truncate_dim)


def check_query_sets(model: LatentQueryEncoder, query_sets: Mapping[str, LatentQueryEncoder]) -> None:
    """Refuse query sets that would see another prefix.

    Raises:
        ValueError: With the name of the set and what differs.
    """
    for name, other in query_sets.items():
        reads = {
            "another backbone; load it with SLQEncoder(folder, backbone=model.backbone)": other.backbone
            is model.backbone,
            "other instructions": other.slq.instructions == model.slq.instructions,
            "another max_text_chars": other.slq.max_text_chars == model.slq.max_text_chars,
            "other image_kwargs": other.slq.image_kwargs == model.slq.image_kwargs,
            "another chat template": _read_alike(model, other),
            "other image sizes": other.processor.image_processor.to_dict() == model.processor.image_processor.to_dict(),
        }
        for difference, same in reads.items():
            if not same:
                raise ValueError(f"The query set {name!r} cannot share this model's prefixes: it has {difference}.")


def _read_alike(*models: LatentQueryEncoder) -> bool:
    bare = {replace_queries(model.processor.chat_template, model.slq.tokens.strings, ()) for model in models}
    return len(bare) == 1


def infer(
    model: LatentQueryEncoder,
    inputs: Sequence[Any],
    *,
    prompt: str | None,
    batch_size: int,
    show_progress_bar: bool,
    save_to_cpu: bool,
    normalize_embeddings: bool,
    truncate_dim: int | None,
    output_value: str = "sentence_embedding",
    query_sets: Mapping[str, LatentQueryEncoder] | None = None,
    **options: Any,
) -> Any:
    """What ``SentenceTransformer.encode`` does between reading its arguments and converting its result.

    Returns:
        ``(len(inputs), H)``; with ``query_sets`` a dict of those.

    Raises:
        ValueError: If an input cannot be read.
    """
    whole: dict[str, Tensor] = {}
    texts_only = all(isinstance(value, str) for value in inputs)
    results = stream(
        model,
        enumerate(inputs),
        batch_size=batch_size,
        prompt=prompt,
        strict=True,
        truncate_dim=truncate_dim,
        query_sets=query_sets,
        most_workers=0 if texts_only else (len(inputs) - 1) // batch_size,
        **options,
    )
    progress = tqdm(results, desc="Batches", total=-(-len(inputs) // batch_size), disable=not show_progress_bar)
    for result in progress:
        for name, rows in result.embeddings.items():
            rows = torch.nn.functional.normalize(rows, dim=-1) if normalize_embeddings else rows
            rows = rows.cpu() if save_to_cpu else rows
            if name not in whole:
                whole[name] = rows.new_empty(len(inputs), rows.shape[1])
            whole[name][result.places] = rows
    if query_sets is None:
        return whole.get("", torch.empty(0, device=None if save_to_cpu else model.device))
    return {name: whole.get(name, torch.empty(0)) for name in query_sets}


INFERENCE_SETTINGS = {"prompt", "batch_size", "show_progress_bar", "save_to_cpu", "normalize_embeddings"}
INFERENCE_SETTINGS |= {"truncate_dim", "output_value", "device", "processing_kwargs", "task"}
"""What :func:`infer` understands, and a device."""


def encode_query_sets(
    model: LatentQueryEncoder,
    inputs: Sequence[Any],
    query_sets: Mapping[str, LatentQueryEncoder],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    normalize_embeddings: bool = False,
) -> dict[str, Any]:
    """See :meth:`slq_embed.SLQEncoder.encode`."""
    check_query_sets(model, query_sets)
    found: dict[str, Any] = infer(
        model,
        inputs,
        prompt=prompt,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        save_to_cpu=not convert_to_tensor,
        normalize_embeddings=normalize_embeddings,
        truncate_dim=None,
        query_sets=query_sets,
    )
    if convert_to_tensor:
        return found
    return {name: rows.numpy() if convert_to_numpy else list(rows) for name, rows in found.items()}
