"""From the states at the query positions to one vector."""

from __future__ import annotations

from typing import Any, Literal, get_args

from sentence_transformers.base.modules.module import Module

PoolingMode = Literal["mean", "last"]


class LatentQueryPooling(Module):
    """Reduces ``token_embeddings`` of the queries to ``sentence_embedding``.

    Args:
        embedding_dimension: Width of the states, ``H``.
        pooling: ``"mean"`` over all queries (the paper's choice), or the ``"last"`` query alone.

    Raises:
        ValueError: If ``pooling`` is neither.

    Source:
        Mean over the last-layer states at the query positions: arXiv:2604.13710.
    """

    config_keys = ["embedding_dimension", "pooling"]  # noqa: RUF012 - as the host declares it

    def __init__(self, embedding_dimension: int, pooling: PoolingMode = "mean") -> None:
        super().__init__()
        if pooling not in get_args(PoolingMode):
            raise ValueError(f"pooling is {pooling!r}, but one of {get_args(PoolingMode)} is needed.")
        self.embedding_dimension = embedding_dimension
        self.pooling: PoolingMode = pooling

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
        features["sentence_embedding"] = states.mean(dim=1) if self.pooling == "mean" else states[:, -1]
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the embedding, ``H``."""
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the configuration."""
        self.save_config(output_path)
