"""Loads an SLQ model whose adapter acts at the latent queries only. slq-embed writes this file into the saved folder.

Plain Sentence Transformers runs it with ``trust_remote_code=True``. Without it, peft's layers would run the base model
alone, because nothing tells them at which positions the adapter acts.
"""

from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from sentence_transformers.base.modules import Transformer


def _act_at_the_end(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> tuple[Any, Any]:
    return args, {**kwargs, "alora_offsets": [count] * len(args[0])}


class QueryAdapterTransformer(Transformer):
    """The host's ``Transformer``, whose LoRA is active at the last tokens, the latent queries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (config,) = self.model.peft_config.values()
        act = partial(_act_at_the_end, count=len(config.alora_invocation_tokens))
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(act, with_kwargs=True)
