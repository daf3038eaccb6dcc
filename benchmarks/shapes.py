"""Backbones of true shapes with random weights: speed and memory do not depend on the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from slq_embed import pretrained

PATCH = 16  # pixels; a token of Qwen3-VL is two by two patches
TILE = {"height": 448, "width": 448}  # of InternVL: 256 tokens, whatever the image

_ROPE = {"rope_type": "default", "rope_theta": 5000000.0}
_QWEN_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16}
_QWEN_VISION |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}
_QWEN_TEXT = {"vocab_size": 151936, "num_hidden_layers": 28, "num_key_value_heads": 8, "head_dim": 128}
_QWEN_TEXT |= {"rope_parameters": {**_ROPE, "mrope_section": [24, 20, 20]}}
_INTERN_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_INTERN_VISION |= {"image_size": [448, 448], "patch_size": [14, 14]}
_INTERN_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "design": {  # Qwen3-VL with 61 M parameters: what two CPU cores can do
        "text": {
            "vocab_size": 8192,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
        },
        "vision": {
            "depth": 8,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_heads": 6,
            "num_position_embeddings": 1024,
            "deepstack_visual_indexes": [4],
        },
    },
    "qwen3-vl-2b": {
        "text": {**_QWEN_TEXT, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
        "vision": _QWEN_VISION,
    },
    "qwen3-vl-4b": {
        "text": {
            **_QWEN_TEXT,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
        "vision": _QWEN_VISION,
    },
    "internvl3-1b": {
        "text": {
            "vocab_size": 151674,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        "vision": _INTERN_VISION,
    },
    "internvl3-8b": {
        "text": {
            "vocab_size": 151674,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision": _INTERN_VISION,
    },
}
"""The true sizes are those of the released configurations; the tokenizer is the embedded default's."""


def is_internvl(shape: str) -> bool:
    return shape.startswith("internvl")


def build_config(shape: str, tokenizer: Any) -> PretrainedConfig:
    """A configuration that fits a tokenizer."""
    sizes = SHAPES[shape]
    if is_internvl(shape):
        text = {"model_type": "qwen2", "max_position_embeddings": 32768, **sizes["text"]}
        image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        return AutoConfig.for_model(
            "internvl",
            text_config=text,
            vision_config=sizes["vision"],
            image_token_id=image_token,
            tie_word_embeddings=False,
        )
    tiny = AutoConfig.from_pretrained(pretrained("mllm-tiny"))
    text = {**tiny.text_config.to_dict(), **sizes["text"]}
    vision = {**sizes["vision"], "patch_size": PATCH, "out_hidden_size": text["hidden_size"]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(tiny, name) for name in names}
    return AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build_processor(shape: str, min_pixels: int, max_pixels: int) -> ProcessorMixin:
    """A processor; InternVL makes one tile of every image."""
    processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))
    if not is_internvl(shape):
        processor.image_processor.patch_size = PATCH
        processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        return processor
    tokenizer = AutoTokenizer.from_pretrained(pretrained("mllm-tiny"), extra_special_tokens=_INTERN_TOKENS)
    template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    image, video = GotOcr2ImageProcessor(size=TILE), InternVLVideoProcessor(size=TILE)
    return InternVLProcessor(image, tokenizer, video, image_seq_length=256, chat_template=template)


def build_backbone(shape: str, device: str, dtype: str) -> PreTrainedModel:
    """A backbone in ``eval()``."""
    torch.manual_seed(0)
    config = build_config(shape, build_processor(shape, 1, 1).tokenizer)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def build_folder(folder: Path, shape: str, dtype: str, max_pixels: int, device: str = "cpu") -> None:
    """A checkpoint whose images keep their size below ``max_pixels``; a CPU draws a billion weights in 20 seconds or more."""
    build_backbone(shape, device, dtype).save_pretrained(folder)
    build_processor(shape, 32 * 32, max_pixels).save_pretrained(folder)
