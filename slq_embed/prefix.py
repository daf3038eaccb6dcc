"""A prefix: what the frozen backbone makes of an input before any query, and how queries continue it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

_BOOKKEEPING = {"input_ids", "attention_mask", "modality", "num_images_per_sample", "task", "prompt_length"}
_BOOKKEEPING |= {"token_embeddings", "sentence_embedding", "log_temperature"}


@dataclass
class Prefix:
    """Keys and values of a left-padded batch of inputs.

    Args:
        cache: The backbone's cache; each layer ``(batch, heads, seq, head_dim)``.
        attention_mask: ``(batch, seq)``, 1 for real tokens.
        last_position: ``(batch,)``, the largest position of each row's real tokens.
        axes: How many axes positions have: 3 where the backbone has time, height and width, else 1.
    """

    cache: Cache
    attention_mask: Tensor
    last_position: Tensor
    axes: int


def strip_queries(features: dict[str, Any], num_queries: int) -> dict[str, Any]:
    """Drop the query columns, which left padding puts last in every row, from all per-token features."""
    shape = features["input_ids"].shape
    return {
        key: value[:, :-num_queries] if isinstance(value, Tensor) and value.shape == shape else value
        for key, value in features.items()
    }


def backbone_inputs(features: dict[str, Any]) -> dict[str, Any]:
    """The features that a backbone reads beside tokens and mask: pixels, grids, token types."""
    return {key: value for key, value in features.items() if key not in _BOOKKEEPING}


def token_positions(decoder: PreTrainedModel, features: dict[str, Any]) -> Tensor:
    """Explicit positions, which make an embedding the same alone and in any batch.

    Implicit ones count the padding, or reuse what an earlier batch left behind (``rope_deltas``).

    Args:
        decoder: The backbone without its head.
        features: Left-padded ``input_ids`` and ``attention_mask``, ``(batch, seq)``, and the image features.

    Returns:
        ``(batch, seq)``; ``(3, batch, seq)`` for backbones with time, height and width (M-RoPE).
    """
    mask = features["attention_mask"]
    positions: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if (rope_index := getattr(decoder, "get_rope_index", None)) is None:
        return positions
    if "pixel_values" not in features:
        return positions.expand(3, -1, -1)
    known = inspect.signature(rope_index).parameters
    return rope_index(**{key: value for key, value in features.items() if key in known})[0]


def continue_positions(last_position: Tensor, count: int, axes: int) -> Tensor:
    """Positions of ``count`` tokens after each row's last: ``(batch, count)``, or ``(axes, batch, count)``."""
    positions = last_position[:, None] + torch.arange(1, count + 1, device=last_position.device)
    return positions if axes == 1 else positions.expand(axes, -1, -1)


def last_positions(positions: Tensor, attention_mask: Tensor) -> Tensor:
    """The largest position over a row's real tokens and all axes, ``(batch,)``."""
    highest = positions.amax(dim=0) if positions.ndim == 3 else positions
    return highest.masked_fill(attention_mask == 0, 0).amax(dim=-1)


@torch.no_grad()
def run_prefix(decoder: PreTrainedModel, features: dict[str, Any]) -> Prefix:
    """Run the frozen backbone over everything before the queries, without autograd.

    Args:
        decoder: The backbone without its head.
        features: Left-padded features without query columns.
    """
    positions = token_positions(decoder, features)
    mask = features["attention_mask"]
    output = decoder(
        input_ids=features["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,  # Sentence Transformers turns it off in the configurations of what it loads
        **backbone_inputs(features),
    )
    axes = 3 if positions.ndim == 3 else 1
    return Prefix(output.past_key_values, mask, last_positions(positions, mask), axes)


def run_queries(decoder: PreTrainedModel, prefix: Prefix, queries: Tensor) -> Tensor:
    """Run the queries, and nothing else, against a prefix; autograd sees only them.

    The prefix's cache grows by the queries: use each prefix once.

    Args:
        decoder: The backbone without its head.
        prefix: From :func:`run_prefix`.
        queries: ``(Q, H)`` in the backbone's dtype.

    Returns:
        Last hidden states at the queries, ``(batch, Q, H)``.
    """
    batch, count = len(prefix.attention_mask), len(queries)
    mask = torch.cat([prefix.attention_mask, prefix.attention_mask.new_ones(batch, count)], dim=1)
    output = decoder(
        inputs_embeds=queries.expand(batch, -1, -1),
        attention_mask=mask,
        position_ids=continue_positions(prefix.last_position, count, prefix.axes),
        past_key_values=prefix.cache,
        use_cache=True,
    )
    states: Tensor = output.last_hidden_state
    return states


def run_all_positions(decoder: PreTrainedModel, features: dict[str, Any], queries: Tensor) -> Tensor:
    """Run prefix and queries as one sequence: the fastest way to encode, and the reference for training.

    The queries enter as embeddings, so no table and no hook of the shared backbone is touched.

    Args:
        decoder: The backbone without its head.
        features: Left-padded features without query columns.
        queries: ``(Q, H)`` in the backbone's dtype.

    Returns:
        Last hidden states at the queries, ``(batch, Q, H)``.
    """
    positions = token_positions(decoder, features)
    mask = features["attention_mask"]
    batch, count = len(mask), len(queries)
    axes = 3 if positions.ndim == 3 else 1
    continued = continue_positions(last_positions(positions, mask), count, axes)
    tokens = decoder.get_input_embeddings()(features["input_ids"])
    extra = backbone_inputs(features)
    for key, value in extra.items():
        if isinstance(value, Tensor) and value.shape == mask.shape:  # token types: queries are text
            extra[key] = torch.cat([value, value.new_zeros(batch, count)], dim=1)
    output = decoder(
        inputs_embeds=torch.cat([tokens, queries.expand(batch, -1, -1)], dim=1),
        attention_mask=torch.cat([mask, mask.new_ones(batch, count)], dim=1),
        position_ids=torch.cat([positions, continued], dim=-1),
        use_cache=False,
        **extra,
    )
    states: Tensor = output.last_hidden_state
    return states[:, -count:]
