"""A prefix: keys and values that the frozen backbone computes for an input before any query, and how queries continue."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from slq_embed.backbone.families import text_config
from slq_embed.prefix.features import Features

_BOOKKEEPING = {"input_ids", "attention_mask", "modality", "num_images_per_sample", "prefix_key", "task"}
_BOOKKEEPING |= {"prefix_stored", "prompt_length", "token_embeddings", "sentence_embedding", "log_temperature"}

Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class PrefixRow:
    """Keys and values of one input, without padding.

    Args:
        layers: For each layer its keys and values, each ``(heads, seq, head_dim)``.
        last_position: The largest position of its tokens.
        axes: How many axes positions have: 3 where the backbone has time, height and width, else 1.
    """

    layers: Layers
    last_position: int
    axes: int

    @property
    def length(self) -> int:
        """How many tokens the input has."""
        return int(self.layers[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(part.numel() * part.element_size() for layer in self.layers for part in layer)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a left-padded batch of inputs. Queries do not change it: it can be used again.

    Args:
        layers: For each layer its keys and values, each ``(batch, heads, seq, head_dim)``.
        attention_mask: ``(batch, seq)``, 1 for real tokens.
        last_position: ``(batch,)``, the largest position of each row's real tokens.
        axes: As in :class:`PrefixRow`.
    """

    layers: Layers
    attention_mask: Tensor
    last_position: Tensor
    axes: int

    def cache(self) -> DynamicCache:
        """A cache that the backbone can extend; what it appends is not seen here."""
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache


def collate(rows: Sequence[PrefixRow], device: torch.device, dtype: torch.dtype) -> Prefix:
    """Join inputs to a left-padded batch.

    Args:
        rows: The inputs, at least one.
        device: Where to bring layers that are in main memory. A layer on an accelerator stays on its device.
        dtype: dtype of keys and values in the batch.

    Returns:
        The batch; its keys and values are copies.
    """
    longest = max(row.length for row in rows)

    def join(parts: Sequence[Tensor]) -> Tensor:
        heads, _, width = parts[0].shape
        target = parts[0].device if parts[0].device.type != "cpu" else device
        joined = torch.empty(len(parts), heads, longest, width, device=target, dtype=dtype)
        for row, part in zip(joined, parts, strict=True):
            padding = longest - part.shape[1]
            row[:, :padding] = 0  # masked, but what is masked must be finite
            row[:, padding:].copy_(part, non_blocking=True)
        return joined

    depth = range(len(rows[0].layers))
    layers = tuple((join([row.layers[n][0] for row in rows]), join([row.layers[n][1] for row in rows])) for n in depth)
    lengths = torch.tensor([row.length for row in rows], device=device)
    mask = torch.arange(longest, device=device)[None] >= longest - lengths[:, None]
    last = torch.tensor([row.last_position for row in rows], device=device)
    return Prefix(layers, mask.long(), last, rows[0].axes)


class _PrefixReadyError(Exception):
    """The last layer has its keys and values. Nothing that the backbone computes after them reaches the queries."""


class _PrefixCache(DynamicCache):
    """Stops the forward pass once the last layer has its keys and values: before its attention, its MLP and the norm."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self._last = layers - 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            raise _PrefixReadyError
        return updated


def backbone_inputs(features: Features) -> Features:
    """The features that a backbone reads in addition to tokens and mask: pixels, grids, token types."""
    return {key: value for key, value in features.items() if key not in _BOOKKEEPING}


def token_positions(decoder: PreTrainedModel, features: Features) -> Tensor:
    """The positions of a batch's tokens. With them, an embedding is the same alone and in any batch.

    Without them, the backbone counts the padding, or reuses ``rope_deltas`` of an earlier batch.

    Args:
        decoder: The backbone without its head.
        features: See :mod:`slq_embed.prefix.features`.

    Returns:
        ``(batch, seq)``; ``(3, batch, seq)`` for backbones with time, height and width (M-RoPE).
    """
    mask = features["attention_mask"]
    positions: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if (rope_index := getattr(decoder, "get_rope_index", None)) is None:
        return positions
    if not {"pixel_values", "mm_encoder_outputs"} & features.keys():
        return positions.expand(3, -1, -1)
    known = inspect.signature(rope_index).parameters
    return rope_index(**{key: value for key, value in features.items() if key in known})[0]


def continue_positions(last_position: Tensor, count: int, axes: int) -> Tensor:
    """Positions of the queries, which continue each row.

    Args:
        last_position: ``(batch,)``, the largest position of each row.
        count: How many positions follow.
        axes: As in :class:`PrefixRow`.

    Returns:
        ``(batch, count)``, or ``(axes, batch, count)`` for more than one axis.
    """
    positions = last_position[:, None] + torch.arange(1, count + 1, device=last_position.device)
    return positions if axes == 1 else positions.expand(axes, -1, -1)


def last_positions(positions: Tensor, attention_mask: Tensor) -> Tensor:
    """The largest position over a row's real tokens and all axes, ``(batch,)``."""
    highest = positions.amax(dim=0) if positions.ndim == 3 else positions
    return highest.masked_fill(attention_mask == 0, 0).amax(dim=-1)


@torch.no_grad()
def run_prefix(decoder: PreTrainedModel, features: Features) -> list[PrefixRow]:
    """Run the frozen backbone over everything before the queries, without autograd.

    Args:
        decoder: The backbone without its head.
        features: See :mod:`slq_embed.prefix.features`.

    Returns:
        A prefix for each row; keys and values are views of those of the batch.
    """
    positions = token_positions(decoder, features)
    mask = features["attention_mask"]
    cache = _PrefixCache(text_config(decoder).num_hidden_layers)
    with suppress(_PrefixReadyError):
        decoder(
            input_ids=features["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,  # Sentence Transformers turns it off in the configurations of what it loads
            **backbone_inputs(features),
        )
    axes = 3 if positions.ndim == 3 else 1
    last = last_positions(positions, mask).tolist()
    starts = (mask.shape[1] - mask.sum(dim=1)).tolist()
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return [
        PrefixRow(tuple((keys[row, :, start:], values[row, :, start:]) for keys, values in layers), last[row], axes)
        for row, start in enumerate(starts)
    ]


def run_queries(decoder: PreTrainedModel, prefix: Prefix, queries: Tensor) -> Tensor:
    """Run the queries, and nothing else, after a prefix. Autograd sees only the queries.

    Args:
        decoder: The backbone without its head.
        prefix: From :func:`collate`.
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
        past_key_values=prefix.cache(),
        use_cache=True,
    )
    states: Tensor = output.last_hidden_state
    return states


def run_all_positions(decoder: PreTrainedModel, features: Features, queries: Tensor) -> Tensor:
    """Run prefix and queries as one sequence: the reference for the prefix path, and faster for short texts.

    The queries enter as embeddings. So the shared backbone needs no new row in its table and no hook.

    Args:
        decoder: The backbone without its head.
        features: See :mod:`slq_embed.prefix.features`.
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
