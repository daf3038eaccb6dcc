"""Families of 2026 with layouts of their own: towers without Qwen-VL's patches, decoders of several kinds of layers."""

from __future__ import annotations

from typing import Any

import transformers

from tests.checkpoints import TEXT
from tests.families.building import MROPE, TOWER, Parts, config, ids, rows, template, text, tokenizer_with
from tests.families.llava import PIXTRAL, _pixtral
from tests.families.others import WINDOWS
from tests.families.qwen import IMAGE, PATCHES, PIXELS, VISION, _qwen3, image_processor, vision_ids
from tests.families.qwen import TOWER as QWEN_TOWER


def gemma4_unified() -> Parts:
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>", "video_token": "<|video|>"}
    tokenizer = tokenizer_with(**named)
    patches = {"patch_size": 2, "pooling_kernel_size": 2}
    processor = transformers.Gemma4UnifiedProcessor(
        transformers.Gemma4UnifiedAudioFeatureExtractor(),
        transformers.Gemma4UnifiedImageProcessor(**patches, max_soft_tokens=70),
        tokenizer,
        transformers.Gemma4UnifiedVideoProcessor(**patches, num_frames=4),
        template("<|image|>", "<|video|>"),
    )
    windows = {**WINDOWS, "use_bidirectional_attention": "vision", "global_head_dim": 16, "pad_token_id": 0}
    vision = {"mm_embed_dim": 32, "mm_posemb_size": 128, "output_proj_dims": 32}
    built = config(
        "gemma4_unified",
        text_config={**TEXT, **windows, "vocab_size": rows(tokenizer)},
        vision_config={**vision, **patches},
        audio_config=None,
        **ids(
            tokenizer,
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            boa_token_id="<|audio>",
            eoa_token_index="<audio|>",
            audio_token_id="<|audio|>",
        ),
    )
    return Parts(built, processor)


def step3p7() -> Parts:
    marks = ["<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>"]
    tokenizer = tokenizer_with(image_token="<im_patch>", **{f"mark_{n}": mark for n, mark in enumerate(marks)})
    image = transformers.Step3p7ImageProcessor(
        size={"height": 64, "width": 64}, patch_size=32, vision_patch_size=4, max_image_size=128
    )
    processor = transformers.Step3p7Processor(image, tokenizer, template("<im_patch>"))
    layers = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "share_expert_dim": 24}
    experts |= {"num_local_experts": 4, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
    decoder = {**TEXT, **experts, "num_hidden_layers": 4, "layer_types": layers, "sliding_window": 16, "head_dim": 8}
    built = config(
        "step3p7",
        text_config={**decoder, "vocab_size": rows(tokenizer), "pad_token_id": 0},
        vision_config={**TOWER, "image_size": 64, "patch_size": 4, "mlp_ratio": 1.5, "max_position_embeddings": 256},
        **ids(tokenizer, image_token_id="<im_patch>"),
    )
    return Parts(built, processor)


def nemotron_h_omni() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<image>",
        video_token="<video>",
        audio_token="<so_embedding>",
        image_start_token="<img>",
        image_end_token="</img>",
        audio_start="<so_start>",
        audio_end="<so_end>",
    )
    processor = transformers.NemotronH_Omni_Reasoning_V3Processor(
        transformers.NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=8, min_num_patches=16, max_num_patches=36, max_model_len=64
        ),
        transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(
            patch_size=8, video_target_num_patches=16, norm_mean=[0.5] * 3, norm_std=[0.5] * 3
        ),
        tokenizer,
        transformers.ParakeetFeatureExtractor(feature_size=8),
        template("<image>", "<video>"),
    )
    kinds = ["mamba", "moe", "attention", "mamba", "attention", "mlp"]
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    experts |= {"moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}
    decoder = {"layers_block_type": kinds, "num_hidden_layers": 6, "head_dim": 8}
    built = config(
        "nemotron_h_omni",
        text_config=text(tokenizer, "nemotron_h", **{**decoder, **mamba, **experts}),
        vision_config={"model_type": "radio", **TOWER, "patch_size": 8, "video_temporal_patch_size": 2},
        audio_config=None,
        projector_hidden_size=48,
        vision_hidden_size=32,
        **ids(tokenizer, image_token_id="<image>", video_token_id="<video>", audio_token_id="<so_embedding>"),
    )
    return Parts(built, processor)


def mistral_large4() -> Parts:
    tokenizer, processor = _pixtral(2)
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    index = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 4}
    built = config(
        "mistral_large4",
        text_config=text(tokenizer, "mistral_large4_text", **latent, **index, **experts),
        vision_config=PIXTRAL,
        spatial_merge_size=2,
        **ids(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(built, processor)


def hyperclovax_vision_v2() -> Parts:
    tokenizer = tokenizer_with(**VISION)
    tokenizer.add_prefix_space = False  # loading goes by the model's type, to a class that wants it
    sizes = {"shortest_edge": 2 * 16 * 16, "longest_edge": 8 * 32 * 32}
    processor = transformers.HyperCLOVAXVisionV2Processor(
        image_processor(), tokenizer, transformers.Qwen2VLVideoProcessor(**PATCHES, size=sizes), IMAGE
    )
    tower = {**QWEN_TOWER, "window_size": 32, "fullatt_block_indexes": [1], "model_type": "qwen2_5_vl_vision"}
    built = config(
        "hyperclovax_vision_v2",
        text_config=text(tokenizer, "hyperclovax"),
        vision_config=tower,
        **ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return Parts(built, processor)


def cosmos3_omni() -> Parts:
    return _qwen3("cosmos3_omni", {"model_type": "qwen3_vl_text"}, {"deepstack_visual_indexes": [0]})


def cosmos3_edge() -> Parts:
    tokenizer = tokenizer_with(**VISION)
    patches = {"patch_size": 8, "merge_size": 2}
    processor = transformers.Cosmos3EdgeProcessor(
        transformers.Cosmos3EdgeImageProcessor(**patches, size=PIXELS),
        tokenizer,
        transformers.Cosmos3EdgeVideoProcessor(**patches),
        IMAGE,
    )
    built = config(
        "cosmos3_edge",
        text_config={**TEXT, "head_dim": 8, "vocab_size": rows(tokenizer), "rope_parameters": MROPE},
        vision_config={**TOWER, "patch_size": 8, "num_patches": 64},
        projector_hidden_size=48,
        **vision_ids(tokenizer),
    )
    return Parts(built, processor)


MUSE = {
    "image_token": "<|patch|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "video_token": "<|video|>",
    "video_sep_token": "<|vid_frame_separator|>",
    "video_start_token": "<|vid_start|>",
    "video_end_token": "<|vid_end|>",
}


def _muse(name: str, decoder: dict[str, Any], more: dict[str, Any], marks: dict[str, str], audio: list[Any]) -> Parts:
    tokenizer = tokenizer_with(**MUSE, **marks)
    processor = getattr(transformers, f"{name}Processor")(
        transformers.MuseGlimmerImageProcessor(**PATCHES, max_image_tokens=9),
        transformers.MuseGlimmerVideoProcessor(**PATCHES),
        tokenizer,
        *audio,
        template("<|patch|>", "<|video|>"),
    )
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    windows = {"num_hidden_layers": 4, "layer_types": layers, "sliding_window": 16, "head_dim": 8, "pad_token_id": 0}
    tower = {**TOWER, "patch_size": 8, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
    built = config(
        "muse_glimmer" if name == "MuseGlimmer" else "muse_spark",
        text_config={**TEXT, **windows, "vocab_size": rows(tokenizer), **decoder},
        vision_config=tower,
        out_hidden_size=128,
        projector_hidden_size=48,
        **more,
        **ids(tokenizer, image_token_id="<|patch|>", video_token_id="<|video|>"),
    )
    return Parts(built, processor)


def muse_glimmer() -> Parts:
    return _muse("MuseGlimmer", {}, {}, {}, [])


def muse_spark() -> Parts:
    audio = {"patch_sizes": [16, 6], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2}
    marks = {"audio_token": "<|audio|>", "start": "<|soft_audio_start|>", "end": "<|soft_audio_end|>"}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_hidden_size": 16}
    more = {"audio_config": {**audio, "out_hidden_size": 32}}
    return _muse("MuseSpark", experts, more, marks, [transformers.MuseSparkFeatureExtractor()])


def inkling2() -> Parts:
    tokenizer = tokenizer_with(image_token="<|unused_200054|>")
    processor = transformers.Inkling2Processor(
        transformers.Inkling2ImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        template("<|unused_200054|>"),
    )
    heads = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    layers = {"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window_size": 16}
    decoder = {**TEXT, **heads, **experts, **layers, "d_rel": 4, "rel_extent": 16, "n_layers_per_attn_res_block": 2}
    vision = {**TOWER, "patch_size": 8, "posemb_grid_size": 8, "projection_hidden_dim": 48, "text_hidden_size": 32}
    built = config(
        "inkling2",
        text_config={
            **decoder,
            "vocab_size": rows(tokenizer),
            "unpadded_vocab_size": rows(tokenizer),
            "pad_token_id": 0,
        },
        vision_config=vision,
        **ids(tokenizer, image_token_id="<|unused_200054|>"),
    )
    return Parts(built, processor)


def dots3_note() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|imgpad|>",
        video_token="<|video_pad|>",
        audio_token="<|audio_comp_pad|>",
        start="<|img|>",
        end="<|endofimg|>",
    )
    patches = {**PATCHES, "temporal_patch_size": 1}
    processor = transformers.Dots3NoteProcessor(
        transformers.Qwen2VLImageProcessor(**patches, size=PIXELS),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**patches),
        transformers.Dots3NoteFeatureExtractor(feature_size=8),
        template("<|img|><|imgpad|><|endofimg|>", "<|video_pad|>"),
    )
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    latent |= {"num_key_value_heads": 4, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
    latent |= {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8}
    index = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 16, "swa_v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    experts |= {"shared_experts_intermediate_size": 24}
    layers = ["indexed_attention", "sliding_attention"] * 2
    kinds = {"num_hidden_layers": 4, "layer_types": layers, "sliding_window": 16, "pad_token_id": 0}
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    audio |= {"feature_size": 8, "downsample_hidden_size": 16, "adapter_input_size": 32, "adapter_out_dim": 32}
    vision = {**TOWER, "patch_size": 8, "adapter_in_dim": 32, "adapter_out_dim": 32, "moe_intermediate_size": 24}
    built = config(
        "dots3_note",
        text_config={**TEXT, **latent, **index, **experts, **kinds, "vocab_size": rows(tokenizer)},
        vision_config={**vision, "pyramid_num_routed": [-1, 2]},
        audio_config=audio,
        **ids(
            tokenizer, image_token_id="<|imgpad|>", video_token_id="<|video_pad|>", audio_token_id="<|audio_comp_pad|>"
        ),
    )
    return Parts(built, processor)


def diffusion_gemma() -> Parts:
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    tokenizer = tokenizer_with(**named)
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(patch_size=2, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer,
        transformers.Gemma4VideoProcessor(patch_size=2, pooling_kernel_size=2, num_frames=4),
        template("<|image|>", "<|video|>"),
    )
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24, "global_head_dim": 16}
    vision = {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 2}
    built = config(
        "diffusion_gemma",
        text_config={**TEXT, **WINDOWS, **experts, "vocab_size": rows(tokenizer)},
        vision_config={**vision, "position_embedding_size": 128, "model_type": "gemma4_vision"},
        **ids(tokenizer, boi_token_id="<|image>", eoi_token_id="<image|>", image_token_id="<|image|>"),
    )
    return Parts(built, processor)
