"""A prefix: keys and values that the frozen backbone computes for an input before any query, and how queries continue."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slq_embed.backbone.families import family_of
from slq_embed.prefix.cache import BackboneCache, Layers, PrefixReadyError, States, filled_cache, read_cache
from slq_embed.prefix.features import Features, backbone_inputs, lay_out


@dataclass(frozen=True)
class PrefixRow:
    """What the backbone keeps of one input, without padding.

    Args:
        layers: For each layer its keys and values, each ``(heads, seq, head_dim)``, or nothing.
        last_position: The position of its last token.
        axes: How many axes positions have: 3 or more where the backbone has time, height and width, else 1.
        states: States of fixed size, by name; see :data:`slq_embed.prefix.cache.States`.
    """

    layers: Layers
    last_position: int
    axes: int
    states: States = field(default_factory=dict)

    @property
    def length(self) -> int:
        """How many tokens the input has."""
        return int(next(layer for layer in self.layers if layer)[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return sum(part.nbytes for part in [*chain(*self.layers), *self.states.values()])


@dataclass(frozen=True)
class Prefix:
    """What the backbone keeps of a left-padded batch of inputs. Queries do not change it: it can be used again.

    Args:
        layers: For each layer its keys and values, each ``(batch, heads, seq, head_dim)``, or nothing.
        attention_mask: ``(batch, seq)``, 1 for real tokens.
        last_position: ``(batch,)``, the position of each row's last token.
        axes: As in :class:`PrefixRow`.
        states: States of fixed size, ``(batch, ...)``, by name.
    """

    layers: Layers
    attention_mask: Tensor
    last_position: Tensor
    axes: int
    states: Mapping[str, Tensor] = field(default_factory=dict)


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
        kind = dtype if parts[0].is_floating_point() else parts[0].dtype  # positions stay whole numbers
        joined = torch.empty(len(parts), heads, longest, width, device=target, dtype=kind)
        for row, part in zip(joined, parts, strict=True):
            padding = longest - part.shape[1]
            row[:, :padding] = 0  # masked, but what is masked must be finite
            row[:, padding:].copy_(part, non_blocking=True)
        return joined

    layers = tuple(
        tuple(join([row.layers[number][part] for row in rows]) for part in range(len(layer)))
        for number, layer in enumerate(rows[0].layers)
    )
    states = {name: torch.stack([row.states[name].to(device) for row in rows]) for name in rows[0].states}
    lengths = torch.tensor([row.length for row in rows], device=device)
    mask = torch.arange(longest, device=device)[None] >= longest - lengths[:, None]
    last = torch.tensor([row.last_position for row in rows], device=device)
    return Prefix(layers, mask.long(), last, rows[0].axes, states)


def token_positions(decoder: PreTrainedModel, features: Features) -> Tensor:
    """The positions of a batch's tokens. With them, an embedding is the same alone and in any batch.

    Without them, the backbone counts the padding, or reuses ``rope_deltas`` of an earlier batch.

    Args:
        decoder: The backbone without its head.
        features: As from :func:`slq_embed.prefix.features.lay_out`.

    Returns:
        ``(batch, seq)``; ``(axes, batch, seq)`` for backbones with time, height and width (M-RoPE).
    """
    mask = features["attention_mask"]
    positions: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if (rope_index := getattr(decoder, "get_rope_index", None)) is None:
        return positions
    if not {"pixel_values", "pixel_values_videos", "mm_encoder_outputs"} & features.keys():
        return positions.expand(_axes(decoder.config), -1, -1)
    known = inspect.signature(rope_index).parameters
    found = []
    # HunYuan-VL counts images over the whole batch, so a row's positions would follow from the rows before it.
    for part in [features] if family_of(decoder.config).batches_images else _rows(features):
        # Qwen-Omni's processor names the seconds of a video otherwise than its positions do.
        named = {**part, "second_per_grids": part.get("video_second_per_grid")}
        found.append(rope_index(**{key: value for key, value in named.items() if key in known})[0])
    return torch.cat(found, dim=1).long()  # whole numbers, which Qwen-Omni gives as floats


def _axes(config: PretrainedConfig) -> int:
    """How many axes the positions of a backbone with time, height and width have; HunYuan-VL has one more."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or range(3))


def _rows(features: Features) -> list[Features]:
    """Each row of a batch that was laid out as a batch of its own: its tokens and the sizes of its images and videos."""
    count = len(features["input_ids"])
    rows: list[Features] = [{} for _ in range(count)]
    pieces = features.get("media_pieces", {})
    for key, value in features.items():
        if not isinstance(value, Tensor) or not value.ndim:
            continue
        if key in pieces:
            for row, part in zip(rows, value.split(pieces[key]), strict=True):
                row |= {key: part} if len(part) else {}
        elif len(value) == count:
            for number, row in enumerate(rows):
                row[key] = value[number : number + 1]
    return rows


def continue_positions(last_position: Tensor, count: int, axes: int) -> Tensor:
    """Positions ``(batch, count)`` after the last one of each row; for several axes ``(axes, batch, count)``."""
    positions = last_position[:, None] + torch.arange(1, count + 1, device=last_position.device)
    return positions if axes == 1 else positions.expand(axes, -1, -1)


def last_positions(positions: Tensor) -> Tensor:
    """The position of each row's last token, ``(batch,)``: queries stand where text would go on.

    It need not be the row's largest: the text after a long video of Qwen2-VL has positions below those of the video's last
    frames.
    """
    last = positions[..., -1]  # of a real token: batches are padded on the left
    return last.amax(dim=0) if positions.ndim == 3 else last


@torch.no_grad()
def run_prefix(decoder: PreTrainedModel, features: Features) -> list[PrefixRow]:
    """Run the frozen backbone over everything before the queries, without autograd.

    Args:
        decoder: The backbone without its head.
        features: See :mod:`slq_embed.prefix.features`.

    Returns:
        A prefix for each row; keys and values are views of those of the batch.
    """
    features = lay_out(features)
    positions = token_positions(decoder, features)
    mask = features["attention_mask"]
    # Read before the decoder starts: afterwards, these numbers would have to wait for a GPU to finish it.
    last = last_positions(positions).tolist()
    starts = (mask.shape[1] - mask.sum(dim=1)).tolist()
    cache = BackboneCache(decoder.config, stop=True)
    with suppress(PrefixReadyError):
        decoder(
            input_ids=features["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,  # Sentence Transformers turns it off in the configurations of what it loads
            **prepared_inputs(decoder, features),
        )
    axes = len(positions) if positions.ndim == 3 else 1
    layers, states = read_cache(cache)
    return [
        PrefixRow(
            tuple(tuple(part[row, :, start:] for part in layer) for layer in layers),
            last[row],
            axes,
            {name: state[row] for name, state in states.items()},
        )
        for row, start in enumerate(starts)
    ]


def run_queries(decoder: PreTrainedModel, prefix: Prefix, queries: Tensor) -> Tensor:
    """Run the queries, and nothing else, after a prefix. Autograd sees only the queries.

    Args:
        decoder: The backbone without its head.
        prefix: From :func:`collate`.
        queries: ``(Q, H)`` in the backbone's dtype. Their token ids, ``(Q,)``, for a decoder of
            :func:`slq_embed.modules.query_embeddings.embed_query_tokens`.

    Returns:
        Last hidden states at the queries, ``(batch, Q, H)``.
    """
    batch, count = len(prefix.attention_mask), len(queries)
    mask = torch.cat([prefix.attention_mask, prefix.attention_mask.new_ones(batch, count)], dim=1)
    return _last_states(
        decoder,
        **{_name_of(queries): queries.expand(batch, *queries.shape)},
        attention_mask=mask,
        position_ids=continue_positions(prefix.last_position, count, prefix.axes),
        past_key_values=filled_cache(decoder.config, prefix.layers, prefix.states),
        use_cache=True,
    )


def run_all_positions(
    decoder: PreTrainedModel, features: Features, queries: Tensor, give_positions: bool = True
) -> Tensor:
    """Run prefix and queries as one sequence: the reference for the prefix path, and faster for short texts.

    The queries enter as embeddings, so the shared backbone needs no new row in its table and no hook. Where it must see token
    ids, a twin of its embedding layer gives the queries for theirs.

    Args:
        decoder: The backbone without its head.
        features: See :mod:`slq_embed.prefix.features`.
        queries: As for :func:`run_queries`.
        give_positions: Whether to say where tokens stand. Plain Sentence Transformers does not, and the backbone counts.

    Returns:
        Last hidden states at the queries, ``(batch, Q, H)``.
    """
    features = lay_out(features)
    mask = features["attention_mask"]
    batch, count = len(mask), len(queries)
    position_ids = None
    if give_positions:
        positions = token_positions(decoder, features)
        axes = len(positions) if positions.ndim == 3 else 1
        position_ids = torch.cat([positions, continue_positions(last_positions(positions), count, axes)], dim=-1)
    ids = features["input_ids"]
    tokens = ids if queries.ndim == 1 else decoder.get_input_embeddings()(ids)
    extra = prepared_inputs(decoder, features)
    for key, value in extra.items():
        if isinstance(value, Tensor) and value.shape == mask.shape:  # token types
            types = value.new_full((batch, count), family_of(decoder.config).query_token_type)
            extra[key] = torch.cat([value, types], dim=1)
    states = _last_states(
        decoder,
        **{_name_of(queries): torch.cat([tokens, queries.expand(batch, *queries.shape)], dim=1)},
        attention_mask=torch.cat([mask, mask.new_ones(batch, count)], dim=1),
        position_ids=position_ids,
        use_cache=False,
        **extra,
    )
    return states[:, -count:]


def _name_of(queries: Tensor) -> str:
    """The input of a backbone that takes the queries: token ids ``(Q,)``, or embeddings ``(Q, H)``."""
    return "input_ids" if queries.ndim == 1 else "inputs_embeds"


def _last_states(decoder: PreTrainedModel, **inputs: Any) -> Tensor:
    if not decoder.can_generate():
        return decoder(**inputs).last_hidden_state
    return decoder(**inputs, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]


def prepared_inputs(decoder: PreTrainedModel, features: Features) -> Features:
    """The features that a backbone reads beside the tokens, in a form in which it reads them right."""
    extra, family = backbone_inputs(features), family_of(decoder.config)
    if family.batches_images:
        return extra
    if not family.casts_pixels:
        floats = {key: value for key, value in extra.items() if isinstance(value, Tensor) and value.is_floating_point()}
        extra |= {key: value.to(decoder.dtype) for key, value in floats.items()}
    for name, pixels in family.patch_indices.items():
        if name in extra:
            pieces = features["media_pieces"]
            extra[name] = _renumbered(extra[name], pieces[name], pieces[pixels], extra[pixels].shape[1])
    if family.pixels_axis and "pixel_values" in extra:
        extra["pixel_values"] = extra["pixel_values"].movedim(0, family.pixels_axis)
    return extra


def _renumbered(patches: Tensor, counts: Sequence[int], crops: Sequence[int], size: int) -> Tensor:
    """Numbers of patches as a batch counts them, from those of rows that each count their own.

    Args:
        patches: ``(pieces, ...)``, the pieces of one row after those of the other; a negative number is padding.
        counts: How many of these pieces each row has.
        crops: How many crops of pixels each row has.
        size: How many patches a crop has.

    Returns:
        ``(pieces, ...)``.
    """
    own = torch.tensor(crops, device=patches.device)
    before = (own.cumsum(0) - own) * size  # patches of earlier rows
    shift = before.repeat_interleave(torch.tensor(counts, device=patches.device))
    return torch.where(patches >= 0, patches + shift.view(-1, *[1] * (patches.ndim - 1)), patches)
