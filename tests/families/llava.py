"""LLaVA and what is laid out like it: a tower, a projector, an ordinary decoder."""

from __future__ import annotations

from typing import Any

import transformers

from tests.families.building import (
    CLIP,
    SIGLIP,
    SQUARE,
    TOWER,
    Parts,
    config,
    ids,
    rows,
    template,
    text,
    tokenizer_with,
)

IMAGE = template("<image>\n")
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _next_image() -> Any:
    return transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )


def llava() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>")
    image = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    processor = transformers.LlavaProcessor(
        image,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE,
    )
    built = config(
        "llava",
        text_config=text(tokenizer),
        vision_config=CLIP,
        vision_feature_layer=-1,
        image_seq_length=16,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Parts(built, processor)


def llava_next() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>")
    processor = transformers.LlavaNextProcessor(
        _next_image(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE,
    )
    built = config(
        "llava_next",
        text_config=text(tokenizer, "mistral"),
        vision_config=CLIP,
        vision_feature_layer=-1,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Parts(built, processor)


def llava_onevision() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>", video_token="<video>")
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", "<video>\n"),
    )
    built = config(
        "llava_onevision",
        text_config=text(tokenizer, "qwen2"),
        vision_config=SIGLIP,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
        **ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return Parts(built, processor)


def granite4_vision() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>")
    processor = transformers.Granite4VisionProcessor(
        _next_image(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=IMAGE,
        downsample_rate="1/2",
    )
    built = config(
        "granite4_vision",
        text_config=text(tokenizer, "granite4_vision_text"),
        vision_config={**SIGLIP, "hidden_size": 64},
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        spatial_target_layers=[0, 0, 1, 1],
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        qformer_config={**TOWER, "num_hidden_layers": 1, "encoder_hidden_size": 32},
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Parts(built, processor)


def granite_vision() -> Parts:
    """Granite Vision 3: LLaVA-NeXT around a Granite decoder, features of several layers."""
    tokenizer = tokenizer_with(image_token="<image>")
    processor = transformers.LlavaNextProcessor(
        _next_image(), tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=IMAGE
    )
    built = config(
        "llava_next",
        text_config=text(tokenizer, "granite"),
        vision_config=SIGLIP,
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Parts(built, processor)


def _idefics(kind: str) -> Parts:
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    named |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    named |= {f"row_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)}
    tokenizer = tokenizer_with(**named)
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    if kind == "idefics3":
        processor = transformers.Idefics3Processor(
            transformers.Idefics3ImageProcessor(**sizes), tokenizer, image_seq_len=4, chat_template=template("<image>")
        )
    else:
        video = transformers.SmolVLMVideoProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, video_sampling={"fps": 1, "max_frames": 4}
        )
        processor = transformers.SmolVLMProcessor(
            transformers.SmolVLMImageProcessor(**sizes), tokenizer, video, 4, chat_template=template("<image>")
        )
    built = config(
        kind,
        text_config=text(tokenizer, pad_token_id=0),
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        pad_token_id=0,
        **ids(tokenizer, image_token_id="<image>"),
    )
    return Parts(built, processor)


def idefics3() -> Parts:
    return _idefics("idefics3")


def smolvlm() -> Parts:
    return _idefics("smolvlm")


def _pixtral(merge: int) -> tuple[Any, Any]:
    tokenizer = tokenizer_with(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    size = 8 * merge
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8})
        if merge == 1
        else transformers.PixtralImageProcessor(size={"longest_edge": 48}, patch_size={"height": size, "width": size}),
        tokenizer,
        patch_size=8,
        spatial_merge_size=merge,
        chat_template=template("[IMG]"),
    )
    return tokenizer, processor


PIXTRAL = {"model_type": "pixtral", **TOWER, "image_size": 64, "patch_size": 8, "head_dim": 8}


def pixtral() -> Parts:
    tokenizer, processor = _pixtral(1)
    built = config(
        "llava",
        text_config=text(tokenizer, "mistral", head_dim=8),
        vision_config=PIXTRAL,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **ids(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(built, processor)


def mistral3() -> Parts:
    tokenizer, processor = _pixtral(2)
    built = config(
        "mistral3",
        text_config=text(tokenizer, "mistral", head_dim=8),
        vision_config=PIXTRAL,
        vision_feature_layer=-1,
        spatial_merge_size=2,
        **ids(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(built, processor)


def mistral4() -> Parts:
    """Mistral Small 4: the tower of Mistral 3 around a decoder of latent attention with experts."""
    tokenizer, processor = _pixtral(2)
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 4}
    built = config(
        "mistral3",
        text_config=text(tokenizer, "mistral4", **latent, **experts),
        vision_config=PIXTRAL,
        vision_feature_layer=-1,
        spatial_merge_size=2,
        **ids(tokenizer, image_token_index="[IMG]"),
    )
    return Parts(built, processor)


def internvl3_5() -> Parts:
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokenizer = tokenizer_with(**named, context_image_token="<IMG_CONTEXT>", video_token="<video>")
    built = config(
        "internvl",
        text_config=text(tokenizer, "qwen3", head_dim=8),
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        image_seq_length=4,
        **ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE),
        tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    return Parts(built, processor)


def ovis2() -> Parts:
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokens = {f"indicator_{number}": token for number, token in enumerate(indicators)}
    tokenizer = tokenizer_with(image_token="<image>", atom="<IMG_ATOM>", **tokens)
    processor = transformers.Ovis2Processor(
        transformers.Ovis2ImageProcessor(size=SQUARE),
        tokenizer,
        image_seq_length=4,
        chat_template=template("<image>\n"),
    )
    built = config(
        "ovis2",
        text_config=text(tokenizer, "qwen2"),
        vision_config={**TOWER, "image_size": 32, "patch_size": 8, "vocab_size": 40, "hidden_stride": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(indicators),
        vocab_size=rows(tokenizer),
        hidden_size=32,
    )
    return Parts(built, processor)


def perception_lm() -> Parts:
    tokenizer = tokenizer_with(image_token="<|image|>", video_token="<|video|>")
    processor = transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(size=SQUARE),
        transformers.PerceptionLMImageProcessor(tile_size=32, max_num_tiles=4),
        tokenizer,
        patch_size=8,
        pooling_ratio=2,
        chat_template=template("<|image|>", "<|video|>"),
    )
    tower = {"embed_dim": 32, "depth": 2, "img_size": [32, 32], "patch_size": 8, "num_heads": 4, "global_pool": ""}
    built = config(
        "perception_lm",
        text_config=text(tokenizer),
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "do_pooling": True,
            "num_classes": 32,
            "global_pool": "map",
            "model_args": {**tower, "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]},
        },
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        **ids(tokenizer, image_token_id="<|image|>", video_token_id="<|video|>"),
    )
    return Parts(built, processor)
