"""The tiny backbones of tests/families, as vLLM can load them: with the names and settings of the published checkpoints."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.families import FAMILIES, others
from tests.families.building import Parts, template, tokenizer_with, write

HEAD = 32
"""The smallest size of a head that vLLM's attention on a CPU computes."""

# What published configurations say, vLLM reads, and transformers does not need.
_TEXT: dict[str, dict[str, Any]] = {
    "lfm2": {
        "conv_dim": 32,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "qwen3_5_moe_text": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "qwen3_5_text": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "glm_ocr_text": {"intermediate_size": 96},
    "glm4v_moe_text": {"use_qk_norm": False},
}


def build(name: str, folder: Path) -> Path:
    """Write the checkpoint of a family of :data:`tests.families.FAMILIES`."""
    _, parts = FAMILIES[name]
    with (
        patch.object(others, "tokenizer_with", _tokenizer_of_gemma) if name in ("gemma3", "gemma3n") else nullcontext()
    ):
        checkpoint = write(folder, for_vllm(parts()))
    _write_weights_as_published(checkpoint)
    return checkpoint


def build_llava_that_begins_texts(folder: Path, *, named: bool = True) -> Path:
    """A LLaVA whose tokenizer adds a token at the start of each text, which its chat template does not write.

    Args:
        folder: Where to.
        named: Whether that token is the tokenizer's ``bos_token``.
    """
    parts = for_vllm(FAMILIES["llava"][1]())
    start, tokenizer = "<|im_start|>", parts.processor.tokenizer._tokenizer
    number = tokenizer.token_to_id(start)
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", pair=None, special_tokens=[(start, number)])
    parts.processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start if named else None,
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=4096,
    )
    parts.processor.chat_template = template("<image>").replace(start, "[").replace("<|im_end|>", "]")
    checkpoint = write(folder, parts)
    _write_weights_as_published(checkpoint)
    return checkpoint


def _tokenizer_of_gemma(**named: str) -> Any:
    """With line breaks as tokens: vLLM joins those that stand beside an image."""
    return tokenizer_with(**named, **{f"breaks_{count}": "\n" * count for count in range(1, 5)})


def for_vllm(parts: Parts) -> Parts:
    """The same parts, changed: heads of :data:`HEAD` numbers, and what only vLLM reads."""
    config, text = parts.config, parts.config.get_text_config()
    _enlarge_heads(text)
    for name, value in _TEXT.get(text.model_type, {}).items():
        setattr(text, name, value)
    if config.model_type == "llava" and config.vision_config.model_type == "pixtral":
        config.vision_config.image_size = parts.processor.image_processor.size["longest_edge"]
    if config.model_type == "lfm2_vl":
        config.vision_config.vision_use_head = False
    if config.model_type == "gemma4":
        text.global_head_dim, config.vision_config.default_output_length = HEAD, 70
    if config.model_type == "aria":  # vLLM knows the processor's own size of images alone
        del parts.processor.tokenizer.init_kwargs["max_image_size"]
        parts.processor.size_conversion = {980: 4}
        config.vision_config.image_size, config.vision_config.patch_size = 980, 196
    if config.model_type == "vipllava":
        config.vision_feature_layer, config.vision_config.num_hidden_layers = (-2, -5, -8, -11, 6), 12
    if config.model_type == "granite4_vision":
        config.qformer_config.intermediate_size = 3072
    return parts


def _enlarge_heads(text: Any) -> None:
    if getattr(text, "kv_lora_rank", None):
        return
    if vars(text).get("head_dim"):
        text.head_dim = HEAD
    else:
        text.num_attention_heads = text.num_key_value_heads = text.hidden_size // HEAD
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        if text.model_type.startswith("glm"):
            rope["partial_rotary_factor"] = 0.5
        half = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _write_weights_as_published(folder: Path) -> None:
    """With the names and layouts of published checkpoints; transformers writes a model as it was when loaded."""
    config, path = json.loads((folder / "config.json").read_text("utf8")), folder / "model.safetensors"
    tower = config.get("vision_config", {}).get("model_type", "")
    weights = {}
    for name, value in load_file(path).items():
        if tower.startswith(("clip", "siglip")):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if config["model_type"] == "qwen3_vl_moe" and "mlp.experts." in name:
            value = value.transpose(1, 2).contiguous()
        weights[name] = value
    save_file(weights, path, {"format": "pt"})
