"""What encoding needs of an encoder, and what decides the encoder's embeddings."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal, get_args

from slq_embed.backbone.chat_template import replace_queries
from slq_embed.backbone.families import image_settings

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder

Task = Literal["query", "document"]

_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}  # as the host looks them up


def resolve_prompt(
    model: SLQEncoder, prompt: str | None = None, prompt_name: str | None = None, task: Task | None = None
) -> str | None:
    """The prompt that holds, by the rules of Sentence Transformers.

    Args:
        model: The encoder.
        prompt: A system message; ``""`` for none.
        prompt_name: A name among the model's prompts.
        task: ``"query"`` or ``"document"``: without a prompt and a name, the prompt that ``encode_query`` or
            ``encode_document`` uses. Where there is none, the model's default prompt holds.

    Raises:
        ValueError: If the model has no prompt of that name, or there is no such task.
    """
    if task is not None and task not in _PROMPT_NAMES:
        raise ValueError(f"task is {task!r}, but one of {get_args(Task)} is needed.")
    if prompt is None and prompt_name is None and task is not None:
        prompt_name = next((name for name in _PROMPT_NAMES[task] if name in model.prompts), None)
    return model._resolve_prompt(prompt, prompt_name) or None


def prefix_template(model: SLQEncoder) -> str:
    """The chat template without the query tokens: it decides the prefix of an input."""
    template: Any = model.processor.chat_template
    return replace_queries(template, model.slq_config.tokens.strings, ())


def encoder_digest(model: SLQEncoder) -> str:
    """A digest of all that decides an encoder's embeddings, but for the precision that its backbone computes in."""
    backbone = model.backbone_fingerprint
    config = model.slq_config
    settings: list[Any] = [backbone.config_sha256, backbone.table_sha256, backbone.layers_sha256, config.pooling]
    settings += [prefix_template(model), model.truncate_dim, config.image_kwargs, image_settings(model.processor)]
    if config.query_adapter is not None:
        settings.append(float(config.query_adapter.scaled_by))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not name.endswith("log_temperature"):
            digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()
