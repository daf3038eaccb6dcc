"""The backbone's cache: what a pass over a prefix leaves in it, and a cache that starts from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

Layers = tuple[tuple[Tensor, ...], ...]
"""For each layer its keys and values, each ``(batch, heads, seq, head_dim)``, or nothing where it keeps none of its own. A layer
that chooses what it attends to has the keys it chooses by as well, ``(batch, 1, seq, width)``, and maybe positions,
``(batch, 1, seq, axes)``."""
States = Mapping[str, Tensor]
"""States of fixed size, ``(batch, ...)``, of convolutions and linear attention, by layer, kind and number: ``"0.conv.0"``."""

_EMPTY: Any = getattr(cache_utils, "DummyLayer", ())
"""A layer that keeps nothing: it uses the keys of an earlier layer, or has no attention. Old versions of transformers have none."""
_KINDS = ("conv", "recurrent")
_WINDOW_OF_ANSWERS = "reference_sliding_attention"
"""Unlimited-OCR's: only tokens that are decoded one by one leave its window, and in a run over input and queries there are none."""


class PrefixReadyError(Exception):
    """The last layer has its keys and values. Nothing that the backbone computes after them reaches the queries."""


class _LinearLayer(LinearAttentionLayer):
    """Keeps its state out of place: the backward pass needs the state that a query saw."""

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class BackboneCache(DynamicCache):
    """A cache whose layers grow only.

    A layer with a sliding window keeps all positions here, and its mask hides the old ones. So rows of different lengths
    can be joined.

    Args:
        config: The backbone's configuration.
        stop: Whether a :class:`PrefixReadyError` ends the forward pass once the last layer has its keys and values: before
            its attention, its MLP and the norm.

    Raises:
        ValueError: If a layer keeps another kind of state.
    """

    def __init__(self, config: PreTrainedConfig, stop: bool = False) -> None:
        super().__init__(config=config)
        last = None
        for number, layer in enumerate(self.layers):
            if isinstance(layer, _EMPTY):
                continue
            if (
                type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
                or getattr(layer, "_layer_type", None) == _WINDOW_OF_ANSWERS
            ):
                self.layers[number] = DynamicLayer()
            elif type(layer) is LinearAttentionLayer:
                self.layers[number] = _LinearLayer(layer.number_of_states)
            elif type(layer) is not DynamicIndexedLayer:
                raise ValueError(
                    f"Layer {number} of {config.model_type} keeps its state in a {type(layer).__name__}, which no prefix "
                    "can hold."
                )
            last = number
        if not any(isinstance(layer, DynamicLayer) for layer in self.layers):
            raise ValueError(f"No layer of {config.model_type} keeps keys, so a prefix would have no length.")
        # An indexer may put its keys after those of its layer, or have a layer for itself.
        self._last = last if stop and not any(isinstance(layer, DynamicIndexedLayer) for layer in self.layers) else None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, as the host does; then maybe stop."""
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            raise PrefixReadyError
        return updated


def read_cache(cache: DynamicCache) -> tuple[Layers, dict[str, Tensor]]:
    """What a pass left in a :class:`BackboneCache`."""
    layers: list[tuple[Tensor, ...]] = []
    states: dict[str, Tensor] = {}
    for number, layer in enumerate(cache.layers):
        has_keys = isinstance(layer, DynamicLayer) and layer.is_initialized  # not where it uses an earlier layer's
        layers.append(((layer.keys, layer.values) if has_keys else ()) + _indexer_parts(layer))
        if isinstance(layer, _LinearLayer):
            for kind in _KINDS:
                found = getattr(layer, f"{kind}_states")
                states |= {f"{number}.{kind}.{n}": state for n, state in found.items() if state is not None}
    return tuple(layers), states


def _indexer_parts(layer: Any) -> tuple[Tensor, ...]:
    """What an indexer keeps, laid out as keys are."""
    if not isinstance(layer, DynamicIndexedLayer) or not layer.is_indexer_initialized:
        return ()
    positions = getattr(layer, "indexer_position_ids", None)  # transformers 5.17 keeps none
    return (layer.indexer_keys[:, None], *(() if positions is None else (positions.movedim(0, -1)[:, None],)))


def filled_cache(config: PreTrainedConfig, layers: Layers, states: States) -> DynamicCache:
    """A cache that the backbone can extend; what it appends is not seen in ``layers`` and ``states``."""
    cache = BackboneCache(config)
    for layer, part in zip(cache.layers, layers, strict=True):
        own = part[: 2 if len(part) > 1 else 0]  # an indexer alone may have a layer that uses an earlier layer's keys
        if own:
            layer.lazy_initialization(*own)
            layer.keys, layer.values = own
        if chosen_by := part[len(own) :]:
            layer.lazy_initialization_indexer(chosen_by[0])
            layer.indexer_keys = chosen_by[0][:, 0]
            layer.indexer_position_ids = chosen_by[1][:, 0].movedim(-1, 0) if len(chosen_by) > 1 else None
    for name, state in states.items():
        number, kind, n = name.split(".")
        layer, index = cache.layers[int(number)], int(n)
        if kind == "conv":
            layer.lazy_initialization(conv_states=state, state_idx=index)
            layer.has_previous_state[index] = True
            state = state.clone()  # a pass over one query writes into it
        getattr(layer, f"{kind}_states")[index] = state
        getattr(layer, f"is_{kind}_states_initialized")[index] = True
    return cache
