"""LFM: a decoder of convolutions and attention."""

from __future__ import annotations

import transformers

from tests.families.building import TOWER, Parts, config, ids, template, text, tokenizer_with
from tests.families.qwen import IMAGE, PATCHES, VISION, image_processor, vision_ids


def lfm2_vl() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    image = transformers.Lfm2VlImageProcessor(
        downsample_factor=2,
        min_tiles=1,
        max_tiles=4,
        tile_size=32,
        min_image_tokens=4,
        max_image_tokens=16,
        encoder_patch_size=8,
        max_num_patches=64,
    )
    processor = transformers.Lfm2VlProcessor(image, tokenizer, chat_template=template("<image>"))
    layers = ["conv", "full_attention", "conv", "full_attention"]
    built = config(
        "lfm2_vl",
        text_config=text(tokenizer, "lfm2", num_hidden_layers=4, layer_types=layers, block_ff_dim=48),
        vision_config={"model_type": "siglip2_vision_model", **TOWER, "num_patches": 16, "patch_size": 8},
        downsample_factor=2,
        projector_hidden_size=32,
        **ids(tokenizer, image_token_id="<image>"),
    )
    return Parts(built, processor)


def lfm3_vl() -> Parts:
    """Its processor and pixels are those of Qwen3-VL, its positions are of one axis."""
    tokenizer = tokenizer_with(**VISION)
    video = transformers.Qwen3VLVideoProcessor(**PATCHES)
    processor = transformers.Lfm3VlProcessor(image_processor(), tokenizer, video, IMAGE)
    layers = ["conv", "sliding_attention", "conv", "full_attention"]
    decoder = text(
        tokenizer, "lfm3", num_hidden_layers=4, layer_types=layers, head_dim=8, sliding_window=16, pad_token_id=0
    )
    tower = {**TOWER, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "patch_size": 8}
    built = config(
        "lfm3_vl", text_config=decoder, vision_config=tower, projector_hidden_size=32, **vision_ids(tokenizer)
    )
    return Parts(built, processor)
