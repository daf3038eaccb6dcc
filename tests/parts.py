"""Encoders that train more than queries, shared by tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slq_embed import QueryAdapter, SLQEncoder

SMALL = QueryAdapter(rank=2)
PARTS: dict[str, dict[str, Any]] = {
    "head": {"projection": 16},
    "adapter": {"query_adapter": SMALL},
    "both": {"projection": 16, "query_adapter": SMALL},
    "deep": {"deep_queries": True},
    "weights": {"pooling": "weighted"},
    "all": {"projection": 16, "query_adapter": SMALL, "deep_queries": True, "pooling": "weighted"},
}


def build(checkpoint: Any, kind: str = "qwen3_vl", **options: Any) -> SLQEncoder:
    return SLQEncoder.from_backbone(checkpoint(kind), **{"num_queries": 4, "seed": 0, "device": "cpu", **options})


def trained(model: SLQEncoder, seed: int = 1, scale: float = 0.3) -> SLQEncoder:
    """The model with other weights in all but its queries: the other parts start as if they were not there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in ("0.bias.queries", "0.bias.log_temperature"):
                weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def on(backbone: SLQEncoder, seed: int = 1, **options: Any) -> SLQEncoder:
    """Another encoder on the same backbone, as if trained."""
    return trained(backbone.with_queries(seed=seed, **options), seed=seed)


def copy_of_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def furthest(first: Any, second: Any) -> float:
    assert np.shape(first) == np.shape(second)
    return float(np.abs(np.asarray(first) - np.asarray(second)).max())


def structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """The modules themselves, their types and their hooks."""
    return [
        (name, id(module), type(module), *(len(getattr(module, kind)) for kind in HOOKS), sorted(vars(module)))
        for name, module in model.named_modules()
    ]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def files(folder: Path) -> Iterable[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def offloading(folder: Path) -> dict[str, Any]:
    """Arguments that leave the second of two layers of a Qwen3-VL on the disk."""
    names = [
        "model.visual",
        "lm_head",
        *(f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")),
    ]
    layers = {"model.language_model.layers.0": "cpu", "model.language_model.layers.1": "disk"}
    return {"device_map": dict.fromkeys(names, "cpu") | layers, "model_kwargs": {"offload_folder": str(folder)}}
