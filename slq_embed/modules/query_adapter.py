"""Adapters that act at the latent queries only: the input never sees them, so prefixes stay what they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slq_embed.backbone.families import language_layers
from slq_embed.backbone.twin import twin_of

_NAME = "default"  # peft's
_OF_ALL_POSITIONS = {"kv_b_proj"}
"""Layers that read what is cached of the whole sequence, and not the states at its last positions."""
_INDEXER = "indexer"
"""A part that chooses what attention sees. No gradient passes through a choice, so an update of it would never learn."""


@dataclass(frozen=True)
class QueryAdapter:
    """A LoRA on linear layers of the language model that is active at the query positions only.

    Args:
        rank: Rank of each update, ``r``.
        alpha: The updates are scaled by ``alpha / rank``; by default, ``2 * rank``.
        targets: Names of linear layers, such as ``["q_proj", "v_proj"]``; by default all in the layers of the language model
            that are not narrower than the rank. In a mixture of experts, only those of the attention can be named: experts get
            tokens without their positions.

    Source:
        LoRA: arXiv:2106.09685. Acting on the last tokens alone, so that earlier keys and values can be reused: activated
        LoRA, arXiv:2504.12397.
    """

    rank: int = 8
    alpha: float | None = None
    targets: Sequence[str] | None = None

    @property
    def scaled_by(self) -> float:
        """``alpha``, with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def layers(self, decoder: PreTrainedModel) -> dict[str, nn.Linear]:
        """The linear layers of the language model that get an update, by their names in the decoder.

        Raises:
            ValueError: If a target is no linear layer there, or the rank or alpha does not fit.
        """
        linear = _adaptable(decoder)
        if self.targets is None and type(self.rank) is int:
            wide = {
                name: layer for name, layer in linear.items() if min(layer.in_features, layer.out_features) >= self.rank
            }
            linear = wide or linear
        known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
        targets = list(known) if self.targets is None else self.targets
        if not isinstance(targets, (list, tuple)) or not targets or not all(target in known for target in targets):
            raise ValueError(
                f"The query adapter's targets are {self.targets!r}, but a list of linear layers of the language model is "
                f"needed. This backbone has {', '.join(known) or 'none outside of its experts'}."
            )
        chosen = {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in targets}
        narrowest = min((min(layer.in_features, layer.out_features) for layer in chosen.values()), default=0)
        if type(self.rank) is not int or not 1 <= self.rank <= narrowest:
            raise ValueError(
                f"The query adapter's rank is {self.rank!r}, but a rank from 1 to {narrowest}, the width of the narrowest "
                "target, is needed."
            )
        if type(self.scaled_by) not in (int, float) or not 0 < self.scaled_by < math.inf:
            raise ValueError(f"The query adapter's alpha is {self.alpha!r}, but a positive number is needed.")
        return chosen


def _adaptable(decoder: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the language model that an update can act in, by their names in the decoder."""
    text = language_layers(decoder)
    start = next(name for name, module in decoder.named_modules() if module is text)
    # Names of the blocks that hold experts in some layer, such as "mlp". They are left out in all layers, also where one is dense:
    # peft goes by names, and would put the update of a dense block into the experts of other layers.
    mixed = {name.rpartition(".")[2] for name, module in text.named_modules() if hasattr(module, "experts")}
    return {
        f"{start}.{name}": module
        for name, module in text.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] not in _OF_ALL_POSITIONS
        # Nemotron calls attention and experts by one name.
        and (mixed.isdisjoint(name.split(".")) or hasattr(text.get_submodule(name.rpartition(".")[0]), "q_proj"))
        and _INDEXER not in name.split(".")
    }


def lora_config(adapter: QueryAdapter, layers: Mapping[str, nn.Linear], **options: Any) -> Any:
    """The adapter as peft configures it; ``options`` are peft's."""
    from peft import LoraConfig

    return LoraConfig(r=adapter.rank, lora_alpha=adapter.scaled_by, target_modules=sorted(layers), **options)


def adapt(twin: PreTrainedModel, adapter: QueryAdapter, seed: int | None = None) -> nn.ModuleDict:
    """Put updates, which start at zero, into the linear layers of a twin.

    Args:
        twin: Of the backbone without its head; changed in place.
        adapter: The settings.
        seed: Seed of the initialisation; without one, torch's generator is used.

    Returns:
        What is to be trained: for each layer its ``lora_A`` and ``lora_B``, in float32, by the name of the
        layer with ``/`` in place of ``.``.

    Raises:
        ValueError: If a target is no linear layer, the rank does not fit, or a layer's weights are not in the memory of its device.
    """
    from peft import inject_adapter_in_model

    layers = adapter.layers(twin)
    if offloaded := [name for name in layers if twin.get_submodule(name).weight.is_meta]:
        raise ValueError(
            f"A query adapter needs its layers' weights in memory, but {len(offloaded)} layers, such as {offloaded[0]}, are offloaded. "
            "Use a device_map without offloading to the CPU or the disk, or train queries alone or with deep queries."
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # the table is no target
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")  # for merging, which nobody does
        try:
            inject_adapter_in_model(lora_config(adapter, layers), twin, _NAME)
            if left_out := [name for name in layers if not hasattr(twin.get_submodule(name), "lora_A")]:
                raise ValueError(f"It leaves out {left_out[0]}, whose name it gives to experts.")
        except ValueError as error:  # of layers that peft knows it would change in vain, or not save
            names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise ValueError(
                f"peft cannot put the query adapter into {names} of this {twin.config.model_type}: {error} Name other targets: "
                "QueryAdapter(targets=[...])."
            ) from error
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    trained = nn.ModuleDict()
    for name in layers:
        layer: Any = twin.get_submodule(name)
        layer.register_forward_pre_hook(partial(_require_positions, name=name))
        parts = {part: getattr(layer, part)[_NAME].float() for part in ("lora_A", "lora_B")}
        with torch.no_grad():  # as peft draws it, but the same on every device
            drawn = torch.empty(parts["lora_A"].weight.shape)
            parts["lora_A"].weight.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
        trained[name.replace(".", "/")] = nn.ModuleDict(parts)
    return trained


def _require_positions(layer: nn.Module, args: tuple[Tensor, ...], *, name: str) -> None:
    if args[0].ndim != 3:
        raise ValueError(
            f"The query adapter's target {name} gets numbers of shape {tuple(args[0].shape)}, but (batch, positions, width) is "
            "needed to know which are the queries'. Name other targets: QueryAdapter(targets=[...])."
        )


def at_the_end(twin: PreTrainedModel, count: int) -> PreTrainedModel:
    """A twin of :func:`adapt` whose updates act at the last ``count`` positions of a whole sequence only."""
    from peft.tuners.lora import LoraLayer

    def keep(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([layer.base_layer(args[0][:, :-count]), output[:, -count:]], dim=1)

    restricted = twin_of(twin)
    for module in restricted.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(keep)
    return restricted
