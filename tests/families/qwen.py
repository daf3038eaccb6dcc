"""Qwen-VL and what is laid out like it: positions of three axes, pixels by patches."""

from __future__ import annotations

from typing import Any

import transformers

from tests.checkpoints import TEXT
from tests.families.building import MROPE, Parts, config, ids, rows, template, tokenizer_with

VISION = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
VISION |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
AUDIO = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
IMAGE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
PATCHES: dict[str, Any] = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
TOWER |= {"out_hidden_size": 32, "num_position_embeddings": 64}
MIXED_LAYERS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
LINEAR = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "layer_types": MIXED_LAYERS,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def image_processor() -> Any:
    return transformers.Qwen2VLImageProcessor(**PATCHES, size=PIXELS)


def vision_ids(tokenizer: Any) -> dict[str, int]:
    return ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


def _qwen3(kind: str, text: dict[str, Any], vision: dict[str, Any]) -> Parts:
    tokenizer = tokenizer_with(**VISION)
    video = transformers.Qwen3VLVideoProcessor(**PATCHES)
    processor = transformers.Qwen3VLProcessor(image_processor(), tokenizer, video, IMAGE)
    text = {**TEXT, "head_dim": 8, "vocab_size": rows(tokenizer), "rope_parameters": MROPE, **text}
    built = config(kind, text_config=text, vision_config={**TOWER, **vision}, **vision_ids(tokenizer))
    return Parts(built, processor)


def qwen3_5() -> Parts:
    return _qwen3("qwen3_5", LINEAR, {})


def qwen3_5_moe() -> Parts:
    return _qwen3("qwen3_5_moe", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24}, {})


def qwen3_vl_moe() -> Parts:
    return _qwen3("qwen3_vl_moe", EXPERTS, {"deepstack_visual_indexes": [0]})


def qwen2_5_omni_thinker() -> Parts:
    tokenizer = tokenizer_with(**VISION, **AUDIO)
    processor = transformers.Qwen2_5OmniProcessor(
        image_processor(),
        transformers.Qwen2VLVideoProcessor(**PATCHES),
        transformers.WhisperFeatureExtractor(feature_size=8),
        tokenizer,
        IMAGE,
    )
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    named = ids(
        tokenizer,
        image_token_index="<|image_pad|>",
        video_token_index="<|video_pad|>",
        audio_token_index="<|AUDIO|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
        audio_start_token_id="<|audio_bos|>",
        audio_end_token_id="<|audio_eos|>",
    )
    built = config(
        "qwen2_5_omni_thinker",
        text_config={**TEXT, "vocab_size": rows(tokenizer), "rope_parameters": MROPE, "head_dim": 8},
        vision_config={**TOWER, "window_size": 32, "fullatt_block_indexes": [1]},
        audio_config={**audio, "num_mel_bins": 8, "output_dim": 32, "max_source_positions": 32},
        **named,
    )
    return Parts(built, processor)


def qwen3_omni_moe_thinker() -> Parts:
    tokenizer = tokenizer_with(**VISION, **AUDIO)
    processor = transformers.Qwen3OmniMoeProcessor(
        image_processor(),
        transformers.Qwen2VLVideoProcessor(**PATCHES),
        transformers.WhisperFeatureExtractor(feature_size=8),
        tokenizer,
        IMAGE,
    )
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    audio |= {"num_mel_bins": 8, "output_dim": 32, "max_source_positions": 32, "downsample_hidden_size": 16}
    named = ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        audio_token_id="<|AUDIO|>",
        vision_start_token_id="<|vision_start|>",
        audio_start_token_id="<|audio_bos|>",
    )
    built = config(
        "qwen3_omni_moe_thinker",
        text_config={**TEXT, **EXPERTS, "vocab_size": rows(tokenizer), "rope_parameters": MROPE, "head_dim": 8},
        vision_config={**TOWER, "deepstack_visual_indexes": [0]},
        audio_config=audio,
        **named,
    )
    return Parts(built, processor)


def _glm(kind: str, processor_name: str, text: dict[str, Any]) -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|image|>",
        video_token="<|video|>",
        image_start_token="<|begin_of_image|>",
        image_end_token="<|end_of_image|>",
        video_start_token="<|begin_of_video|>",
        video_end_token="<|end_of_video|>",
    )
    prefix = {"glm46v": "Glm46V", "glm_ocr": "Glm46V", "glmga": "Glmga"}.get(kind, "Glm4v")
    pixels = {"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 48 * 48}
    processor = getattr(transformers, processor_name)(
        getattr(transformers, f"{prefix}ImageProcessor")(**PATCHES, size=pixels),
        tokenizer,
        getattr(transformers, f"{prefix}VideoProcessor")(**PATCHES),
        template("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"),
    )
    named = ids(
        tokenizer,
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>",
        video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )
    text_kind = {"glm46v": "glm4v_text", "glmga": "glm4v_text"}.get(kind, f"{kind}_text")
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 4, "image_size": 32, "patch_size": 8, "out_hidden_size": 32}
    built = config(
        kind,
        text_config={**TEXT, "model_type": text_kind, "vocab_size": rows(tokenizer), "rope_parameters": MROPE, **text},
        vision_config={**vision, "intermediate_size": 48},
        **named,
    )
    return Parts(built, processor)


def video_llama_3() -> Parts:
    """Its pixels are those of Qwen-VL, its positions are of one axis."""
    tokenizer = tokenizer_with(**VISION)
    sizes = {"patch_size": 8, "temporal_patch_size": 1}
    video = transformers.VideoLlama3VideoProcessor(
        **sizes,
        merge_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 8 * 32 * 32},
        do_sample_frames=True,  # else it has no times of the frames, which it writes
        fps=1,
    )
    image = transformers.VideoLlama3ImageProcessor(**sizes, merge_size=1, size=PIXELS)
    processor = transformers.VideoLlama3Processor(image, tokenizer, video, IMAGE)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    built = config(
        "video_llama_3",
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": rows(tokenizer)},
        vision_config={**tower, "patch_size": 8},
        **ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return Parts(built, processor)


def glm4v() -> Parts:
    return _glm("glm4v", "Glm4vProcessor", {})


def glm46v() -> Parts:
    return _glm("glm46v", "Glm46VProcessor", {})


def glmga() -> Parts:
    return _glm("glmga", "Glm46VProcessor", {})


def glm_ocr() -> Parts:
    return _glm("glm_ocr", "Glm46VProcessor", {"head_dim": 8})


def glm4v_moe() -> Parts:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    return _glm(
        "glm4v_moe",
        "Glm4vProcessor",
        {**experts, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 16},
    )


def kimi_k25() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|media_pad|>",
        video_token="<|kimi_k25_video_placeholder|>",
        begin="<|media_begin|>",
        content="<|media_content|>",
        end="<|media_end|>",
    )
    image = transformers.Kimi_K25ImageProcessor(patch_size=8, merge_size=2, max_patches=36)
    video = transformers.Kimi_K25VideoProcessor(patch_size=8, merge_size=2)
    start = "<|media_begin|>image<|media_content|>"
    processor = transformers.Kimi_K25Processor(image, tokenizer, video, template(f"{start}<|media_pad|><|media_end|>"))
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1}
    text = {**TEXT, **latent, **experts, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    built = config(
        "kimi_k25",
        text_config={**text, "model_type": "deepseek_v3", "vocab_size": rows(tokenizer)},
        vision_config={**tower, "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        **ids(
            tokenizer,
            image_token_id="<|media_pad|>",
            video_token_id="<|kimi_k25_video_placeholder|>",
            vision_start_token_id="<|media_begin|>",
            vision_end_token_id="<|media_end|>",
        ),
    )
    return Parts(built, processor)


def _minicpmv(kind: str, processor_name: str, **more: str) -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_start_token="<image>",
        image_end_token="</image>",
        slice_start_token="<slice>",
        slice_end_token="</slice>",
        image_id_start_token="<image_id>",
        image_id_end_token="</image_id>",
    )
    sizes = {"patch_size": 8, "scale_resolution": 64, "max_slice_nums": 2}
    parts = "MiniCPMOcr" if kind == "minicpm_ocr" else "MiniCPMV4_6"
    processor = getattr(transformers, processor_name)(
        getattr(transformers, f"{parts}ImageProcessor")(**sizes),
        getattr(transformers, f"{parts}VideoProcessor")(**sizes),
        tokenizer,
        template("<|image_pad|>", "<|video_pad|>"),
    )
    text = {**TEXT, **LINEAR, "model_type": "qwen3_5_text", "vocab_size": rows(tokenizer)}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    built = config(
        kind,
        text_config=text,
        vision_config={**tower, "image_size": 64, "patch_size": 8, "insert_layer_id": 0},
        insert_layer_id=0,
        image_size=64,
        **ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", **more),
    )
    return Parts(built, processor)


def minicpmv4_6() -> Parts:
    return _minicpmv("minicpmv4_6", "MiniCPMV4_6Processor")


def minicpmv4_7() -> Parts:
    """The positions of 4.7 follow from the marks around slices, so the model must know these."""
    marks = {"image_start_id": "<image>", "image_end_id": "</image>", "slice_start_id": "<slice>"}
    marks |= {"slice_end_id": "</slice>", "newline_id": "Ċ"}
    return _minicpmv("minicpmv4_7", "MiniCPMV4_7Processor", **marks)


def minicpm_ocr() -> Parts:
    return _minicpmv("minicpm_ocr", "MiniCPMOcrProcessor")
