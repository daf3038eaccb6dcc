"""Readers of documents: OCR models whose decoder answers in text."""

from __future__ import annotations

from typing import Any

import transformers

from tests.families.building import MROPE, SQUARE, TOWER, Parts, config, ids, template, text, tokenizer_with
from tests.families.llava import PIXTRAL
from tests.families.qwen import IMAGE, PIXELS, VISION, vision_ids


def paddleocr_vl() -> Parts:
    tokenizer = tokenizer_with(**VISION)
    image = transformers.PaddleOCRVLImageProcessor(patch_size=8, merge_size=2, size=PIXELS)
    processor = transformers.PaddleOCRVLProcessor(image, tokenizer, IMAGE)
    built = config(
        "paddleocr_vl",
        text_config=text(tokenizer, "paddleocr_vl_text", head_dim=8, rope_parameters=MROPE),
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        **vision_ids(tokenizer),
    )
    return Parts(built, processor)


def lighton_ocr() -> Parts:
    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tokenizer = tokenizer_with(**named)
    image = transformers.PixtralImageProcessor(size={"longest_edge": 48}, patch_size={"height": 16, "width": 16})
    processor = transformers.LightOnOcrProcessor(
        image, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=template("<|image_pad|>")
    )
    built = config(
        "lighton_ocr",
        text_config=text(tokenizer, "qwen3", head_dim=8),
        vision_config=PIXTRAL,
        spatial_merge_size=2,
        **ids(tokenizer, image_token_id="<|image_pad|>"),
    )
    return Parts(built, processor)


ONE = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.35}


def granite_docling() -> Parts:
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "tag": "<global-img>"}
    named |= {f"row_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)}
    tokenizer = tokenizer_with(**named)
    image = transformers.GraniteDoclingImageProcessor(size=SQUARE, max_patches=4)
    processor = transformers.GraniteDoclingProcessor(
        image, tokenizer, image_seq_len=4, chat_template=template("<image>")
    )
    tower = {**TOWER, "image_size": 32, "patch_size": 8, "scale_factor": 2, "deepstack_visual_indexes": [0]}
    built = config(
        "granite_docling",
        text_config=text(tokenizer, "granite_docling_text", pad_token_id=0, **ONE),
        vision_config={**tower, "out_hidden_size": 32},
        **ids(tokenizer, image_token_id="<image>"),
    )
    return Parts(built, processor)


SAM: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "output_channels": 8}
SAM |= {"window_size": 8, "mlp_dim": 8, "global_attn_indexes": []}


def deepseek_ocr2() -> Parts:
    """Its tower has 144 queries for a small image and 256 for a large one, so a patch is one pixel here."""
    tokenizer = tokenizer_with(image_token="<image>")
    sizes = {"size": {"height": 48, "width": 48}, "tile_size": 64}
    processor = transformers.DeepseekOcr2Processor(
        transformers.DeepseekOcr2ImageProcessor(**sizes), tokenizer, template("<image>\n"), patch_size=1
    )
    encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam = {**SAM, "image_size": 64, "patch_size": 1, "downsample_channels": [8, 16]}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    built = config(
        "deepseek_ocr2",
        text_config=text(tokenizer, "deepseek_ocr2_text", mlp_layer_types=["dense", "sparse"], **experts),
        vision_config={
            "sam_config": sam,
            "encoder_config": {**encoder, "num_key_value_heads": 2, "vocab_size": 8},
        },
        **ids(tokenizer, image_token_id="<image>"),
    )
    return Parts(built, processor)


def unlimited_ocr() -> Parts:
    tokenizer = tokenizer_with(image_token="<image>")
    sizes = {"size": SQUARE, "tile_size": 16}
    processor = transformers.UnlimitedOcrProcessor(
        transformers.UnlimitedOcrImageProcessor(**sizes), tokenizer, template("<image>\n"), patch_size=4
    )
    sam = {**SAM, "image_size": 32, "patch_size": 4, "downsample_channels": [8, 32]}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
    heads = {"num_key_value_heads": 4}  # its eager attention repeats none
    built = config(
        "unlimited_ocr",
        text_config=text(tokenizer, "unlimited_ocr_text", sliding_window=16, **experts, **heads),
        vision_config={"sam_config": sam, "encoder_config": {**TOWER, "image_size": 32, "patch_size": 16}},
        **ids(tokenizer, image_token_id="<image>"),
    )
    return Parts(built, processor)


def qianfan_ocr() -> Parts:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_with(**named, placeholder="<image>")
    processor = transformers.QianfanOCRProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE, max_patches=4),
        tokenizer,
        image_seq_length=4,
        chat_template=template("<image>\n"),
    )
    built = config(
        "qianfan_ocr",
        text_config=text(tokenizer, "qwen3", head_dim=8),
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        image_seq_length=4,
        **ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return Parts(built, processor)
