"""From the states at the query positions to one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn

PoolingMode = Literal["mean", "last", "weighted"]


class LatentQueryPooling(Module):
    """Reduces ``token_embeddings`` of the queries to ``sentence_embedding``.

    Args:
        embedding_dimension: Width of the states, ``H``.
        pooling: ``"mean"`` over all queries (the paper's choice), the ``"last"`` query alone, or a mean that is ``"weighted"``: the
            softmax of ``Q`` learned scores, which start equal, as the mean.
        num_queries: ``Q``; weights need it.

    Raises:
        ValueError: If ``pooling`` is none of these, or weights come without ``num_queries``.

    Source:
        Mean over the last-layer states at the query positions: arXiv:2604.13710.
    """

    config_keys = ["embedding_dimension", "pooling"]  # noqa: RUF012 - as the host declares it

    def __init__(self, embedding_dimension: int, pooling: PoolingMode = "mean", num_queries: int | None = None) -> None:
        super().__init__()
        if pooling not in get_args(PoolingMode):
            raise ValueError(f"pooling is {pooling!r}, but one of {get_args(PoolingMode)} is needed.")
        self.embedding_dimension = embedding_dimension
        self.pooling: PoolingMode = pooling
        # Hosts exempt names with "bias" from weight decay, which must not touch the scores.
        self.bias = nn.ParameterDict()
        if pooling == "weighted":
            if num_queries is None:
                raise ValueError("pooling is 'weighted', but num_queries is None: a score for each query is needed.")
            self.bias["scores"] = nn.Parameter(torch.zeros(num_queries))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool the states.

        Args:
            features: Holds ``token_embeddings``, ``(batch, Q, H)``.
            **kwargs: Ignored.

        Returns:
            The features with ``sentence_embedding``, ``(batch, H)``.

        Example:
            >>> import torch
            >>> states = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])
            >>> LatentQueryPooling(2)({"token_embeddings": states})["sentence_embedding"]
            tensor([[2., 1.]])
        """
        states = features["token_embeddings"]
        if self.pooling == "mean":
            pooled = states.mean(dim=1)
        elif self.pooling == "last":
            pooled = states[:, -1]
        else:
            pooled = (states * query_weights(self.bias["scores"])[:, None]).sum(dim=1)
        features["sentence_embedding"] = pooled
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the embedding, ``H``."""
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Refuse: without the queries, a pooling over them cannot be loaded."""
        raise RuntimeError("LatentQueryPooling is saved by SLQEncoder.save_pretrained, which writes stock modules.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentQueryPooling:
        return super()._apply(only_moved(fn), recurse)


def only_moved(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``fn`` does to the device of a tensor, and not to its dtype: what is trained stays float32."""
    return lambda tensor: tensor.to(
        fn(torch.empty(0, device=tensor.device)).device
    )  # quantized tensors have no new_empty


def query_weights(scores: Tensor) -> Tensor:
    """The weights of the queries, ``(Q,)``, from their scores; they add up to 1."""
    return scores.softmax(dim=0)
