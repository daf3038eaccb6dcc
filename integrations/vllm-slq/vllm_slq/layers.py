"""What acts inside the layers at the latent queries only: deep queries, and a query adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_slq.record import ADAPTER_CONFIG_NAME, ADAPTER_NAME, DEEP_NAME, Record


class QueryRows:
    """At which rows of a step, which has the tokens of all prompts one after another, the latent queries stand.

    Args:
        query_ids: Their token ids, in order.

    Attributes:
        acted: Whether they were known in the last step. If not, its vectors are wrong.
        tokens: How many tokens the step has, where they are known.
    """

    def __init__(self, query_ids: tuple[int, ...]) -> None:
        self.query_ids = query_ids
        self.acted = False
        self.tokens: int | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def find(self, input_ids: Tensor) -> None:
        """Find the queries among the token ids of a step, ``(tokens,)``."""
        wanted = torch.tensor(self.query_ids, device=input_ids.device)
        rows, numbers = (input_ids[:, None] == wanted).nonzero(as_tuple=True)
        self._found, self.tokens = (rows, numbers), len(input_ids)

    def start(self) -> None:
        """Begin to compute the step."""
        self.acted = self._found is not None

    def end(self) -> None:
        """Forget the step."""
        self._found = self.tokens = None

    def of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the queries in ``(tokens, H)``, and which query each is; none in a step without token ids."""
        if self._found is None:
            none = torch.empty(0, dtype=torch.long, device=states.device)
            return none, none
        return self._found


def act_inside(
    model: nn.Module, record: Record, read: Callable[[str], bytes], layers: int, device: torch.device
) -> QueryRows:
    """Let the layers of a model of vLLM act at the queries as the trained model does.

    Args:
        model: The model; gets hooks.
        record: The record of the served folder.
        read: Gives the content of a file of the folder.
        layers: How many layers the language model has.
        device: Where it computes.

    Returns:
        What has to be told of each step.

    Raises:
        ValueError: If the model has no such layers.
    """
    language = _language_model(model)
    text, rows = _text_model(language, layers), QueryRows(record.query_ids)
    if record.deep_queries:
        vectors = load(read(DEEP_NAME))["deep_queries"].float().to(device)
        for number, layer in enumerate(text.layers):
            layer.register_forward_pre_hook(partial(_add, rows=rows, vectors=vectors[number]), with_kwargs=True)
    if record.query_adapter:
        settings, tensors = json.loads(read(ADAPTER_CONFIG_NAME)), load(read(ADAPTER_NAME))
        scale = settings["lora_alpha"] / settings["r"]
        packed: dict[str, list[str]] = {}
        for owner in (language, model):
            packed |= getattr(owner, "packed_modules_mapping", {})
        for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
            first, second = (tensors[f"{name}.lora_{part}.weight"].float().to(device) for part in "AB")
            if turn := getattr(language, "permute_qk_weight_for_rotary", None):  # Llama 4: rows in another order
                _, second = turn(f"{name}.weight", second)
            layer, start = _linear(text, packed, f"layers.{name.rpartition('.layers.')[2]}", len(second))
            update = partial(_update, rows=rows, first=first, second=second * scale, start=start)
            layer.register_forward_hook(update, with_kwargs=True)
    return rows


def _language_model(model: Any) -> Any:
    if isinstance(getattr(model, "model", None), PreTrainedModel):  # vLLM runs the code of transformers
        return model.model.get_decoder()
    return model.get_language_model() if hasattr(model, "get_language_model") else model


def _text_model(language: nn.Module, layers: int) -> Any:
    for module in language.modules():
        if isinstance(own := getattr(module, "layers", None), nn.ModuleList) and len(own) == layers:
            return module
    raise ValueError(
        f"vllm-slq finds no {layers} layers in {type(language).__name__} of vLLM, at which deep queries or a query adapter could "
        "act. Use slq_embed.serving."
    )


def _linear(text: nn.Module, packed: Mapping[str, Sequence[str]], name: str, width: int) -> tuple[nn.Module, int]:
    """The linear layer of vLLM that holds one of transformers with ``width`` outputs, and at which of its own those begin."""
    modules = dict(text.named_modules())
    for named in (name, name.replace(".conv.", ".short_conv.")):  # LFM2's, in vLLM
        if named in modules:
            return modules[named], 0
    path, _, own = name.rpartition(".")
    for whole, parts in packed.items():
        if own in parts and (layer := modules.get(f"{path}.{whole}")) is not None:
            sizes, number = layer.output_sizes, parts.index(own)
            if len(sizes) == len(parts) and sizes[number] == width:
                return layer, sum(sizes[:number])
            if len(parts) == 2:  # Qwen3.5 counts one of two parts as three
                return layer, number * (sum(sizes) - width)
    raise ValueError(
        f"The query adapter changes {name}, but {type(text).__name__} of vLLM has no such layer. Use slq_embed.serving, or "
        "train queries without an adapter."
    )


def _add(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, rows: QueryRows, vectors: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # vLLM's layers take the states as a sum of two, of which this is one.
    bound = signature(layer.forward).bind(*args, **kwargs)
    # (tokens, H), maybe with rows beyond the tokens. Layers of transformers have (1, tokens, H), those of Gemma 3n (streams, tokens, H).
    states: Tensor = bound.arguments["hidden_states"]
    streams = states.ndim > 2 and len(states) > 1
    if states.shape[-1] != vectors.shape[-1] or (streams and rows.tokens not in (None, states.shape[-2])):
        raise _shape_error(layer, states)
    places, numbers = rows.of(states)
    added = vectors[numbers].to(states.dtype).expand(*states.shape[:-2], -1, -1)
    # Not in place: the first layer reads vLLM's own buffer.
    bound.arguments["hidden_states"] = states.index_add(-2, places, added)
    return bound.args, bound.kwargs


def _update(
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    *,
    rows: QueryRows,
    first: Tensor,
    second: Tensor,
    start: int,
) -> None:
    states = _by_token(layer, args[0] if args else next(iter(kwargs.values())))
    computed = _by_token(layer, output[0] if isinstance(output, tuple) else output)
    places, _ = rows.of(computed)
    update = states[places].float() @ first.T @ second.T
    computed[places, start : start + len(second)] += update.to(computed.dtype)


def _by_token(layer: nn.Module, states: Tensor) -> Tensor:
    """States ``(tokens, width)``, of a model of vLLM or of one of transformers, which has ``(1, tokens, width)``; a view."""
    if states.ndim == 3 and len(states) == 1:
        return states[0]
    if states.ndim != 2:
        raise _shape_error(layer, states)
    return states


def _shape_error(layer: nn.Module, states: Tensor) -> ValueError:
    return ValueError(
        f"A {type(layer).__name__} of vLLM has states of shape {tuple(states.shape)}, in which deep queries and a query adapter "
        "have no place. Use slq_embed.serving, or train queries with a projection head."
    )
