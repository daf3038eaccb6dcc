"""One loaded encoder for many callers; what cannot be read is named after all the rest was embedded."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.stream import collect, stream
from slq_embed.inputs.rows import Skipped, name_some, require_list
from slq_embed.inputs.sources import open_image
from slq_embed.remote import RemoteEncoder

__all__ = ["UnreadableInputsError", "compare", "embed", "embed_images", "shared_encoder"]

logger = logging.getLogger(__name__)

_LOADED: WeakValueDictionary[str, SLQEncoder] = WeakValueDictionary()
_LOADING_LOCK = threading.Lock()  # its own: a load takes minutes, and others go on embedding


class UnreadableInputsError(ValueError):
    """Some inputs cannot be read. The others were embedded all the same. The message names ten, :attr:`skipped` has all.

    Args:
        skipped: Which, and why.
        embeddings: ``(number of inputs, H)`` in float32; rows of what was skipped are NaN.
    """

    def __init__(self, skipped: Sequence[Skipped], embeddings: NDArray[np.float32]) -> None:
        self.skipped, self.embeddings = list(skipped), embeddings
        named = name_some([f"{row.name}: {row.reason}" for row in self.skipped])
        super().__init__(f"{len(self.skipped)} of {len(embeddings)} inputs cannot be read: {named}")

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes: an error that cannot be unpickled breaks their pool."""
        return type(self), (self.skipped, self.embeddings)


def shared_encoder(model: str | Path | SLQEncoder, **kwargs: Any) -> SLQEncoder:
    """An encoder, loaded once for all callers in this process that ask for the same; anew if it was saved anew.

    Args:
        model: A folder, a hub name, or an encoder, which is returned as it is.
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
    with _LOADING_LOCK:
        if (encoder := _LOADED.get(key)) is None:
            encoder = _LOADED[key] = SLQEncoder(name, **kwargs)
        return encoder


def _identity(value: Any) -> str:
    # Two loaded backbones of one architecture print the same. An address is not used again: the encoder keeps its own.
    return f"{type(value)} at {id(value)}" if isinstance(value, nn.Module) else repr(value)


def embed(
    model: SLQEncoder | RemoteEncoder, inputs: Sequence[Any], *, normalize_embeddings: bool = True, **options: Any
) -> NDArray[np.float32]:
    """Embed inputs for a service: from any thread, whatever cannot be read.

    Args:
        model: The encoder, or one behind a server.
        inputs: Texts, images, or both; see :func:`slq_embed.inputs.rows.read_row`.
        normalize_embeddings: Whether to normalise again what ``model.truncate_dim`` has cut.
        **options: ``task`` (``"query"`` or ``"document"``, whose prompt is used), ``prompt``, ``batch_size``,
            ``show_progress_bar``; see :func:`slq_embed.encoding.stream.stream`.

    Returns:
        ``(len(inputs), H)``.

    Raises:
        ValueError: If a single input came in place of a list, or an argument does not fit.
        UnreadableInputsError: After all others were embedded, if some inputs cannot be read.
        RuntimeError: If one input alone does not fit into memory, or a server fails. If a server had embedded some by then, it is a
            :class:`~slq_embed.remote.PartlyEmbeddedError`, which holds them.
        ConnectionError: If a server does not answer.
    """
    require_list(inputs)
    rows = list(enumerate(inputs))
    return _embed(model, rows, [], len(rows), normalize_embeddings, options)


def embed_images(
    model: SLQEncoder | RemoteEncoder,
    sources: Sequence[Any],
    *,
    fetch_urls: bool = False,
    normalize_embeddings: bool = True,
    **options: Any,
) -> NDArray[np.float32]:
    """Embed images as callers name them; otherwise as :func:`embed`.

    Args:
        model: The encoder, or one behind a server.
        sources: Paths, URIs, bytes, files or PIL images; see :func:`slq_embed.inputs.open_image`.
        fetch_urls: Whether to fetch URLs.
        normalize_embeddings: As for :func:`embed`.
        **options: As for :func:`embed`.

    Returns:
        ``(len(sources), H)``.

    Raises:
        ValueError: If a single input came in place of a list, or an argument does not fit.
        UnreadableInputsError: After all others were embedded, if some images cannot be read.
        RuntimeError: If one image alone does not fit into memory, or a server fails. If a server had embedded some by then, it is a
            :class:`~slq_embed.remote.PartlyEmbeddedError`, which holds them.
        ConnectionError: If a server does not answer.
    """
    require_list(sources, "sources")
    sources = list(sources)
    inputs: list[tuple[int, Any]] = []
    skipped: list[Skipped] = []
    for index, source in enumerate(sources):
        try:
            inputs.append((index, open_image(source, fetch=fetch_urls)))
        except ValueError as error:
            skipped.append(Skipped(f"input {index}", str(error), index))
    return _embed(model, inputs, skipped, len(sources), normalize_embeddings, options)


def compare(server: RemoteEncoder, model: SLQEncoder) -> dict[str, float]:
    """How far the embeddings of a server are from those of its model: to know before you rely on them.

    Args:
        server: The server, which was given the model.
        model: The same model, loaded here.

    Returns:
        The largest ``1 - cosine`` of some inputs of each kind: ``"text"``, ``"query"`` and ``"document"`` (texts with these prompts),
        ``"long text"``, and where the model reads them ``"image"`` and ``"image and text"``. A right server in float32 is below 1e-5,
        and one in bfloat16 below 1e-3. NaN where an input is refused, there or here; a warning has the reason.

    Raises:
        ConnectionError: If the server does not answer.
        TimeoutError: If it does not answer in time.
        RuntimeError: If it fails.
        ValueError: If an argument is something else, or the server's embeddings have another width.
    """
    if not (isinstance(server, RemoteEncoder) and isinstance(model, SLQEncoder)):
        given = f"a {type(server).__name__} and a {type(model).__name__}"
        raise ValueError(f"compare got {given}, but a RemoteEncoder and the SLQEncoder that it serves are needed.")
    found: dict[str, float] = {}
    for kind, (inputs, options) in _inputs_by_kind(model).items():
        try:
            theirs = embed(server, inputs, **options).astype(np.float64)
            ours = embed(model, inputs, batch_size=1, **options).astype(np.float64)
        except UnreadableInputsError as error:
            logger.warning("Not compared, %s: %s", kind, error)
            found[kind] = float("nan")
            continue
        if (server.truncate_dim or model.truncate_dim) is not None:  # of what is longer, the first numbers
            width = min(theirs.shape[1], ours.shape[1])
            theirs, ours = theirs[:, :width], ours[:, :width]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"The server gives embeddings of {theirs.shape[1]} numbers, and the model of {ours.shape[1]}: it serves another model."
            )
        norms = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
        found[kind] = float((1 - (theirs * ours).sum(axis=1) / np.maximum(norms, 1e-30)).max())
    return found


def _inputs_by_kind(model: SLQEncoder) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """What :func:`compare` embeds, and with which options."""
    noise = np.random.default_rng(0)
    words = " ".join(
        noise.choice(["a", "two", "red", "blue", "grey", "circle", "square", "star", "moon", "above"], 2000)
    )
    texts = ["hello", "", "a much longer text about red circles and blue squares"]
    kinds: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "text": (texts, {}),
        **{task: (texts, {"task": task}) for task in ("query", "document")},
        "long text": ([words[: model.slq_config.max_text_chars]], {}),
    }
    if model.transformer.reader.reads_images:
        sizes = ((40, 72), (480, 640), (200, 120))
        images = [Image.fromarray(noise.integers(256, size=(*size, 3), dtype=np.uint8)) for size in sizes]
        kinds["image"] = images, {}
        kinds["image and text"] = [{"image": image, "text": "now in blue"} for image in images], {}
    return kinds


def _embed(
    model: SLQEncoder | RemoteEncoder,
    inputs: Sequence[tuple[int, Any]],
    skipped: list[Skipped],
    count: int,
    normalize: bool,
    options: dict[str, Any],
) -> NDArray[np.float32]:
    embeddings: NDArray[np.float32]
    if isinstance(model, RemoteEncoder):
        embeddings = model.embed(inputs, count, skipped=skipped, normalize_embeddings=normalize, **options)
    elif isinstance(model, SLQEncoder):
        batches = stream(model, inputs, normalize_embeddings=normalize, total=len(inputs), **options)
        rows = collect(batches, count, to_cpu=True, skipped=skipped)
        if not rows.numel():
            rows = torch.full((count, int(model.get_embedding_dimension() or 0)), torch.nan)
        embeddings = rows.numpy()
    else:
        raise ValueError(
            f"The model is a {type(model).__name__}, but an SLQEncoder or a RemoteEncoder is needed. Load it with "
            "SLQEncoder(folder)."
        )
    if skipped:
        raise UnreadableInputsError(skipped, embeddings)
    return embeddings
