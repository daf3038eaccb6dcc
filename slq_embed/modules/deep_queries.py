"""Vectors that are added to the queries' states before each layer: the smallest addition to latent queries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slq_embed.backbone.families import language_layers


def add_before_layers(twin: PreTrainedModel, vectors: nn.ParameterDict, count: int) -> None:
    """Let the layers of a twin add vectors to the last positions of a sequence, which are the queries.

    Args:
        twin: From :func:`slq_embed.backbone.twin.twin_of`.
        vectors: Gets ``deep_queries``, zeros ``(layers, Q, H)``, as if they were not there; read at each call.
        count: How many queries there are.

    Source:
        Prompts in each layer: arXiv:2110.07602 replaces the states of prompts; here they are added to.
    """
    config = twin.config.get_text_config()
    streams = hasattr(config, "hc_mult")
    vectors["deep_queries"] = nn.Parameter(torch.zeros(config.num_hidden_layers, count, config.hidden_size))
    for number, layer in enumerate(language_layers(twin)):
        layer.register_forward_pre_hook(
            partial(_add, vectors=vectors, number=number, streams=streams), with_kwargs=True
        )


def _add(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    vectors: nn.ParameterDict,
    number: int,
    streams: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states = args[0] if args else kwargs["hidden_states"]
    added = vectors["deep_queries"][number].to(states.device, states.dtype)
    # Some have several streams of states: Gemma 3n before the rows, hyper-connections in each position (here), Qwen4 in its width.
    added, axis = (added[:, None], -3) if streams else (added.repeat(1, states.shape[-1] // added.shape[-1]), -2)
    before, queries = states.split([states.shape[axis] - len(added), len(added)], dim=axis)
    changed = torch.cat([before, queries + added], dim=axis)
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})
