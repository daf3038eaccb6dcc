"""The pooler: the mean over the latent queries, the projection head, L2."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.activations import PoolerNormalize
from vllm.model_executor.layers.pooler.seqwise import EmbeddingPoolerHead, SequencePooler, SequencePoolingMethod
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from vllm_slq.config import read_file, record_of
from vllm_slq.layers import QueryRows
from vllm_slq.record import HEAD_NAME, Record
from vllm_slq.tail import ends_with, keep_tail


class QueryPool(SequencePoolingMethod):
    """The mean of the states at the last positions, where the queries stand, in float32; weighted, where the model has weights.

    A prompt that does not end with the queries gets NaN: no text was put through the chat template, or it was cut.

    Args:
        record: The model's record.
        query_rows: Where layers act at the queries, what they know of a step; where they did not act, it gives NaN, too.
    """

    def __init__(self, record: Record, query_rows: QueryRows | None = None) -> None:
        super().__init__()
        self.record, self.query_rows = record, query_rows
        self.known: list[bool] = []  # of the last step: which prompts got a vector
        # vLLM builds models under the default type of their weights, which would round these.
        scores = torch.tensor(record.scores or (0.0,) * record.count, dtype=torch.float32)
        self.register_buffer("weights", scores.softmax(dim=0)[:, None], persistent=False)

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Embeddings alone: states of single tokens mean nothing here."""
        return {"embed"}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        """Ask for the token ids."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor]:
        """Pool what is complete; of the others keep what is computed.

        Args:
            hidden_states: ``(tokens, H)``: what this step computed of all prompts, one after another.
            pooling_metadata: What vLLM knows of the prompts.

        Returns:
            ``(H,)`` in float32 for each prompt; NaN for those that are not complete, which vLLM drops.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        token_ids = pooling_metadata.prompt_token_ids_cpu
        lengths, ends = cursor.prompt_lens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        parts = hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist())
        unknown = hidden_states.new_full((hidden_states.shape[-1],), torch.nan, dtype=torch.float32)
        query_ids, rows = self.record.query_ids, []
        self.known = []
        missed = self.query_rows is not None and not self.query_rows.acted
        for row, (states, end, length) in enumerate(zip(parts, ends, lengths, strict=True)):
            kept = pooling_metadata.pooling_states[row].hidden_states_cache
            tail = keep_tail(kept, states, end, length, self.record.count)
            ids = None if token_ids is None else token_ids[row]
            complete = tail is not None and len(tail) == self.record.count and not missed
            known = complete and ids is not None and ends_with(ids, length, query_ids)
            self.known.append(known)
            rows.append((tail.float() * self.weights).sum(0) if known and tail is not None else unknown)
        return rows


class QueryPooler(SequencePooler):
    """Pools, and gives one NaN in place of a vector of them: of that, ``/v2/embed`` would make bits, which are all zero."""

    pooling: QueryPool

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> Tensor | list[Tensor]:
        """Vectors ``(D,)``, and ``(1,)`` where there is none."""
        vectors: Tensor | list[Tensor] = super().forward(hidden_states, pooling_metadata)
        if all(self.pooling.known):
            return vectors
        return [vector if known else vector[:1] for vector, known in zip(vectors, self.pooling.known, strict=True)]


def build_pooler(model_config: ModelConfig, query_rows: QueryRows | None = None) -> QueryPooler:
    """The pooler of the served folder; ``query_rows`` as :class:`QueryPool` takes it.

    Raises:
        ValueError: If a file is missing or does not fit.
    """
    record = record_of(model_config)
    head = EmbeddingPoolerHead(
        head_dtype=torch.float32, projector=_read_head(record, model_config), activation=PoolerNormalize()
    )
    return QueryPooler(pooling=QueryPool(record, query_rows), head=head)


def _read_head(record: Record, model_config: ModelConfig) -> nn.Module | None:
    # Not vLLM's own reader of Dense modules: it logs an error, and goes on without the head.
    from safetensors.torch import load

    if record.projection is None:
        return None
    tensors = load(read_file(model_config, HEAD_NAME))
    weights = {name.removeprefix("linear."): value.float() for name, value in tensors.items()}
    head = nn.Linear(weights["weight"].shape[1], record.projection, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(weights[name])
    return head
