"""Architectures that vLLM runs with the code of transformers, around its own attention.

vLLM has no code of its own for most of them. Its own code computes images of EXAONE 4.5 otherwise than transformers, and takes none
for LLaVA-NeXT-Video. Only what was measured to be right stands here.
"""

from __future__ import annotations

from vllm_slq import PREFIX

_LANGUAGE = ("BitNet", "Doge", "Ministral", "NanoChat", "Persimmon")
_LANGUAGE_WITH_EXPERTS = ("Dots1", "SolarOpen")
_MULTIMODAL = (
    *("AyaVision", "Exaone4_5_", "FastVlm", "Glm46V", "HyperCLOVAXVisionV2", "LightOnOcr", "LlavaNextVideo"),
    *("MuseGlimmer", "PerceptionLM", "VideoLlama3", "VipLlava"),
)

ARCHITECTURES = {
    **dict.fromkeys((f"{name}ForCausalLM" for name in _LANGUAGE), "TransformersForCausalLM"),
    **dict.fromkeys((f"{name}ForCausalLM" for name in _LANGUAGE_WITH_EXPERTS), "TransformersMoEForCausalLM"),
    **dict.fromkeys((f"{name}ForConditionalGeneration" for name in _MULTIMODAL), "TransformersMultiModalForCausalLM"),
}
"""For each architecture, the class of vLLM that runs it."""


def runs(architectures: list[str]) -> bool:
    """Whether the code of transformers runs a model; ``architectures`` as its ``config.json`` names them."""
    return any(name.removeprefix(PREFIX) in ARCHITECTURES for name in architectures)
