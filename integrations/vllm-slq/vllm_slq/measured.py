"""Architectures whose vectors were compared with those of SLQEncoder: they are right, or what is not is refused.

Gemma 3 and Gemma 4 with images are not among them: they need a GPU, and were compared on a CPU only.
"""

from __future__ import annotations

_MULTIMODAL = """
Aria AyaVision Cohere2Vision Exaone4_5_ FastVlm Gemma3n Glm46V Glm4v Glm4vMoe GlmOcr
Granite4Vision HyperCLOVAXVisionV2 Idefics3 InternVL Lfm2Vl LightOnOcr Llama4 Llava LlavaNext
LlavaNextVideo LlavaOnevision MiniCPMV4_6 Mistral3 MuseGlimmer PaddleOCRVL PerceptionLM Qwen2VL
Qwen2_5_VL Qwen3VL Qwen3VLMoe Qwen3_5 Qwen3_5Moe SmolVLM VideoLlama3 VipLlava
"""
_LANGUAGE = """
Apertus Arcee BitNet Bloom Cohere Cohere2 Cohere2Moe Cwm Doge Dots1 Ernie4_5 Ernie4_5_Moe Exaone4
ExaoneMoe FalconH1 FlexOlmo GPTJ Gemma Gemma2 Gemma3 Glm Glm4 Granite GraniteMoe GraniteMoeHybrid
GraniteMoeSWA GraniteMoeShared GraniteSWA HunYuanDenseV1 HunYuanMoEV1 HyperCLOVAX Jais2 Lfm2 Lfm2Moe
Llama Ministral Ministral3 Mistral Mixtral NanoChat Nemotron OPT Olmo Olmo2 Olmo3 Olmoe Persimmon Phi
Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe SeedOss SmolLM3 SolarOpen StableLm Starcoder2 VaultGemma
"""

ARCHITECTURES = frozenset(
    [f"{name}ForConditionalGeneration" for name in _MULTIMODAL.split()]
    + [f"{name}ForCausalLM" for name in _LANGUAGE.split()]
)
