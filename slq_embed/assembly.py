"""What an SLQ model is put together from: a backbone with fresh queries, or the recorded backbone of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.artifact import SLQConfig
from slq_embed.backbones import embedding_table, family_of, limit_pixels, load_backbone
from slq_embed.chat_template import DEFAULT_INSTRUCTIONS, build_chat_template, replace_queries
from slq_embed.fingerprint import difference
from slq_embed.modules import LatentQueryPooling, LatentQueryTransformer
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.query_tokens import Form, allocate, private_processor

NO_LIMIT = int(1e30)  # what transformers itself writes for "no maximum length"


def build_modules(
    name: str,
    commit: str | None,
    backbone: PreTrainedModel,
    processor: ProcessorMixin,
    queries: Tensor,
    *,
    pooling: PoolingMode,
    form: Form,
    instructions: Mapping[str, str] | None,
    max_text_chars: int,
    max_pixels: int | None,
    image_kwargs: Mapping[str, Any] | None,
) -> tuple[list[nn.Module], SLQConfig]:
    """Put latent queries on a backbone; see :meth:`slq_embed.SLQEncoder.from_backbone`.

    Returns:
        The modules, and what is to be recorded of them.
    """
    processor = private_processor(processor)
    image_kwargs = {**family_of(backbone.config).image_kwargs, **(image_kwargs or {})}
    if max_pixels is not None:
        limit_pixels(processor, backbone, max_pixels)
    table = embedding_table(backbone)
    tokens = allocate(processor.tokenizer, len(table), len(queries), form)
    told = {**DEFAULT_INSTRUCTIONS, **(instructions or {})}
    processor.chat_template = build_chat_template(
        processor, tokens.strings, max_text_chars=max_text_chars, instructions=told
    )
    # Saving writes what the tokenizer was made with; attributes set later are not kept.
    processor.tokenizer.init_kwargs.update(padding_side="left", model_max_length=NO_LIMIT)
    processor.tokenizer.model_max_length = NO_LIMIT
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())
    record = SLQConfig(name, commit, tokens, pooling, form, max_text_chars, told, image_kwargs)
    return join_modules(backbone, processor, queries, record), record


def rebuild_modules(
    record: SLQConfig, backbone: PreTrainedModel, processor: ProcessorMixin, queries: Tensor, pooling: PoolingMode
) -> tuple[list[nn.Module], SLQConfig]:
    """Put other latent queries on an encoder's backbone, which are to read their inputs as its own do.

    Args:
        record: What is recorded of the encoder.
        backbone: Its backbone.
        processor: Its processor; copied.
        queries: The queries, ``(Q, H)``.
        pooling: Their pooling.

    Returns:
        As :func:`build_modules`.
    """
    processor = private_processor(processor)
    tokens = allocate(processor.tokenizer, len(embedding_table(backbone)), len(queries), record.form)
    processor.chat_template = replace_queries(processor.chat_template, record.tokens.strings, tokens.strings)
    fresh = replace(record, tokens=tokens, pooling=pooling, fingerprint=None, loss=None, log_temperature=None)
    return join_modules(backbone, processor, queries, fresh), fresh


def join_modules(
    backbone: PreTrainedModel, processor: ProcessorMixin, queries: Tensor, record: SLQConfig
) -> list[nn.Module]:
    """The modules of an encoder."""
    return [
        LatentQueryTransformer(backbone, processor, queries, record.image_kwargs),
        LatentQueryPooling(queries.shape[1], record.pooling),
        Normalize(),
    ]


def find_backbone(
    folder: str,
    config: SLQConfig,
    own: dict[str, Any],
    model_kwargs: dict[str, Any],
    given: PreTrainedModel | str | Path | None,
) -> PreTrainedModel:
    """The backbone of a saved model; ``config`` is brought up to date where it has moved.

    Args:
        folder: Folder or hub name of the saved model.
        config: Its record.
        own: How to load from there.
        model_kwargs: How to load the backbone.
        given: What the user gave in place of the recorded one.

    Raises:
        ValueError: If it is not the backbone that the model was trained on.
        OSError: If it cannot be loaded.
    """
    if config.form == "merged" and given is None:  # an adapter saved from it names this folder
        config.backbone = str(Path(folder).resolve()) if Path(folder).is_dir() else folder
        config.revision = own["revision"]
        return load_backbone(folder, **{**own, **model_kwargs})
    if isinstance(given, PreTrainedModel):
        backbone = given
    else:
        if given is not None:  # it has moved: saving again records where it is now
            config.backbone = str(Path(given).resolve()) if Path(given).is_dir() else str(given)
            config.revision = None
        name, revision = config.backbone, config.revision
        try:
            backbone = load_backbone(name, **{**own, "revision": revision, **model_kwargs})
        except OSError as error:
            raise OSError(
                f"{folder} was trained on the backbone {config.backbone!r}, but nothing can be loaded from "
                f"{name!r}. Bring it back, or say where it is: SLQEncoder({folder!r}, backbone=...). ({error})"
            ) from error
    if config.fingerprint is not None and (found := difference(config.fingerprint, backbone)) is not None:
        raise ValueError(
            f"{folder} was trained on the backbone {config.backbone!r}, but this one is another: {found}. "
            "Its latent queries would give wrong vectors. Load it with the backbone it was trained on."
        )
    return backbone
