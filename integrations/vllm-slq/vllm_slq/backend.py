"""Architectures that vLLM runs with the code of transformers, around its own attention.

vLLM has no code of its own for most of them; for EXAONE 4.5, its own computes images otherwise than transformers. Each was measured:
others would go wrong without a word, such as those that give features of an image to several layers.
"""

from __future__ import annotations

from vllm_slq import PREFIX

ARCHITECTURES = dict.fromkeys(
    (
        "AyaVisionForConditionalGeneration",
        "Exaone4_5_ForConditionalGeneration",
        "FastVlmForConditionalGeneration",
        "Glm46VForConditionalGeneration",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        "LightOnOcrForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration",
        "PerceptionLMForConditionalGeneration",
        "VideoLlama3ForConditionalGeneration",
        "VipLlavaForConditionalGeneration",
    ),
    "TransformersMultiModalForCausalLM",
)
"""For each architecture, the class of vLLM that runs it."""


def runs(architectures: list[str]) -> bool:
    """Whether the code of transformers runs a model; ``architectures`` as its ``config.json`` names them."""
    return any(name.removeprefix(PREFIX) in ARCHITECTURES for name in architectures)
