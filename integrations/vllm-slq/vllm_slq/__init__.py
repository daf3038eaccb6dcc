"""SLQ models in vLLM: a plugin that pools over the latent queries."""

from __future__ import annotations

PREFIX = "SLQ"
"""What stands before the name of the architecture in a folder for this plugin; without it, vLLM knows no such name."""


def register() -> None:
    """Tell vLLM of an SLQ model for each architecture that it knows; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_slq.backend import ARCHITECTURES
    from vllm_slq.config import config_hook

    known = {name for name in ModelRegistry.get_supported_archs() if not name.startswith(PREFIX)}
    for name in known | ARCHITECTURES.keys():
        ModelRegistry.register_model(PREFIX + name, f"vllm_slq.models:{PREFIX}{name}")
        MODELS_CONFIG_MAP[PREFIX + name] = config_hook(MODELS_CONFIG_MAP.get(name))
