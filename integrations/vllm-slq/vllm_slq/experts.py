"""Weights of experts in the layout in which vLLM reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def turn_experts(weights: Iterable[tuple[str, Tensor]], text: Any) -> Iterator[tuple[str, Tensor]]:
    """Turn the experts of Qwen3-VL-MoE as they are published: transformers loads them turned, and saves them so.

    Args:
        weights: Names and weights of a saved folder.
        text: The configuration of the language model.

    Raises:
        ValueError: If the shapes do not tell whether they are turned.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> text = SimpleNamespace(model_type="qwen3_vl_moe_text", hidden_size=8, moe_intermediate_size=3)
        >>> saved = [("experts.gate_up_proj", torch.zeros(2, 6, 8)), ("experts.down_proj", torch.zeros(2, 8, 3))]
        >>> [tuple(weight.shape) for _, weight in turn_experts(saved, text)]
        [(2, 8, 6), (2, 3, 8)]
    """
    if text.model_type != "qwen3_vl_moe_text":
        yield from weights
        return
    width, inner = text.hidden_size, text.moe_intermediate_size
    published = {"experts.gate_up_proj": (width, 2 * inner), "experts.down_proj": (inner, width)}
    for name, weight in weights:
        shape = next((shape for ending, shape in published.items() if name.endswith(ending)), None)
        if shape is not None and shape[0] == shape[1]:
            raise ValueError(
                f"The experts of this Qwen3-VL-MoE have {inner} numbers where its states have {width}, so the shape of {name} "
                "does not tell how it is laid out. Serve another backbone."
            )
        turned = shape is not None and tuple(weight.shape[1:]) == shape[::-1]
        yield name, weight.transpose(1, 2).contiguous() if turned else weight
