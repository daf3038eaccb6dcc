"""What a training run costs, counted on a model of true widths and few layers: FLOPs by torch's counter, bytes by allocation.

All layers of a tower are alike, so what one of them costs gives the cost of all. The last layer of a prefix pass is another
case: it ends with its keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common import tensors_of, to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from slq_embed import SLQEncoder

RESERVE = 1.5e9
"""Bytes of a card that neither weights nor tensors take: the CUDA context and gaps between tensors. An assumption."""


@dataclass(frozen=True)
class Cost:
    """What an input of a column costs with all layers.

    Args:
        tokens: Its length, without the queries.
        pixel_bytes: Its features. All are counted, though those of images are on the device for one pass only.
        prefix_flops: Of the pass over the input.
        query_flops: Of the queries' pass.
        backward_flops: Of the backward pass through it.
        prefix_bytes: Of its keys and values.
        chunk_bytes: The most that it takes while its chunk is embedded or differentiated, without the cache of the query pass.
    """

    tokens: int
    pixel_bytes: int
    prefix_flops: float
    query_flops: float
    backward_flops: float
    prefix_bytes: float
    chunk_bytes: float


@dataclass(frozen=True)
class Card:
    """A GPU: bytes, and its published peak in dense bfloat16, in FLOP/s."""

    name: str
    nbytes: float
    peak: float


CARDS = (Card("RTX 4090", 24e9, 165e12), Card("A100 80GB", 80e9, 312e12))


@dataclass(frozen=True)
class Estimate:
    """A run on a card; everything is estimated.

    Args:
        weight_bytes: Of the backbone in bfloat16.
        input_bytes: Of a batch's pixels and tokens.
        largest_chunk: Rows that can be differentiated at a time; 0 if the run does not fit.
        kept: Share of a step's prefixes that stay in memory for the second pass; the others are computed twice.
        step_flops: Of a step.
        hours: To finish.
    """

    weight_bytes: float
    input_bytes: float
    largest_chunk: int
    kept: float
    step_flops: float
    hours: float


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside of it and are still alive.

    Args:
        known: Tensors that are there already.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._known = {storage._cdata for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def stacks(model: nn.Module) -> dict[str, int]:
    """Names and lengths of the outermost lists of layers."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: size for name, size in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def with_all_layers(flops: Mapping[str, Mapping[Any, int]], small: nn.Module, full: nn.Module) -> int:
    """FLOPs of a model with all layers, from those counted by module in one with few.

    Each missing layer costs what the first of its list does, so a list with a shorter last layer needs two.
    """
    total, lengths = sum(flops["Global"].values()), stacks(full)
    for name, size in stacks(small).items():
        layer = flops.get(f"{type(small).__name__}.{name}.0", {})
        total += (lengths[name] - size) * sum(layer.values())
    return total


def flops_of(call: Callable[[], Any]) -> tuple[Any, Mapping[str, Mapping[Any, int]]]:
    """What a call returns, and its FLOPs by module.

    Attention is taken apart into matrix products while they are counted: of its fused kernels, torch 2.11 refuses to count those with
    fewer heads of keys than of queries, and does not count that of a CPU. Counted so, the backward pass does not compute the scores
    again, as the fused kernels do; for a query pass that is at most 1.7 % of it.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_flop_counts()


def count(model: SLQEncoder, full: nn.Module, inputs: list[Any]) -> Cost:
    """The cost of an input.

    Args:
        model: With a small backbone, on any device.
        full: The decoder with all layers, on the meta device.
        inputs: Inputs of one column and one size; the cost is their mean.
    """
    rows, small, transformer = len(inputs), model.backbone.base_model, model.transformer
    layers = full.config.get_text_config().num_hidden_layers / small.config.get_text_config().num_hidden_layers
    features = to_device(model.preprocess(inputs, keyed=False), model.device)
    tensors = tensors_of(features)
    model.train()
    prefix, counted = flops_of(lambda: transformer.prefix(features))
    prefix_flops = with_all_layers(counted, small, full)
    states, counted = flops_of(lambda: transformer.query_states(prefix))
    query_flops = layers * sum(counted["Global"].values())  # the queries run through language layers only
    _, counted = flops_of(lambda: states.sum().backward())
    backward_flops = layers * sum(counted["Global"].values())
    length = prefix.attention_mask.shape[1]
    del prefix, states
    with LiveBytes([*model.backbone.parameters(), *model.backbone.buffers(), *model.parameters(), *tensors]) as memory:
        prefix = transformer.prefix(features)
        prefix_peak = memory.peak
        prefix_bytes = layers * sum(part.nbytes for layer in prefix.layers for part in layer)
        states = transformer.query_states(prefix)
        differentiated = layers * memory.live  # the prefix, and what the backward pass needs
        memory.peak = memory.live
        before = memory.live
        states.sum().backward()
        backward_peak = memory.peak - before
    model.zero_grad()
    chunk_bytes = max(prefix_peak + prefix_bytes, 2 * prefix_bytes, differentiated + backward_peak)
    return Cost(
        length,
        sum(tensor.nbytes for tensor in tensors) // rows,
        prefix_flops / rows,
        query_flops / rows,
        backward_flops / rows,
        prefix_bytes / rows,
        chunk_bytes / rows,
    )


def estimate(
    costs: list[Cost], parameters: int, card: Card, batch: int, queries: int, steps: int, used: float
) -> Estimate:
    """A run on a card, by the formulas of docs/guides/recipes.md.

    Args:
        costs: Of each column.
        parameters: Of the backbone.
        card: The card.
        batch: Pairs a step.
        queries: Of the model.
        steps: Of the run.
        used: Share of the card's peak that the run reaches: an assumption.
    """
    weights, inputs = 2.0 * parameters, batch * sum(cost.pixel_bytes for cost in costs)
    free = card.nbytes - weights - inputs - RESERVE
    prefixes = batch * sum(cost.prefix_bytes for cost in costs)
    kept = min(max(free, 0) / 2, prefixes)  # a step keeps prefixes in half of what is free; see StepMemory
    # While the queries run, a cache holds another copy of keys and values, with those of the queries behind them.
    row = max(cost.chunk_bytes + cost.prefix_bytes * (cost.tokens + queries) / cost.tokens for cost in costs)
    largest = int(max(free - kept, 0) // row)
    share = kept / prefixes
    # First pass: prefix and queries. Second pass: what was not kept, the queries again, and back.
    flops = sum((2 - share) * cost.prefix_flops + 2 * cost.query_flops + cost.backward_flops for cost in costs)
    hours = steps * batch * flops / (card.peak * used) / 3600
    return Estimate(weights, inputs, min(largest, batch), share, batch * flops, hours)
