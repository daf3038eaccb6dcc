"""What the builders of tiny backbones share: each family's real configuration and processor classes, no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from slq_embed.backbone.families import auto_class
from tests.checkpoints import build_tokenizer, chat_template

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "image_size": 32, "patch_size": 8, "vision_use_head": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SQUARE = {"height": 32, "width": 32}


@dataclass
class Parts:
    """A configuration and a processor, from which a checkpoint is written."""

    config: Any
    processor: Any


def tokenizer_with(**named: str) -> Any:
    """A tokenizer that knows these tokens, and has each as an attribute."""
    return build_tokenizer(named)


def ids(tokenizer: Any, **named: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}


def template(image: str, video: str = "") -> str:
    return chat_template(image, video)


def rows(tokenizer: Any, spare: int = 64) -> int:
    return len(tokenizer) + spare


def config(kind: str, **values: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **values)


def write(folder: Path, parts: Parts, seed: int = 0) -> Path:
    """Write a checkpoint whose weights are drawn wide enough that embeddings differ."""
    torch.manual_seed(seed)
    model = auto_class(parts.config).from_config(parts.config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = 0.5 if parameter.ndim == 2 and parameter.shape[0] > 200 else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    return folder
