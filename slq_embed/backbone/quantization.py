"""Quantized weights: how a backbone was quantized, what its weights hold, and how gradients pass them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

IN_MEMORY = "in memory"
"""The method that is recorded where no file can say how a backbone was quantized."""
_SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules")  # of torchao, of bitsandbytes
_LORA = r".*\.lora_[AB]\..*"  # transformers 5.23 quantizes an adapter that it loads onto a quantized model
_PACKAGES = {"torchao": "slq-embed[quantization]", "bitsandbytes": "bitsandbytes"}


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is a tensor subclass that holds its values in another dtype than it shows."""
    return is_traceable_wrapper_subclass(weight) and any(part.dtype != weight.dtype for _, part in parts_of(weight))


def parts_of(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a weight consists of, by name; a plain weight is its only part."""
    if not is_traceable_wrapper_subclass(weight):
        yield "", weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in names:
        for inner, part in parts_of(getattr(weight, name)):
            yield f".{name}{inner}", part


def packing_of(weight: Tensor) -> str:
    """What says, beside its parts, what the values of a weight are; empty for a plain one."""
    if not is_traceable_wrapper_subclass(weight):
        return ""
    return f"{type(weight).__name__} {weight.__tensor_flatten__()[1]}"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are in memory. The host's ``get_memory_footprint`` counts packed ones as dense."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for weight in model.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:  # scales of bitsandbytes' 4 bits
            scales = (value for value in state.as_dict().values() if isinstance(value, Tensor))
            tensors |= {id(scale): scale for scale in scales}
    return sum(part.nbytes for tensor in tensors.values() for _, part in parts_of(tensor))


def is_quantized(backbone: PreTrainedModel) -> bool:
    """Whether some weights are quantized, by the host on loading or by hand afterwards."""
    return bool(getattr(backbone, "is_quantized", False)) or any(map(is_packed, backbone.parameters()))


def quantization_of(backbone: PreTrainedModel) -> dict[str, Any] | None:
    """How a backbone was quantized on loading, as its configuration says it.

    Returns:
        The host's ``quantization_config`` as plain values. ``{"quant_method": "in memory"}`` if no file can say how: the
        loaded model was quantized by hand, or the host cannot read its own setting again. None if nothing is quantized,
        or the checkpoint itself is, so that loading it again gives the same.
    """
    if not is_quantized(backbone):
        return None
    quantizer, config = getattr(backbone, "hf_quantizer", None), getattr(backbone.config, "quantization_config", None)
    if quantizer is None or config is None:
        return {"quant_method": IN_MEMORY}
    if quantizer.pre_quantized:
        return None
    settings = config if isinstance(config, dict) else config.to_dict()
    values: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    try:
        AutoQuantizationConfig.from_dict(values)
    except Exception:  # torchao 0.18 reads settings of its prototypes from no file
        return {"quant_method": IN_MEMORY}
    return values


def stock_quantization(backbone: PreTrainedModel, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for stock loading, where the decoder comes without its head and layers have other names.

    Args:
        backbone: The quantized backbone.
        quantization: From :func:`quantization_of`.
    """
    layers = backbone.base_model.named_modules()
    plain = [name for name, layer in layers if type(layer) is nn.Linear and not is_packed(layer.weight)]
    return {**quantization, **{name: [*plain, _LORA] for name in _SKIPPED if name in quantization}}


def require_package(quantization_config: Any) -> None:
    """Raise an ImportError if the package that quantizes is not installed."""
    values = quantization_config if isinstance(quantization_config, Mapping) else vars(quantization_config)
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if method in _PACKAGES and find_spec(method) is None:
        raise ImportError(
            f"The backbone is to be quantized by {method}, which is not installed. Install it: "
            f"pip install '{_PACKAGES[method]}'."
        )


def keep_layout(backbone: PreTrainedModel) -> None:
    """Let the 4-bit weights of bitsandbytes stay as they are loaded; nothing else has such layers.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs them anew at the first pass without gradients. It rounds their
    scales to bfloat16, its kernel passes no gradient, and ``state_dict`` brings the scales into a wrong order.

    Args:
        backbone: Its layers are told not to do that.

    Raises:
        ValueError: If that has happened.
    """
    for layer in backbone.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "The backbone has run on this CPU, where bitsandbytes changed its 4-bit weights, so they are not those that "
                    "were loaded. Load it again and pass it on before its first use."
                )
            layer.support_avx512bf16_for_cpu = False


def pass_gradients(twin: nn.Module) -> bool:
    """Let gradients pass the packed linear layers of a twin at no cost in memory; True if there are any.

    Left alone, torchao keeps the dense copy of each weight until the backward pass, so all of them at once, and its
    4-bit kernels have no backward pass at all. Here a dense copy is made in the backward pass, of one layer at a time.

    Args:
        twin: From :func:`slq_embed.backbone.twin.twin_of`; the original is not changed.
    """
    layers = [layer for layer in twin.modules() if isinstance(layer, nn.Linear) and is_packed(layer.weight)]
    for layer in layers:
        vars(layer)["forward"] = MethodType(_forward, layer)
    return bool(layers)


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    result: Tensor = _FrozenLinear.apply(states, layer.weight, layer.bias)
    return result


class _FrozenLinear(torch.autograd.Function):
    """A linear layer that is not trained: the gradient of its input needs nothing but the weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ _dense(ctx.weight, gradient), None, None


def _dense(weight: Tensor, like: Tensor) -> Tensor:
    if hasattr(weight, "dequantize") and type(weight).dequantize is not Tensor.dequantize:
        dense: Tensor = weight.dequantize()
        return dense.to(like.dtype)
    # Kernels whose packing nobody can read still multiply: the columns are the images of the unit vectors.
    unit = torch.eye(weight.shape[1], dtype=like.dtype, device=like.device)
    return nn.functional.linear(unit, weight).T
