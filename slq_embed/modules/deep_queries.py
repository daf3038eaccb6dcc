"""Vectors that are added to the queries' states before each layer: the smallest addition to latent queries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def initial_deep_queries(decoder: PreTrainedModel, count: int) -> Tensor:
    """Zeros ``(layers, Q, H)``: they start as if they were not there."""
    config = decoder.config.get_text_config()
    return torch.zeros(config.num_hidden_layers, count, config.hidden_size)


def add_before_layers(twin: PreTrainedModel, vectors: nn.ParameterDict) -> None:
    """Let the layers of a twin add the vectors to the last positions of a sequence, which are the queries.

    Args:
        twin: From :func:`slq_embed.backbone.twin.twin_of`.
        vectors: Holds ``deep_queries``, ``(layers, Q, H)``; read at each call.

    Source:
        Prompts in each layer: arXiv:2110.07602 replaces the states of prompts; here they are added to.
    """
    for number, layer in enumerate(twin.get_decoder().layers):
        layer.register_forward_pre_hook(partial(_add, vectors=vectors, number=number), with_kwargs=True)


def _add(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, vectors: nn.ParameterDict, number: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = args[0] if args else kwargs["hidden_states"]
    added = vectors["deep_queries"][number].to(states.device, states.dtype)
    count = len(added)
    changed = torch.cat([states[:, :-count], states[:, -count:] + added], dim=1)
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})
