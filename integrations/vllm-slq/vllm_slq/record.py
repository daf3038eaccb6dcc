"""What the pooler must know of an SLQ model, read from the folder's ``slq_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CONFIG_NAME = "slq_config.json"
HEAD_NAME = "1_Dense/model.safetensors"
DEEP_NAME = "deep_queries.safetensors"
ADAPTER_NAME, ADAPTER_CONFIG_NAME = "query_adapter/adapter_model.safetensors", "query_adapter/adapter_config.json"
HOST_CONFIG_NAME, TEMPLATE_NAME = "config_sentence_transformers.json", "chat_template.jinja"
OWN_TENSORS = {"queries", "deep_queries"}
"""Tensors beside the backbone's weights: the queries in float32, which the table holds already, and the deep queries."""

_POOLINGS = ("mean", "weighted", "last")
_OF_TASKS = ("query", "document", "passage", "corpus")


@dataclass(frozen=True)
class Record:
    """What an SLQ model has beside its backbone.

    Args:
        query_ids: Token ids of the latent queries, in order; every prompt ends with them.
        pooling: `"mean"` over all queries, a `"weighted"` mean with a learned weight for each, or the `"last"` query alone.
        projection: Width of the projection head, if there is one.
        image_kwargs: How the image processor is called.
        scores: What the weights of a weighted mean are the softmax of, a number for each query.
        deep_queries: Whether vectors are added to the queries' states before each layer.
        query_adapter: Whether a LoRA acts at the queries.
    """

    query_ids: tuple[int, ...]
    pooling: str
    projection: int | None
    image_kwargs: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None
    deep_queries: bool = False
    query_adapter: bool = False

    @property
    def count(self) -> int:
        """At how many positions, counted from the last, the states are needed."""
        return 1 if self.pooling == "last" else len(self.query_ids)

    @property
    def acts_inside(self) -> bool:
        """Whether something acts inside the layers at the queries."""
        return self.deep_queries or self.query_adapter


def read_record(values: Mapping[str, Any] | None, folder: str) -> Record:
    """Read the record of a folder.

    Args:
        values: The content of ``slq_config.json``; None where there is none.
        folder: Its name, for errors.

    Raises:
        ValueError: If there is none, or the model has a part that vLLM has no place for, or that this version does not know.
    """
    if values is None:
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is no SLQ model. Write it with slq_embed's export_vllm.")
    if values.get("query_token_type"):
        raise ValueError(
            f"{folder} cannot be served by vLLM: its queries have a token type of their own, and vLLM knows no such types. Use "
            "slq_embed.serving."
        )
    if (pooling := values["pooling"]) not in _POOLINGS:
        raise ValueError(
            f"{folder} has the pooling {pooling!r}, but this vllm-slq knows {', '.join(_POOLINGS)}. Upgrade vllm-slq."
        )
    ids, image_kwargs = tuple(values["tokens"]["ids"]), values.get("image_kwargs") or {}
    scores = tuple(values["query_scores"]) if pooling == "weighted" else None
    if scores is not None and len(scores) != len(ids):
        raise ValueError(f"{folder} has {len(ids)} queries, but {len(scores)} query_scores in {CONFIG_NAME}.")
    inside = {name: bool(values.get(name)) for name in ("deep_queries", "query_adapter")}
    return Record(ids, pooling, values.get("projection"), image_kwargs, scores, **inside)


def require_prompts(host: Mapping[str, Any] | None, template: str, folder: str) -> None:
    """Make sure that no prompt of a folder is lost: vLLM reads the chat template only, and drops the name of a task that it lacks.

    Args:
        host: The content of ``config_sentence_transformers.json``; None where there is none.
        template: The chat template.
        folder: Its name, for errors.

    Raises:
        ValueError: If the folder has a prompt for queries or documents, or a default one, and its template knows none.
    """
    prompts, default = (host or {}).get("prompts") or {}, (host or {}).get("default_prompt_name")
    if "slq_task" not in template and (
        lost := sorted({str(name) for name in (*_OF_TASKS, default) if prompts.get(name)})
    ):
        raise ValueError(
            f"{folder} has prompts ({', '.join(lost)}) that its chat template does not know, so they would be lost. "
            "Write the folder with slq_embed.saving.export_vllm."
        )
