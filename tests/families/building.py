"""What the builders of tiny backbones share: each family's real configuration and processor classes, no download."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from slq_embed.backbone.families import auto_class, tokenizer_of
from tests.checkpoints import TEXT, build_tokenizer, draw_weights
from tests.checkpoints import chat_template as template  # noqa: F401 - the builders import it from here

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


def rows(tokenizer: Any, spare: int = 64) -> int:
    return len(tokenizer) + spare


def without_spare_rows(parts: Parts) -> Parts:
    """A table as long as the vocabulary: the same parts, changed."""
    tokenizer = tokenizer_of(parts.processor)
    for owner in (parts.config, parts.config.get_text_config()):
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if getattr(owner, name, None) == rows(tokenizer):
                setattr(owner, name, len(tokenizer))
        if hasattr(owner, "additional_vocab_size"):
            owner.additional_vocab_size = len(tokenizer) - owner.vocab_size
    return parts


def text(tokenizer: Any, kind: str = "llama", **more: Any) -> dict[str, Any]:
    """Configuration of a small decoder."""
    return {**TEXT, "model_type": kind, "vocab_size": rows(tokenizer), **more}


def config(kind: str, **values: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **deepcopy(values))  # some write into what they are given


def write(folder: Path, parts: Parts, seed: int = 0) -> Path:
    """Write a checkpoint with random weights."""
    torch.manual_seed(seed)  # of vectors, which are not drawn below
    model = auto_class(parts.config).from_config(parts.config)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    return folder
