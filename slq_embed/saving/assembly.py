"""Putting latent queries on a backbone: the modules of an encoder, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import get_device_name
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.chat_template import DEFAULT_INSTRUCTIONS, build_chat_template, replace_queries
from slq_embed.backbone.families import (
    FAMILIES,
    can_grow,
    embedding_table,
    family_of,
    is_placed,
    limit_pixels,
    tokenizer_of,
    usable_rows,
)
from slq_embed.backbone.quantization import is_quantized
from slq_embed.backbone.query_tokens import Form, QueryTokens, allocate, private_processor
from slq_embed.backbone.self_check import examine
from slq_embed.modules import LatentQueryPooling, LatentQueryTransformer, ProjectionHead, QueryAdapter
from slq_embed.modules.initialisation import Initialisation, initial_queries
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.saving.config import CONFIG_NAME, SLQConfig
from slq_embed.saving.loading import LoadedBackbone, SavedModel
from slq_embed.saving.plain_names import require_plain_loading
from slq_embed.saving.weights import QUERIES

NO_LIMIT = int(1e30)  # what transformers itself writes for "no maximum length"


@dataclass(frozen=True)
class QuerySettings:
    """What is to be trained on a backbone: as for :meth:`slq_embed.SLQEncoder.from_backbone`; None keeps what is recorded."""

    num_queries: int
    init: Initialisation | Tensor = "normal"
    seed: int | None = None
    pooling: PoolingMode | None = None
    projection: int | bool | None = None
    query_adapter: QueryAdapter | bool | None = None
    deep_queries: bool | None = None

    def queries(self, backbone: PreTrainedModel) -> Tensor:
        """The initial queries, ``(Q, H)``."""
        return initial_queries(self.init, self.num_queries, embedding_table(backbone), self.seed)

    def record(self, slq_config: SLQConfig, width: int) -> None:
        """Write the choices into a record; ``width`` is the backbone's, ``H``."""
        slq_config.pooling = self.pooling or slq_config.pooling
        if self.projection is not None:
            projection = width if self.projection is True else self.projection
            slq_config.projection = None if projection is False else projection
        if self.query_adapter is not None:
            adapter = QueryAdapter() if self.query_adapter is True else self.query_adapter
            if adapter is not False and not isinstance(adapter, QueryAdapter):
                raise ValueError(f"query_adapter is {adapter!r}, but True or a slq_embed.QueryAdapter is needed.")
            slq_config.query_adapter = adapter or None
        if self.deep_queries is not None:
            slq_config.deep_queries = bool(self.deep_queries)
        if slq_config.query_token_type and (slq_config.query_adapter is not None or slq_config.deep_queries):
            raise ValueError(
                "This backbone's queries have a token type of their own, which cannot be saved together with a query adapter or "
                "deep queries. Use a projection head."
            )


def require_form(form: str) -> None:
    """Raise a ValueError if there is no such form of a saved folder."""
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}, but one of {get_args(Form)} is needed.")


def require_text_limit(max_text_chars: int) -> None:
    """Raise a ValueError if this is no number of characters."""
    if type(max_text_chars) is not int or max_text_chars < 1:
        raise ValueError(f"max_text_chars is {max_text_chars!r}, but an int of at least 1 is needed.")


def build_modules(
    loaded: LoadedBackbone,
    query_settings: QuerySettings,
    form: Form,
    instructions: Mapping[str, str] | None,
    max_text_chars: int,
    max_pixels: int | None,
    image_kwargs: Mapping[str, Any] | None,
    checked: bool = False,
) -> tuple[list[nn.Module], SLQConfig]:
    """The modules of a new encoder, and what is to be recorded of them; the processor is copied.

    Arguments as for :meth:`slq_embed.SLQEncoder.from_backbone`. ``checked`` says that the caller checks the backbone.

    Raises:
        ValueError: If no schedule is exact on the backbone, or an argument does not fit.
    """
    backbone, processor = loaded.model, private_processor(loaded.processor)
    family = family_of(backbone.config)
    image_kwargs = {**family.image_kwargs, **(image_kwargs or {})}
    if max_pixels is not None:
        limit_pixels(processor, backbone, max_pixels)
    queries = query_settings.queries(backbone)
    tokens = _allocate(processor, backbone, len(queries), form)
    texts = {**DEFAULT_INSTRUCTIONS, **(instructions or {})}
    processor.chat_template = build_chat_template(
        processor, tokens.strings, max_text_chars=max_text_chars, instructions=texts
    )
    # Saving writes what the tokenizer was created with; attributes that are set later are lost.
    tokenizer = tokenizer_of(processor)
    tokenizer.init_kwargs.update(padding_side="left", model_max_length=NO_LIMIT)
    tokenizer.model_max_length = NO_LIMIT
    slq_config = SLQConfig(loaded.name, loaded.commit, tokens, "mean", form, max_text_chars, texts, image_kwargs)
    slq_config.query_token_type = family.query_token_type
    query_settings.record(slq_config, queries.shape[1])
    if not checked:
        require_plain_loading(backbone, form, slq_config.query_adapter is not None)
    if not checked and (backbone.config.model_type not in FAMILIES or is_quantized(backbone)):
        plain = replace(slq_config, projection=None, query_adapter=None, deep_queries=False)
        (transformer, *_) = join_modules(backbone, processor, queries, plain)
        if not is_placed(backbone):  # where it is to compute
            transformer.to(loaded.device or get_device_name())
        slq_config.schedule = examine(transformer).require()
    return _join_new(backbone, processor, queries, slq_config, query_settings.seed), slq_config


def _allocate(processor: ProcessorMixin, backbone: PreTrainedModel, count: int, form: Form) -> QueryTokens:
    return allocate(processor, usable_rows(backbone), count, form, can_grow(backbone))


def rebuild_modules(
    slq_config: SLQConfig, transformer: LatentQueryTransformer, query_settings: QuerySettings
) -> tuple[list[nn.Module], SLQConfig]:
    """Put other latent queries on an encoder's backbone, which are to read their inputs as its own do.

    Args:
        slq_config: What is recorded of the encoder.
        transformer: Its first module; the processor is copied.
        query_settings: The other queries, and what is trained beside them.

    Returns:
        As :func:`build_modules`.
    """
    backbone, processor = transformer.backbone, private_processor(transformer.processor)
    queries = query_settings.queries(backbone)
    tokens = _allocate(processor, backbone, len(queries), slq_config.form)
    processor.chat_template = replace_queries(processor.chat_template, slq_config.tokens.strings, tokens.strings)
    new_config = replace(slq_config, tokens=tokens, fingerprint=None, loss=None, log_temperature=None)
    query_settings.record(new_config, queries.shape[1])
    require_plain_loading(backbone, new_config.form, new_config.query_adapter is not None)
    return _join_new(backbone, processor, queries, new_config, query_settings.seed), new_config


def _join_new(
    backbone: PreTrainedModel, processor: ProcessorMixin, queries: Tensor, slq_config: SLQConfig, seed: int | None
) -> list[nn.Module]:
    modules = join_modules(backbone, processor, queries, slq_config, seed)
    at_the_end = slq_config.query_adapter is not None or slq_config.deep_queries or slq_config.pooling == "last"
    # Where plain Sentence Transformers loads them, they take the last tokens for the queries.
    if at_the_end and not cast(LatentQueryTransformer, modules[0]).reader.ends_with_queries:
        raise ValueError(
            f"The processor of this {backbone.config.model_type} writes tokens after the queries, so a query adapter, deep queries and "
            "pooling='last' would meet the wrong tokens where the model is loaded. Use a projection head, or another pooling."
        )
    return modules


def join_modules(
    backbone: PreTrainedModel,
    processor: ProcessorMixin,
    queries: Tensor,
    slq_config: SLQConfig,
    seed: int | None = None,
) -> list[nn.Module]:
    """The modules of an encoder; the head and the adapter start as if they were not there."""
    width, projection = queries.shape[1], slq_config.projection
    head = [] if projection is None else [ProjectionHead(width, projection)]
    transformer = LatentQueryTransformer(
        backbone,
        processor,
        queries,
        query_tokens=slq_config.tokens.strings,
        image_kwargs=slq_config.image_kwargs,
        query_adapter=slq_config.query_adapter,
        deep_queries=slq_config.deep_queries,
        seed=seed,
        schedule=slq_config.schedule or "prefix",
    )
    return [transformer, LatentQueryPooling(width, slq_config.pooling, len(queries)), *head, Normalize()]


def modules_of(saved: SavedModel) -> list[nn.Module]:
    """The modules of a saved encoder.

    Raises:
        ValueError: If the weights in the folder are not those that its record describes, or are for another width.
    """
    modules = join_modules(saved.backbone, saved.processor, saved.weights[QUERIES], saved.slq_config)
    try:
        nn.Sequential(*modules).load_state_dict(saved.weights)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in the folder do not fit its {CONFIG_NAME}, or the backbone: {error}. Save the model again from "
            "where it was trained."
        ) from error
    return modules
