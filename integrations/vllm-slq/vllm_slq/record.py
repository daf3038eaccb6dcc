"""What the pooler must know of an SLQ model, read from the folder's ``slq_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CONFIG_NAME = "slq_config.json"
HEAD_NAME = "1_Dense/model.safetensors"
HOST_CONFIG_NAME, TEMPLATE_NAME = "config_sentence_transformers.json", "chat_template.jinja"
MASTER_NAME = "queries"  # a tensor beside the weights: the queries in float32, which the table holds already

_POOLINGS = ("mean", "weighted", "last")
_OF_TASKS = ("query", "document", "passage", "corpus")
_OWN_STATES = {
    "query_adapter": "a query adapter",
    "deep_queries": "deep queries",
    "query_token_type": "a token type of its queries",
}


@dataclass(frozen=True)
class Record:
    """The part of an SLQ model that comes after its last layer.

    Args:
        query_ids: Token ids of the latent queries, in order; every prompt ends with them.
        pooling: `"mean"` over all queries, a `"weighted"` mean with a learned weight for each, or the `"last"` query alone.
        projection: Width of the projection head, if there is one.
        image_kwargs: How the image processor is called.
        scores: What the weights of a weighted mean are the softmax of, a number for each query.
    """

    query_ids: tuple[int, ...]
    pooling: str
    projection: int | None
    image_kwargs: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None

    @property
    def count(self) -> int:
        """At how many positions, counted from the last, the states are needed."""
        return 1 if self.pooling == "last" else len(self.query_ids)


def read_record(values: Mapping[str, Any] | None, folder: str) -> Record:
    """Read the record of a folder.

    Args:
        values: The content of ``slq_config.json``; None where there is none.
        folder: Its name, for errors.

    Raises:
        ValueError: If there is none, or the model has parts that vLLM has no place for, or that this version does not know.
    """
    if values is None:
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is no SLQ model. Write it with slq_embed's export_vllm.")
    if own := [what for name, what in _OWN_STATES.items() if values.get(name)]:
        raise ValueError(
            f"{folder} cannot be served by vLLM: it has {' and '.join(own)}, which act inside the layers at the positions of the "
            "queries only. Train queries alone, or with a projection head."
        )
    if (pooling := values["pooling"]) not in _POOLINGS:
        raise ValueError(
            f"{folder} has the pooling {pooling!r}, but this vllm-slq knows {', '.join(_POOLINGS)}. Upgrade vllm-slq."
        )
    ids, image_kwargs = tuple(values["tokens"]["ids"]), values.get("image_kwargs") or {}
    scores = tuple(values["query_scores"]) if pooling == "weighted" else None
    if scores is not None and len(scores) != len(ids):
        raise ValueError(f"{folder} has {len(ids)} queries, but {len(scores)} query_scores in {CONFIG_NAME}.")
    return Record(ids, pooling, values.get("projection"), image_kwargs, scores)


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
