"""A linear map after the pooling: the embedding can turn, and be shorter, while the backbone stays frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor, nn

from slq_embed.modules.latent_query_pooling import only_moved


class ProjectionHead(Dense):
    """The host's ``Dense`` without an activation, started as the identity; it is saved as ``Dense``.

    The weights stay float32, as the queries do.

    Args:
        width: Width of the pooled states, ``H``.
        dim: Width of the embedding. Below ``H``, it starts as the first ``dim`` numbers of the pooled states.

    Raises:
        ValueError: If ``dim`` is not between 1 and ``H``.
    """

    def __init__(self, width: int, dim: int) -> None:
        if not isinstance(dim, int) or not 1 <= dim <= width:
            raise ValueError(
                f"projection is {dim!r}, but True or a width from 1 to {width}, the backbone's, is needed."
            )
        super().__init__(width, dim, activation_function=nn.Identity(), init_weight=torch.eye(dim, width))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Map ``sentence_embedding`` from ``(batch, H)`` to ``(batch, dim)``, in float32 under autocast too."""
        with torch.autocast(features[self.module_input_name].device.type, enabled=False):
            return super().forward(features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProjectionHead:
        return super()._apply(only_moved(fn), recurse)
