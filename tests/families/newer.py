"""Families of 2026 that are laid out like Qwen-VL: pixels by patches, positions of one or three axes."""

from __future__ import annotations

import transformers

from tests.checkpoints import TEXT
from tests.families.building import MROPE, Parts, config, ids, rows, template, text, tokenizer_with
from tests.families.qwen import IMAGE, LINEAR, PATCHES, PIXELS, TOWER, VISION, _qwen3, image_processor


def exaone4_5() -> Parts:
    tokenizer = tokenizer_with(**VISION)
    sizes = {"shortest_edge": 2 * 16 * 16, "longest_edge": 8 * 32 * 32}
    processor = transformers.Exaone4_5_Processor(
        image_processor(), tokenizer, transformers.Qwen2VLVideoProcessor(**PATCHES, size=sizes), IMAGE
    )
    layers = {"num_hidden_layers": 4, "sliding_window": 16, "sliding_window_pattern": 4, "head_dim": 8}
    built = config(
        "exaone4_5",
        text_config=text(tokenizer, "exaone4", **layers, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
        vision_config={**TOWER, "num_key_value_heads": 2, "window_size": 32, "fullatt_block_indexes": [1]},
        **ids(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    return Parts(built, processor)


def qwen4_exp() -> Parts:
    """Positions of three axes, linear attention, attention to chosen blocks, and embeddings of pairs and triples of tokens."""
    layers = {"layer_types": ["linear_attention", "indexed_attention"], "num_hidden_layers": 2}
    index = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    ngrams = {"ple_layer_ids": [1], "ngram_vocab_size_base": 300, "heads_per_ngram": 2, "split_ngram_parts": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    mixed = {**LINEAR, **experts, **index, **ngrams, **layers, "indexer_compress_ratio": 2}
    mixed |= {"hc_count": 2, "hc_lowrank": 8, "shared_expert_intermediate_size": 24, "eos_token_id": 0}
    return _qwen3("qwen4_exp", mixed, {})


def ernie4_5_vl_moe() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|IMAGE_PLACEHOLDER|>",
        image_start_token="<|IMAGE_START|>",
        image_end_token="<|IMAGE_END|>",
        video_token="<|VIDEO_PLACEHOLDER|>",
        video_start_token="<|VIDEO_START|>",
        video_end_token="<|VIDEO_END|>",
    )
    start, end = "<|IMAGE_START|>", "<|IMAGE_END|>"
    processor = transformers.Ernie4_5_VLMoeProcessor(
        transformers.Ernie4_5_VLMoeImageProcessor(patch_size=8, size=PIXELS),
        tokenizer,
        transformers.Ernie4_5_VLMoeVideoProcessor(patch_size=8, size=PIXELS, draw_on_frames=False),
        template(f"{start}<|IMAGE_PLACEHOLDER|>{end}", "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"),
    )
    rope = {**MROPE, "mrope_section": [1, 1, 2]}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 16], "moe_num_shared_experts": 1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
    built = config(
        "ernie4_5_vl_moe",
        text_config={**TEXT, **experts, "vocab_size": rows(tokenizer), "rope_parameters": rope},
        vision_config=vision,
        **ids(
            tokenizer,
            image_token_id="<|IMAGE_PLACEHOLDER|>",
            image_start_token_id=start,
            image_end_token_id=end,
            video_token_id="<|VIDEO_PLACEHOLDER|>",
            video_start_token_id="<|VIDEO_START|>",
            video_end_token_id="<|VIDEO_END|>",
        ),
    )
    return Parts(built, processor)


GLM_NAMES = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}


def glm5_next() -> Parts:
    tokenizer = tokenizer_with(**GLM_NAMES)
    tokens = {"min_image_tokens": 1, "max_image_tokens": 9}
    processor = transformers.Glm5NextProcessor(
        transformers.Glm5NextImageProcessor(**PATCHES, **tokens),
        tokenizer,
        transformers.Glm5NextVideoProcessor(**PATCHES),
        template("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"),
    )
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
    index = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 16, "index_kpool": 2}
    linear = {"linear_head_dim": 8, "linear_num_heads": 4, "hc_mult": 2, "hc_sinkhorn_iters": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    kinds = {"layer_types": ["linear_attention", "indexed_attention"], "indexer_types": ["full"] * 2}
    kinds |= {"mlp_layer_types": ["dense", "sparse"]}
    text = {**TEXT, **latent, **index, **linear, **experts, **kinds, "vocab_size": rows(tokenizer), "pad_token_id": 0}
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 4, "image_size": 32, "patch_size": 8, "out_hidden_size": 32}
    built = config(
        "glm5_next",
        text_config=text,
        vision_config={**vision, "intermediate_size": 48, "projection_intermediate_size": 48},
        **ids(tokenizer, **{f"{name}_id": token for name, token in GLM_NAMES.items()}),
    )
    return Parts(built, processor)


def minimax_m3_vl() -> Parts:
    image, video = "]<]image[>[", "]<]video[>["
    tokenizer = tokenizer_with(
        image_token=image, video_token=video, start="]<]start of image[>[", end="]<]end of image[>["
    )
    processor = transformers.MiniMaxM3VLProcessor(
        transformers.MiniMaxM3VLImageProcessor(**PATCHES, size=PIXELS),
        tokenizer,
        transformers.MiniMaxM3VLVideoProcessor(**PATCHES),
        template(image, video),
    )
    kinds = {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]}
    index = {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 3}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
    experts |= {"dense_intermediate_size": 48, "shared_intermediate_size": 24}
    decoder = {**TEXT, **kinds, **index, **experts, "head_dim": 8, "rotary_dim": 4, "vocab_size": rows(tokenizer)}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    built = config(
        "minimax_m3_vl",
        text_config=decoder,
        vision_config={**vision, "image_size": 64, "patch_size": 8},
        projector_hidden_size=48,
        **ids(tokenizer, image_token_index=image, video_token_index=video),
    )
    return Parts(built, processor)


def hunyuan_vl() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<image>", image_start_token="<im_start>", image_end_token="<im_end>", newline="<im_newline>"
    )
    processor = transformers.HunYuanVLProcessor(
        transformers.HunYuanVLImageProcessor(patch_size=8, size=PIXELS),
        tokenizer,
        template("<im_start><image><im_end>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    decoder = {**TEXT, "head_dim": 8, "vocab_size": rows(tokenizer), "rope_parameters": rope}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"patch_size": 8, "out_hidden_size": 32, "max_image_size": 64, "img_max_token_num": 64}
    built = config(
        "hunyuan_vl",
        text_config=decoder,
        vision_config=vision,
        **ids(
            tokenizer,
            image_token_id="<image>",
            im_start_id="<im_start>",
            im_end_id="<im_end>",
            im_newline_id="<im_newline>",
        ),
    )
    return Parts(built, processor)
