"""One loaded encoder for many callers: shared by frameworks, safe in threads, careful with memory and bad input."""

from __future__ import annotations

import gc
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from numpy.typing import NDArray
from torch import nn
from tqdm.autonotebook import tqdm
from transformers import PreTrainedModel

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding import Encoded, stream
from slq_embed.inputs import Skipped
from slq_embed.sources import open_image

logger = logging.getLogger(__name__)

_LOADED: WeakValueDictionary[str, SLQEncoder] = WeakValueDictionary()
_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_WHILE_LOADING = threading.Lock()  # its own: a load takes minutes, and others go on embedding
_WHILE_NAMING = threading.Lock()


class UnreadableInputsError(ValueError):
    """Some inputs could not be read; the others were embedded all the same.

    Args:
        skipped: Which, and why.
        embeddings: ``(number of inputs, H)`` in float32; rows of what was skipped are NaN.
    """

    def __init__(self, skipped: Sequence[Skipped], embeddings: NDArray[np.float32]) -> None:
        self.skipped, self.embeddings = list(skipped), embeddings
        named = "; ".join(f"{row.name}: {row.reason}" for row in self.skipped)
        super().__init__(f"{len(self.skipped)} of {len(embeddings)} inputs could not be read: {named}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes: an error that cannot be unpickled breaks their pool."""
        return type(self), (self.skipped, self.embeddings)


def shared_encoder(model: str | Path | SLQEncoder, **kwargs: Any) -> SLQEncoder:
    """An encoder, loaded once for all callers in this process that ask for the same; anew if it was saved anew.

    Args:
        model: A folder, a hub name, or an encoder, which is given back.
        **kwargs: For :class:`~slq_embed.SLQEncoder`; None is as good as nothing.

    Raises:
        ValueError: If an encoder comes with arguments for loading, or the folder is no SLQ model.
        OSError: If nothing can be loaded from there.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}  # a default spelled out is the same
    if isinstance(model, SLQEncoder):
        if kwargs:
            raise ValueError(f"The model is loaded already, so {', '.join(sorted(kwargs))} cannot be given.")
        return model
    folder = Path(model).resolve()
    name = str(folder) if folder.is_dir() else str(model)
    files = [folder / "slq_config.json", *sorted(folder.rglob("*.safetensors"))] if folder.is_dir() else []
    state = [(str(file), file.stat().st_mtime_ns) for file in files if file.is_file()]  # saved anew, it is another
    key = json.dumps([name, kwargs, state], sort_keys=True, default=_identity)
    with _WHILE_LOADING:
        if (found := _LOADED.get(key)) is None:
            found = _LOADED[key] = SLQEncoder(name, **kwargs)
        return found


def _identity(value: Any) -> str:
    # Two loaded backbones of one architecture print the same. An address is not used again: the encoder keeps its own.
    return f"{type(value)} at {id(value)}" if isinstance(value, nn.Module) else repr(value)


def lock_of(model: SLQEncoder) -> threading.RLock:
    """The lock under which an encoder's backbone and tokenizer are used; one for all encoders on a backbone."""
    with _WHILE_NAMING:
        return _LOCKS.setdefault(model.backbone, threading.RLock())


def prompt_for(model: SLQEncoder, task: Literal["query", "document"]) -> str | None:
    """The prompt that ``encode_query`` or ``encode_document`` would use."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in model.prompts), None)
    return model._resolve_prompt(None, name) or None


def embed(
    model: SLQEncoder,
    inputs: Sequence[Any],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    show_progress_bar: bool = False,
) -> NDArray[np.float32]:
    """Embed inputs for a service: from any thread, in smaller batches where memory runs out.

    Args:
        model: The encoder.
        inputs: Texts, images, or both; see :func:`slq_embed.inputs.read_row`.
        prompt: A system message.
        batch_size: Inputs a batch; halved as long as a batch does not fit into memory.
        normalize: Whether to normalise again what ``model.truncate_dim`` has cut.
        show_progress_bar: Whether to show one.

    Returns:
        ``(len(inputs), H)``.

    Raises:
        UnreadableInputsError: After all others were embedded, if some inputs could not be read.
        RuntimeError: If one input alone does not fit into memory.
    """
    return _embed(model, inputs, [], prompt, batch_size, normalize, show_progress_bar)


def embed_images(
    model: SLQEncoder,
    sources: Sequence[Any],
    *,
    fetch_urls: bool = False,
    prompt: str | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    show_progress_bar: bool = False,
) -> NDArray[np.float32]:
    """Embed images as callers name them; otherwise as :func:`embed`.

    Args:
        model: The encoder.
        sources: Paths, URIs, bytes, files or PIL images; see :func:`slq_embed.sources.open_image`.
        fetch_urls: Whether to fetch URLs.
        prompt: As for :func:`embed`.
        batch_size: As for :func:`embed`.
        normalize: As for :func:`embed`.
        show_progress_bar: As for :func:`embed`.

    Returns:
        ``(len(sources), H)``.

    Raises:
        UnreadableInputsError: After all others were embedded, if some images could not be read.
    """
    opened: list[Any] = []
    lost: list[Skipped] = []
    for place, source in enumerate(sources):
        try:
            opened.append(open_image(source, fetch=fetch_urls))
        except ValueError as error:
            opened.append(None)
            lost.append(Skipped(f"input {place}", str(error), place))
    return _embed(model, opened, lost, prompt, batch_size, normalize, show_progress_bar)


def _embed(
    model: SLQEncoder,
    inputs: Sequence[Any],
    skipped: list[Skipped],
    prompt: str | None,
    batch_size: int,
    normalize: bool,
    show_progress_bar: bool,
) -> NDArray[np.float32]:
    rows = np.full((len(inputs), model.get_embedding_dimension()), np.nan, np.float32)
    lost = {row.place for row in skipped}
    good = [(place, value) for place, value in enumerate(inputs) if place not in lost]
    with tqdm(total=len(inputs), disable=not show_progress_bar) as bar:
        for result in embed_batches(model, good, prompt=prompt, batch_size=batch_size):
            if result.places:
                rows[result.places] = result.embeddings[""].float().cpu().numpy()
            skipped += result.skipped
            bar.update(len(result.places) + len(result.skipped))
    if skipped:
        raise UnreadableInputsError(sorted(skipped, key=lambda row: row.place or 0), rows)
    if normalize and model.truncate_dim is not None:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return rows


def embed_batches(
    model: SLQEncoder, inputs: Sequence[tuple[int, Any]], *, prompt: str | None, batch_size: int
) -> Iterator[Encoded]:
    """Embed inputs as :func:`embed`, and give results as they come: others may use the model between them.

    Args:
        model: The encoder.
        inputs: Inputs with their places.
        prompt: A system message.
        batch_size: As for :func:`embed`.

    Yields:
        A batch of embeddings with the places of its inputs, and what could not be read.

    Raises:
        RuntimeError: If one input alone does not fit into memory.
    """
    model._refuse_after_failed_reload()
    waiting = dict(inputs)
    while waiting:
        texts_only = all(isinstance(value, str) for value in waiting.values())
        results = stream(
            model,
            list(waiting.items()),
            batch_size=batch_size,
            prompt=prompt,
            strict=False,
            truncate_dim=model.truncate_dim,
            most_workers=0 if texts_only else (len(waiting) - 1) // max(1, batch_size),
        )
        failed = False
        while waiting and not failed:
            try:
                with lock_of(model):
                    result = next(results)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if batch_size == 1:
                    raise RuntimeError(
                        f"One input alone does not fit into memory ({error}). Use a smaller max_pixels or "
                        "max_text_chars, half precision, or a larger device."
                    ) from error
                failed = True
            else:
                for place in [*result.places, *(row.place for row in result.skipped)]:
                    waiting.pop(place or 0)
                yield result
        if failed:  # outside of the handler, whose traceback would keep the batch
            batch_size = max(1, batch_size // 2)
            logger.warning("A batch does not fit into memory: going on with %d at a time.", batch_size)
            gc.collect()
            torch.cuda.empty_cache()
