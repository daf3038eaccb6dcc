"""Families of earlier years: Idefics 2, the kin of LLaVA that reads videos, ViP-LLaVA, Aria and DeepSeek-VL."""

from __future__ import annotations

from typing import Any

import transformers

from tests.families.building import CLIP, SIGLIP, SQUARE, TOWER, Parts, config, ids, template, text, tokenizer_with
from tests.families.llava import PINPOINTS

IMAGE = template("<image>\n")


def idefics2() -> Parts:
    named = {"image_boundary_token": "<fake_token_around_image>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer = tokenizer_with(image_token="<image>", **named)
    processor = transformers.Idefics2Processor(
        transformers.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 48}, do_image_splitting=True),
        tokenizer,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    resampler = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
    built = config(
        "idefics2",
        text_config=text(tokenizer, "mistral", head_dim=8, pad_token_id=0),
        vision_config={**TOWER, "image_size": 48, "patch_size": 8},
        perceiver_config={**resampler, "num_key_value_heads": 2, "hidden_size": 32},
        **ids(tokenizer, image_token_id="<image>"),
    )
    return Parts(built, processor)


def llava_next_video() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    processor = transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**sizes),
        transformers.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        template("<image>\n", "<video>\n"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    built = config(
        "llava_next_video",
        text_config=text(tokenizer),
        vision_config=CLIP,
        vision_feature_layer=-1,
        image_seq_length=16,
        video_seq_length=4,
        image_grid_pinpoints=PINPOINTS,
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(built, processor)


def video_llava() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    processor = transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**sizes),
        transformers.VideoLlavaVideoProcessor(**sizes),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template("<image>\n", "<video>\n"),
        num_additional_image_tokens=1,
    )
    built = config(
        "video_llava",
        text_config=text(tokenizer),
        vision_config=CLIP,
        vision_feature_layer=-1,
        image_seq_length=16,
        video_seq_length=17,
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(built, processor)


def vipllava() -> Parts:
    """Its processor is LLaVA's."""
    tokenizer = tokenizer_with(image_token="<image>")
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE,
    )
    built = config(
        "vipllava",
        text_config=text(tokenizer),
        vision_config=CLIP,
        vision_feature_layers=[-2, -1],
        image_seq_length=16,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Parts(built, processor)


def aria() -> Parts:
    """Its processor makes images of 980 x 980 pixels, unless its tokenizer's settings name the other size that it knows."""
    tokenizer = tokenizer_with(image_token="<|img|>")
    tokenizer.init_kwargs["max_image_size"] = 490
    processor = transformers.AriaProcessor(
        transformers.AriaImageProcessor(), tokenizer, template("<|img|>"), size_conversion={490: 4}
    )
    built = config(
        "aria",
        text_config=text(tokenizer, "aria_text", moe_num_experts=4, moe_num_shared_experts=1, pad_token_id=0),
        vision_config={"model_type": "idefics3_vision", **TOWER, "image_size": 490, "patch_size": 98},
        projector_patch_to_query_dict={25: 4},
        **ids(tokenizer, image_token_index="<|img|>"),
    )
    return Parts(built, processor)


def deepseek_vl() -> Parts:
    tokenizer = tokenizer_with(image_token="<image_placeholder>")
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessor(size=SQUARE, min_size=8),
        tokenizer,
        template("<image_placeholder>"),
        num_image_tokens=16,
    )
    built = config(
        "deepseek_vl",
        text_config=text(tokenizer),
        vision_config=SIGLIP,
        **ids(tokenizer, image_token_id="<image_placeholder>"),
    )
    return Parts(built, processor)


def deepseek_vl_hybrid() -> Parts:
    """Two towers: SigLIP for a small image, SAM for a large one."""
    tokenizer = tokenizer_with(image_token="<image_placeholder>")
    processor = transformers.DeepseekVLHybridProcessor(
        transformers.DeepseekVLHybridImageProcessor(size=SQUARE, min_size=8, high_res_size={"height": 64, "width": 64}),
        tokenizer,
        template("<image_placeholder>"),
        num_image_tokens=16,
    )
    large = {"model_type": "sam_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    large |= {"image_size": 64, "patch_size": 8, "output_channels": 8, "window_size": 4, "mlp_dim": 48}
    built = config(
        "deepseek_vl_hybrid",
        text_config=text(tokenizer),
        vision_config=SIGLIP,
        high_res_vision_config={**large, "global_attn_indexes": [1], "num_pos_feats": 16},
        **ids(tokenizer, image_token_id="<image_placeholder>"),
    )
    return Parts(built, processor)
