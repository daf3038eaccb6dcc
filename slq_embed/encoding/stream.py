"""The one way to encode: inputs go in as they come, batches of embeddings come out as they are ready."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from sentence_transformers.util import truncate_embeddings
from torch import Tensor
from tqdm.autonotebook import tqdm

from slq_embed.backbone.lock import FairLock, lock_of
from slq_embed.encoding.batches import FeatureDataset, read_features
from slq_embed.encoding.protocol import Task, check_query_sets, resolve_prompt
from slq_embed.inputs.rows import Skipped
from slq_embed.prefix.features import Features, select_rows

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder

logger = logging.getLogger(__name__)


@dataclass
class EncodedBatch:
    """Some results of a stream.

    Args:
        indices: The indices of the inputs.
        embeddings: ``(len(indices), H)`` float32 on the model's device.
        skipped: Inputs of the batch that cannot be read.
    """

    indices: list[int]
    embeddings: Tensor
    skipped: list[Skipped] = field(default_factory=list)


def stream(
    model: SLQEncoder,
    inputs: Iterable[tuple[int, Any]],
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    prompt_name: str | None = None,
    task: Task | None = None,
    truncate_dim: int | None = None,
    normalize_embeddings: bool = False,
    query_sets: Mapping[str, SLQEncoder] | None = None,
    strict: bool = False,
    show_progress_bar: bool = False,
    total: int | None = None,
    processing_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[EncodedBatch]:
    """Encode inputs as they come, from any thread, in smaller batches where memory runs out.

    The backbone's lock is held while a batch is prepared or run, and is free between batches and while inputs are
    awaited.

    Args:
        model: The encoder.
        inputs: Inputs with their indices, any number of them; read up to 32 batches ahead and sorted by size within those.
        batch_size: Inputs a batch. A batch that does not fit into memory is halved.
        prompt: A system message.
        prompt_name: A name among the model's prompts.
        task: See :func:`slq_embed.encoding.protocol.resolve_prompt`.
        truncate_dim: How many of an embedding's numbers to keep; by default the model's ``truncate_dim``.
        normalize_embeddings: Whether to normalise what was truncated.
        query_sets: Encoders on the same backbone, by name, in place of the model's own queries. They read inputs as the model
            does, with the same prompt. Their embeddings stand side by side, ``(batch, sum of widths)``; each has its own ``truncate_dim``.
        strict: Whether an input that cannot be read is an error, or is skipped and listed.
        show_progress_bar: Whether to show one.
        total: Number of inputs, for the progress bar.
        processing_kwargs: Settings of the image and the video processor, for the model's ``preprocess``.

    Yields:
        Batches of embeddings, not in the order of the inputs.

    Raises:
        ValueError: If ``strict`` and an input cannot be read, ``batch_size`` is below 1, ``truncate_dim`` stands beside
            ``query_sets``, a query set would see another prefix, or there is no such prompt or task.
        RuntimeError: If one input alone does not fit into memory.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but at least 1 is needed.")
    if query_sets is not None:
        check_query_sets(model, query_sets, prompt, prompt_name, task)
        if truncate_dim is not None:
            raise ValueError(
                f"truncate_dim is {truncate_dim}, but each of the query_sets has its own. Set it on their encoders."
            )
    model.require_loaded()
    lock = lock_of(model.backbone)
    dataset = FeatureDataset(model, resolve_prompt(model, prompt, prompt_name, task), processing_kwargs)

    def embed(features: Features) -> Tensor:
        if query_sets is None:
            dim = model.truncate_dim if truncate_dim is None else truncate_dim
            return _finish(model(features)["sentence_embedding"], dim, normalize_embeddings)
        prefix = model.transformer.prefix(features)
        parts = []
        for encoder in query_sets.values():
            states: Features = {"token_embeddings": encoder.transformer.query_states(prefix)}
            for module in list(encoder)[1:]:
                states = module(states)
            parts.append(_finish(states["sentence_embedding"], encoder.truncate_dim, normalize_embeddings))
        return torch.cat(parts, dim=1)

    forward = _Halving(embed, lock, model.device)
    batches = read_features(dataset, inputs, batch_size, lock)
    count = None if total is None else -(-total // batch_size)
    model.eval()
    for indices, features, skipped in tqdm(batches, "Batches", total=count, disable=not show_progress_bar):
        if skipped and strict:
            name = skipped[0].name
            raise ValueError(f"{name[0].upper()}{name[1:]}: {skipped[0].reason}")
        yield EncodedBatch(indices, forward(features) if indices else torch.empty(0), skipped)


def _finish(embeddings: Tensor, dim: int | None, normalize: bool) -> Tensor:
    if dim is not None:
        embeddings = truncate_embeddings(embeddings, dim)
    return torch.nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings


class _Halving:
    """Runs a batch, in halves where it does not fit into memory, and later batches in parts of that size at once."""

    def __init__(self, run: Callable[[Features], Tensor], lock: FairLock, device: torch.device) -> None:
        self._run, self._lock, self._device = run, lock, device
        self._limit: int | None = None

    def __call__(self, features: Features) -> Tensor:
        rows = len(features["input_ids"])
        if self._limit is None or rows <= self._limit:
            try:
                with self._lock, torch.inference_mode():
                    return self._run(send_to_device(features, self._device, non_blocking=True))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if rows == 1:
                    raise RuntimeError(
                        f"One input alone does not fit into memory ({error}). Use a smaller max_pixels or "
                        "max_text_chars, half precision, or a larger device."
                    ) from error
            # Outside of the handler, whose traceback would keep the batch.
            self._limit = max(1, rows // 2)
            logger.warning("A batch does not fit into memory: going on with %d at a time.", self._limit)
            gc.collect()
            torch.cuda.empty_cache()
        starts = range(0, rows, self._limit)
        parts = [range(start, min(start + self._limit, rows)) for start in starts]
        return torch.cat([self(select_rows(features, part)) for part in parts])


def collect(batches: Iterable[EncodedBatch], count: int, to_cpu: bool, skipped: list[Skipped] | None = None) -> Tensor:
    """Put the batches of a stream into the order of the inputs.

    Args:
        batches: From :func:`stream`.
        count: Number of inputs.
        to_cpu: Whether to bring the embeddings to main memory.
        skipped: Gets what was skipped, in order.

    Returns:
        ``(count, H)``, with NaN in the rows of what was skipped; an empty tensor if nothing was encoded.
    """
    rows = torch.empty(0)
    for batch in batches:
        if skipped is not None:
            skipped += batch.skipped
        if batch.indices:
            embeddings = batch.embeddings.cpu() if to_cpu else batch.embeddings
            if not rows.numel():
                rows = embeddings.new_full((count, embeddings.shape[1]), torch.nan)
            rows[batch.indices] = embeddings
    if skipped is not None:
        skipped.sort(key=lambda row: row.index or 0)
    return rows
