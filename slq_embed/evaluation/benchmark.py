"""Models for mteb, the benchmark of text and image embeddings."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.protocol import encoder_digest
from slq_embed.serving import shared_encoder

_ORGANISATION = "slq-embed"


def mteb_model(model: str | Path | SentenceTransformer, name: str | None = None, revision: str | None = None) -> Any:
    """Wrap a model for mteb, so that it gets the images of a task beside the texts.

    mteb takes any Sentence Transformer for a text model. It would leave out image tasks, and drop the images of tasks
    with both. It files results by name and revision, and reads them again: two models need different ones.

    Args:
        model: An encoder, a saved folder or hub name, or a Sentence Transformer loaded from one.
        name: ``"organisation/model"``; by default made from the folder's or the backbone's name.
        revision: By default a digest of all that decides the embeddings: another after more training.

    Returns:
        An ``mteb.models.SentenceTransformerEncoderWrapper``, for ``mteb.evaluate`` and ``mteb.mock_run``.

    Raises:
        ImportError: If mteb is not installed.
        ValueError: If the name is not of that form, or the folder is no SLQ model.
        OSError: If nothing can be loaded from there.

    Example:
        ``mteb.evaluate(mteb_model("my-model"), mteb.get_task("CIFAR10ZeroShot"))``
    """
    if name is not None and not re.fullmatch(r"[^/\s]+/[^/\s]+", name):
        raise ValueError(f"name is {name!r}, but mteb needs an organisation and a name: 'organisation/model'.")
    try:
        from mteb.models import SentenceTransformerEncoderWrapper
    except ImportError as error:
        raise ImportError("The benchmark needs mteb: pip install 'slq-embed[mteb]'.") from error
    encoder = model if isinstance(model, SentenceTransformer) else shared_encoder(model)
    wrapper = SentenceTransformerEncoderWrapper(encoder)
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(
        update={
            "modalities": [modality for modality in ("text", "image") if modality in encoder.modalities],
            "name": name or _default_name(model),
            "revision": revision or _digest(encoder),
        }
    )
    return wrapper


def _default_name(model: str | Path | SentenceTransformer) -> str:
    if isinstance(model, SLQEncoder):
        own = f"{Path(model.slq_config.backbone).name}-{len(model.queries)}-queries"
    elif isinstance(model, SentenceTransformer):
        own = Path(model.model_card_data.model_name or model.model_card_data.base_model or "model").name
    elif not Path(model).exists() and re.fullmatch(r"[^/\s]+/[^/\s]+", str(model)):
        return str(model)  # a hub name
    else:
        own = Path(model).resolve().name
    return f"{_ORGANISATION}/{re.sub(r'[^0-9A-Za-z._-]+', '-', own)}"


def _digest(model: SentenceTransformer) -> str:
    """A digest of the weights, the prompts and the precision."""
    settings = [model.prompts, model.default_prompt_name, model.truncate_dim, str(model.dtype)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    if isinstance(model, SLQEncoder):
        digest.update(encoder_digest(model).encode())
    else:
        for key, weight in model.state_dict().items():
            digest.update(f"{key} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
