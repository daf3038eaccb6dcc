"""Tiny backbones of many model families: each with its real configuration and processor classes, weights drawn at random."""

from __future__ import annotations

from collections.abc import Callable

from tests.families import cohere, known, lfm, llava, newer, newer_others, others, qwen
from tests.families.building import Parts

KINDS: dict[str, tuple[Callable[[], Parts], ...]] = {
    "causal": (
        llava.llava,
        llava.mistral3,
        llava.llava_next,
        llava.llava_onevision,
        llava.granite_vision,
        llava.granite4_vision,
        llava.idefics3,
        llava.smolvlm,
        llava.pixtral,
        known.internvl3,
        llava.internvl3_5,
        known.fast_vlm,
        llava.ovis2,
        llava.perception_lm,
        others.phi4_multimodal,
        newer_others.hyperclovax_vision_v2,
    ),
    "causal, positions of three axes": (
        qwen.glm4v,
        qwen.qwen2_5_omni_thinker,
        qwen.qwen3_vl_moe,
        qwen.qwen3_omni_moe_thinker,
        qwen.glm46v,
        qwen.glm4v_moe,
        qwen.glm_ocr,
        known.qwen2_vl,
        known.qwen2_5_vl,
        known.qwen3_vl,
        newer.ernie4_5_vl_moe,
        newer.hunyuan_vl,
        newer_others.cosmos3_omni,
        newer_others.cosmos3_edge,
        qwen.glmga,
    ),
    "linear attention, convolutions": (
        qwen.qwen3_5,
        lfm.lfm2_vl,
        lfm.lfm3_vl,
        qwen.qwen3_5_moe,
        qwen.minicpmv4_6,
        qwen.minicpmv4_7,
        newer.qwen4_exp,
        newer.glm5_next,
        newer_others.nemotron_h_omni,
    ),
    "sliding windows": (
        others.gemma3_text,
        cohere.cohere2_vision,
        cohere.aya_vision,
        cohere.cohere2_moe,
        newer.exaone4_5,
        newer_others.step3p7,
        newer_others.muse_glimmer,
        newer_others.muse_spark,
    ),
    "images in both directions": (
        others.gemma3,
        others.paligemma,
        others.paligemma2,
        others.molmo2,
        newer_others.gemma4_unified,
    ),
    "shared keys, inputs of each layer": (others.gemma3n, others.gemma4),
    "latent": (qwen.kimi_k25, llava.mistral4, newer_others.mistral_large4, newer_others.dots3_note),
    "chunks": (others.llama4,),
    "texts only": (others.qwen3, others.gemma, others.llama, others.smollm3),
}
"""Builders by the kind of attention. The plain test run takes the first two of each kind."""

FAMILIES = {build.__name__: (kind, build) for kind, builds in KINDS.items() for build in builds}
REPRESENTATIVES = {build.__name__ for builds in KINDS.values() for build in builds[:2]}
