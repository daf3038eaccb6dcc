"""A class for each architecture that vLLM knows, made when it is asked for: vLLM's own, with our pooler."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.adapters import as_embedding_model

from vllm_slq import PREFIX
from vllm_slq.pooler import build_pooler
from vllm_slq.record import MASTER_NAME


def __getattr__(name: str) -> type[nn.Module]:
    """The class for an architecture, under the name that is in the folder's ``config.json``."""
    base = ModelRegistry.models.get(name.removeprefix(PREFIX))
    if not name.startswith(PREFIX) or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return as_slq_model(base.load_model_cls())


@cache
def as_slq_model(base: type[nn.Module]) -> type[nn.Module]:
    """A model class of vLLM, with the pooler of SLQ models."""
    embedding: Any = as_embedding_model(base)

    class SLQModel(embedding):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self.pooler = build_pooler(vllm_config.model_config).to(vllm_config.device_config.device)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
            loaded = super().load_weights((name, value) for name, value in weights if name != MASTER_NAME)
            # The head came from a file of its own; vLLM looks for weights that nothing was loaded into.
            return loaded and loaded | {f"pooler.{name}" for name, _ in self.pooler.named_parameters()}

    SLQModel.__name__ = SLQModel.__qualname__ = PREFIX + base.__name__
    return SLQModel
