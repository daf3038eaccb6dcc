"""What encoding needs of an encoder, and what decides the encoder's embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from slq_embed.backbone.chat_template import replace_queries
from slq_embed.backbone.families import media_settings

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


def check_query_sets(
    model: SLQEncoder,
    query_sets: Mapping[str, SLQEncoder],
    prompt: str | None = None,
    prompt_name: str | None = None,
    task: Task | None = None,
) -> None:
    """Refuse query sets that would see another prefix than the model that reads the inputs.

    Args:
        model: The encoder that reads the inputs.
        query_sets: Encoders by name.
        prompt: As for :func:`resolve_prompt`.
        prompt_name: As for :func:`resolve_prompt`.
        task: As for :func:`resolve_prompt`.

    Raises:
        ValueError: With the name of the set and what differs; or if there is none.
    """
    if not isinstance(query_sets, Mapping) or not query_sets:
        raise ValueError(
            f"query_sets is {query_sets!r:.100}, but a dict of encoders by name is needed, of at least one."
        )

    def prompt_of(encoder: SLQEncoder) -> str | None:
        return resolve_prompt(encoder, prompt, prompt_name if prompt_name in encoder.prompts else None, task)

    for name, encoder in query_sets.items():
        theirs, ours = encoder.slq_config, model.slq_config
        same = {
            "another backbone; load it with SLQEncoder(folder, backbone=model.backbone)": encoder.backbone
            is model.backbone,
            "other instructions": theirs.instructions == ours.instructions,
            "another max_text_chars": theirs.max_text_chars == ours.max_text_chars,
            "other image_kwargs": theirs.image_kwargs == ours.image_kwargs,
            "another chat template": _template(encoder) == _template(model),
            "other image or video sizes": _media(encoder) == _media(model),
            "another prompt; pass prompt=, which holds for all": prompt_of(encoder) == prompt_of(model),
        }
        for difference, equal in same.items():
            if not equal:
                raise ValueError(f"The query set {name!r} cannot share this model's prefixes: it has {difference}.")


def _template(model: SLQEncoder) -> str:
    """The chat template without the query tokens: it decides the prefix of an input."""
    template: Any = model.processor.chat_template
    return replace_queries(template, model.slq_config.tokens.strings, ())


def _media(model: SLQEncoder) -> list[Any]:
    """The settings of the processor's parts that the model uses."""
    kinds = ("image", "video") if model.transformer.reader.reads_videos else ("image",)
    return [media_settings(model.processor, kind) for kind in kinds]


def encoder_digest(model: SLQEncoder) -> str:
    """A digest of all that decides an encoder's embeddings, but for the form and the precision that it was loaded in."""
    backbone, config = model.backbone_fingerprint, model.slq_config
    # Without the token embeddings, which hold the queries in a merged folder.
    settings: list[Any] = [backbone.config_sha256, backbone.layers_sha256, config.pooling]
    settings += [_template(model), model.truncate_dim, config.image_kwargs, *_media(model)]
    if config.query_adapter is not None:
        settings.append(float(config.query_adapter.scaled_by))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not name.endswith("log_temperature"):
            digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()
