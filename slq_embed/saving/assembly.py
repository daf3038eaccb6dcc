"""Putting latent queries on a backbone: the modules of an encoder, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.chat_template import DEFAULT_INSTRUCTIONS, build_chat_template, replace_queries
from slq_embed.backbone.families import embedding_table, family_of, limit_pixels
from slq_embed.backbone.query_tokens import Form, allocate, private_processor
from slq_embed.modules import LatentQueryPooling, LatentQueryTransformer
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.saving.config import SLQConfig
from slq_embed.saving.loading import LoadedBackbone

NO_LIMIT = int(1e30)  # what transformers itself writes for "no maximum length"


def build_modules(
    loaded: LoadedBackbone,
    queries: Tensor,
    pooling: PoolingMode,
    form: Form,
    instructions: Mapping[str, str] | None,
    max_text_chars: int,
    max_pixels: int | None,
    image_kwargs: Mapping[str, Any] | None,
) -> tuple[list[nn.Module], SLQConfig]:
    """Put latent queries on a backbone; see :meth:`slq_embed.SLQEncoder.from_backbone`.

    Args:
        loaded: The backbone with its processor, which is copied.
        queries: ``(Q, H)``.
        pooling: As for ``from_backbone``, and so are the others.
        form: As for ``from_backbone``.
        instructions: As for ``from_backbone``.
        max_text_chars: As for ``from_backbone``.
        max_pixels: As for ``from_backbone``.
        image_kwargs: As for ``from_backbone``.

    Returns:
        The modules, and what is to be recorded of them.
    """
    backbone, processor = loaded.model, private_processor(loaded.processor)
    image_kwargs = {**family_of(backbone.config).image_kwargs, **(image_kwargs or {})}
    if max_pixels is not None:
        limit_pixels(processor, backbone, max_pixels)
    table = embedding_table(backbone)
    tokens = allocate(processor.tokenizer, len(table), len(queries), form)
    texts = {**DEFAULT_INSTRUCTIONS, **(instructions or {})}
    processor.chat_template = build_chat_template(
        processor, tokens.strings, max_text_chars=max_text_chars, instructions=texts
    )
    # Saving writes what the tokenizer was created with; attributes that are set later are lost.
    processor.tokenizer.init_kwargs.update(padding_side="left", model_max_length=NO_LIMIT)
    processor.tokenizer.model_max_length = NO_LIMIT
    slq_config = SLQConfig(loaded.name, loaded.commit, tokens, pooling, form, max_text_chars, texts, image_kwargs)
    return join_modules(backbone, processor, queries, slq_config), slq_config


def rebuild_modules(
    slq_config: SLQConfig, transformer: LatentQueryTransformer, queries: Tensor, pooling: PoolingMode | None
) -> tuple[list[nn.Module], SLQConfig]:
    """Put other latent queries on an encoder's backbone, which are to read their inputs as its own do.

    Args:
        slq_config: What is recorded of the encoder.
        transformer: Its first module; the processor is copied.
        queries: The queries, ``(Q, H)``.
        pooling: Their pooling; by default the encoder's.

    Returns:
        As :func:`build_modules`.
    """
    backbone, processor = transformer.backbone, private_processor(transformer.processor)
    tokens = allocate(processor.tokenizer, len(embedding_table(backbone)), len(queries), slq_config.form)
    processor.chat_template = replace_queries(processor.chat_template, slq_config.tokens.strings, tokens.strings)
    new_config = replace(slq_config, tokens=tokens, fingerprint=None, loss=None, log_temperature=None)
    new_config.pooling = pooling or slq_config.pooling
    return join_modules(backbone, processor, queries, new_config), new_config


def join_modules(
    backbone: PreTrainedModel, processor: ProcessorMixin, queries: Tensor, slq_config: SLQConfig
) -> list[nn.Module]:
    """The modules of an encoder."""
    return [
        LatentQueryTransformer(backbone, processor, queries, slq_config.tokens.strings, slq_config.image_kwargs),
        LatentQueryPooling(queries.shape[1], slq_config.pooling),
        Normalize(),
    ]
