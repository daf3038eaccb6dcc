"""Loads an SLQ model with an adapter or vectors that act at the latent queries only.

slq-embed writes this file into the saved folder. Plain Sentence Transformers runs it with ``trust_remote_code=True``. Without
it, the base model would run alone, because nothing tells stock modules at which positions to act.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util.file_io import load_dir_path, load_file_path


def _act_at_the_end(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> tuple[Any, Any]:
    return args, {**kwargs, "alora_offsets": [count] * len(args[0])}


def _add_at_the_end(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], vectors: torch.Tensor, streams: bool
) -> tuple[Any, Any]:
    states = args[0] if args else kwargs["hidden_states"]
    added = vectors.to(states.device, states.dtype)
    # As in slq_embed.modules.deep_queries.
    added, axis = (added[:, None], -3) if streams else (added.repeat(1, states.shape[-1] // added.shape[-1]), -2)
    before, queries = states.split([states.shape[axis] - len(added), len(added)], dim=axis)
    changed = torch.cat([before, queries + added], dim=axis)
    return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})


class QueryAdapterTransformer(Transformer):
    """The host's ``Transformer`` with a LoRA, or vectors for each layer, at the last tokens, the latent queries."""

    deep_queries = merged_folder = None

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Load the folder."""
        module = super().load(model_name_or_path, *args, **kwargs)
        hub = {name: kwargs.get(name) for name in ("token", "cache_folder", "revision", "local_files_only")}
        if load_file_path(model_name_or_path, "query_adapter/adapter_config.json", **hub) is not None:  # a merged model
            module.model.load_adapter(load_dir_path(model_name_or_path, "query_adapter", **hub))
            module.merged_folder = model_name_or_path
        for config in getattr(module.model, "peft_config", {}).values():
            if tokens := getattr(config, "alora_invocation_tokens", None):
                if Version(transformers.__version__) < Version("5.23"):
                    raise ImportError(
                        f"transformers {transformers.__version__} leaves weights of this adapter out; 5.23 or newer is needed."
                    )
                for layer in module.model.modules():
                    if isinstance(layer, LoraLayer):
                        layer.register_forward_pre_hook(partial(_act_at_the_end, count=len(tokens)), with_kwargs=True)
        if (path := load_file_path(model_name_or_path, "deep_queries.safetensors", **hub)) is not None:
            module.deep_queries = vectors = load_file(path)["deep_queries"]
            text = module.model.get_decoder()
            text = text if hasattr(text, "layers") else text.model
            streams = hasattr(module.model.config.get_text_config(), "hc_mult")
            for number, layer in enumerate(text.layers):
                add = partial(_add_at_the_end, vectors=vectors[number], streams=streams)
                layer.register_forward_pre_hook(add, with_kwargs=True)
        return module

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the model, and the vectors for its layers."""
        if self.merged_folder is not None:
            raise ValueError(
                "Of this model, the host would save the adapter alone. Save it with slq-embed: "
                f"SLQEncoder({self.merged_folder!r}).save_pretrained({output_path!r})."
            )
        super().save(output_path, *args, **kwargs)
        if self.deep_queries is not None:
            save_file({"deep_queries": self.deep_queries}, Path(output_path) / "deep_queries.safetensors")
