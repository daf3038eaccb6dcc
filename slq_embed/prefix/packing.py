"""Packing: a prefix as a dict of tensors in main memory, in the precision of a store, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slq_embed.prefix.passes import PrefixRow
from slq_embed.store.entries import Entry, Precision

_FIXED = "fixed."


def pack_row(row: PrefixRow, precision: Precision) -> Entry:
    """Pack the keys and values of an input.

    Args:
        row: The prefix, on any device.
        precision: How to keep its keys and values.

    Returns:
        An entry that shares no memory with ``row``.

    Raises:
        ValueError: If the layers' keys and values differ in shape.
    """
    keys_and_values = [layer for layer in row.layers if layer]
    shapes = {part.shape for layer in keys_and_values for part in layer}
    if len(shapes) > 1 or len({len(layer) for layer in keys_and_values}) > 1:
        raise ValueError(
            f"This backbone's layers keep states of different shapes ({sorted(map(tuple, shapes))}), which "
            'a store cannot keep. Use PrefixStore(level="vision"), or no store.'
        )
    device = keys_and_values[0][0].device  # one copy to main memory, not two for each layer
    whole = torch.stack([torch.stack([part.to(device) for part in layer]) for layer in keys_and_values])
    entry = {"position": torch.tensor([row.last_position, row.axes]), **_pack_states("states", whole, precision)}
    if len(keys_and_values) < len(row.layers):
        entry["has_keys"] = torch.tensor([bool(layer) for layer in row.layers])
    for name, state in row.states.items():  # few numbers, and each token that follows adds to their error
        entry[f"{_FIXED}{name}"] = _own(state)
    return entry


def unpack_row(entry: Entry, dtype: torch.dtype, device: torch.device) -> PrefixRow:
    """The inverse of :func:`pack_row`.

    Args:
        entry: The packed prefix.
        dtype: dtype for states kept as int8; others stay in the dtype that they are kept in.
        device: Where to bring keys and values.
    """
    whole = _unpack_states("states", entry, dtype, device)
    last_position, axes = entry["position"].tolist()
    keys_and_values = iter(whole)
    has_keys = entry["has_keys"].tolist() if "has_keys" in entry else [True] * len(whole)
    layers = tuple(tuple(next(keys_and_values)) if present else () for present in has_keys)
    states = {name.removeprefix(_FIXED): part.to(device) for name, part in entry.items() if name.startswith(_FIXED)}
    return PrefixRow(layers, last_position, axes, states)


def pack_vision_row(row: Mapping[str, Tensor], precision: Precision) -> Entry:
    """Pack a row of :func:`slq_embed.prefix.vision.run_vision`; the entry shares no memory with it."""
    entry: Entry = {}
    for name, value in row.items():
        entry |= _pack_states(name, value, precision) if _is_states(name) else {name: _own(value)}
    return entry


def unpack_vision_row(entry: Entry, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The inverse of :func:`pack_vision_row`; ``dtype`` is that of the tower's features."""
    return {
        name: _unpack_states(name, entry, dtype, device).to(dtype) if _is_states(name) else value.to(device)
        for name, value in entry.items()
        if not name.endswith(".scale")
    }


def _is_states(name: str) -> bool:
    return name == "features" or name.startswith("deepstack.")


def _pack_states(name: str, states: Tensor, precision: Precision) -> Entry:
    """States ``(..., width)``; int8 has a scale ``(..., 1)`` for each row of ``width`` numbers."""
    if precision == "int8":
        scale = states.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
        return {name: _own((states / scale).round(), torch.int8), f"{name}.scale": _own(scale)}
    dtype = torch.bfloat16 if precision == "bfloat16" else states.dtype
    return {name: _own(states, dtype)}


def _own(part: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy in main memory, because rows are views of their batch; in order, because files hold no other tensors."""
    return part.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _unpack_states(name: str, entry: Entry, dtype: torch.dtype, device: torch.device) -> Tensor:
    states = entry[name].to(device, non_blocking=True)
    if f"{name}.scale" in entry:
        states = states.to(dtype) * entry[f"{name}.scale"].to(device, dtype, non_blocking=True)
    return states
