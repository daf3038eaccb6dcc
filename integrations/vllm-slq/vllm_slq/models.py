"""A class for each architecture that vLLM knows, made when it is asked for: vLLM's own, with our pooler."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.adapters import as_embedding_model

from vllm_slq import PREFIX, backend
from vllm_slq.config import read_file, record_of
from vllm_slq.experts import turn_experts
from vllm_slq.layers import act_inside
from vllm_slq.pooler import build_pooler
from vllm_slq.record import OWN_TENSORS


def __getattr__(name: str) -> type[nn.Module]:
    """The class for an architecture, under the name that is in the folder's ``config.json``."""
    architecture = name.removeprefix(PREFIX)
    base = ModelRegistry.models.get(backend.ARCHITECTURES.get(architecture, architecture))
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
            config, device = vllm_config.model_config, vllm_config.device_config.device
            self.query_rows = None
            if (record := record_of(config)).acts_inside:
                layers = config.hf_text_config.num_hidden_layers
                self.query_rows = act_inside(self, record, partial(read_file, config), layers, device)
            self.pooler = build_pooler(config, self.query_rows).to(device)
            self._text_config = config.hf_text_config

        def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.query_rows is not None:
                self.query_rows.find(input_ids)
            return super().embed_input_ids(input_ids, *args, **kwargs)

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            given = {"intermediate_tensors": intermediate_tensors, "inputs_embeds": inputs_embeds, **kwargs}
            forward = partial(super().forward, input_ids=input_ids, positions=positions, **given)
            if self.query_rows is None:
                return forward()
            if inputs_embeds is None and input_ids is not None:  # else the ids were embedded before
                self.query_rows.find(input_ids)
            self.query_rows.start()
            try:
                return forward()
            finally:
                self.query_rows.end()

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
            weights = turn_experts(weights, self._text_config)
            loaded = super().load_weights((name, value) for name, value in weights if name not in OWN_TENSORS)
            # The head came from a file of its own; vLLM looks for weights that nothing was loaded into.
            return loaded and loaded | {f"pooler.{name}" for name, _ in self.pooler.named_parameters()}

    SLQModel.__name__ = SLQModel.__qualname__ = PREFIX + base.__name__
    return SLQModel
