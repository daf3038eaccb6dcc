"""What encoding needs of an encoder, and what decides the encoder's embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.families import image_settings
from slq_embed.backbone.fingerprint import Fingerprint
from slq_embed.store.prefix_store import PrefixStore

Task = Literal["query", "document"]

_PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}  # as the host looks them up


class Encoder(Protocol):
    """The part of :class:`slq_embed.SLQEncoder` that encoding uses: encoding stands below the encoder."""

    slq_config: Any
    prompts: dict[str, str]
    truncate_dim: int | None
    num_workers: int | None
    prefix_store: PrefixStore | None

    @property
    def backbone(self) -> PreTrainedModel: ...  # noqa: D102
    @property
    def backbone_fingerprint(self) -> Fingerprint: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def processor(self) -> ProcessorMixin: ...  # noqa: D102
    @property
    def queries(self) -> nn.Parameter: ...  # noqa: D102
    @property
    def transformer(self) -> Any: ...  # noqa: D102
    def __call__(self, features: dict[str, Any]) -> dict[str, Tensor]: ...  # noqa: D102
    def __iter__(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...  # noqa: D102
    def get_embedding_dimension(self) -> int | None: ...  # noqa: D102
    def require_loaded(self) -> None: ...  # noqa: D102
    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102
    def _resolve_prompt(self, prompt: str | None, prompt_name: str | None) -> str | None: ...


def resolve_prompt(
    model: Encoder, prompt: str | None = None, prompt_name: str | None = None, task: Task | None = None
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


def encoder_digest(model: Encoder) -> str:
    """A digest of all that decides an encoder's embeddings, but for the precision that its backbone computes in."""
    backbone = model.backbone_fingerprint
    config = model.slq_config
    settings: list[Any] = [backbone.config_sha256, backbone.table_sha256, config.pooling, config.instructions]
    settings += [config.max_text_chars, model.truncate_dim, config.image_kwargs]
    settings += [image_settings(model.processor)]
    if config.query_adapter is not None:
        settings.append(float(config.query_adapter.scaled_by))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not name.endswith("log_temperature"):
            digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()
