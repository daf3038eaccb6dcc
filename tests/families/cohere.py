"""Aya Vision, Cohere 2 Vision, and Cohere 2 with experts for texts: a decoder most of whose layers see a window."""

from __future__ import annotations

import transformers

from tests.families.building import SIGLIP, SQUARE, Parts, config, ids, template, text, tokenizer_with
from tests.families.others import text_only

LAYERS = {
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}


def aya_vision() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<image>",
        start="<|START_OF_IMG|>",
        end="<|END_OF_IMG|>",
        patch="<|IMG_PATCH|>",
        line="<|IMG_LINE_BREAK|>",
        tile="TILE",
        tile_global="TILE_GLOBAL",
        **{f"tile_{n}": f"TILE_{n}" for n in range(1, 5)},
    )
    processor = transformers.AyaVisionProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=template("<image>"),
    )
    built = config(
        "aya_vision",
        text_config=text(tokenizer, "cohere2", **LAYERS),
        vision_config=SIGLIP,
        vision_feature_layer=-1,
        downsample_factor=2,
        **ids(tokenizer, image_token_index="<|IMG_PATCH|>"),
    )
    return Parts(built, processor)


def cohere2_vision() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|IMG_PATCH|>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )
    image = transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, max_patches=4)
    processor = transformers.Cohere2VisionProcessor(image, tokenizer, template("<|IMG_PATCH|>"))
    built = config(
        "cohere2_vision",
        text_config=text(tokenizer, "cohere2", **LAYERS),
        vision_config=SIGLIP,
        downsample_factor=2,
        alignment_intermediate_size=48,
        **ids(tokenizer, image_token_id="<|IMG_PATCH|>"),
    )
    return Parts(built, processor)


def cohere2_moe() -> Parts:
    kinds = ["dense"] + ["sparse"] * 3
    return text_only("cohere2_moe", **LAYERS, head_dim=8, num_experts=4, mlp_layer_types=kinds)
