"""Small checkpoints of real architectures, built from configurations: random weights, no download."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
INTERN_VISION = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "internvl", "fast_vlm")


def chat_template(image: str, video: str = "") -> str:
    """A template that writes this for each image and each video; without videos it leaves them out."""
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def build_tokenizer(extra: list[str] | dict[str, str]) -> Any:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(["a red circle above a blue square", "two green stars and a heart"], trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    named = {"extra_special_tokens": extra} if isinstance(extra, dict) else {}
    tokenizer = transformers.Qwen2Tokenizer(vocab=trained.get_vocab(), merges=merges, model_max_length=4096, **named)
    strings = [*SPECIAL[1:], *(extra.values() if isinstance(extra, dict) else extra)]
    tokenizer.add_special_tokens({"additional_special_tokens": strings}, replace_extra_special_tokens=False)
    return tokenizer


def qwen_parts(kind: str, rows: int | None, spare: int) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(QWEN_VISION)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in [*SPECIAL, *QWEN_VISION]}
    patch = 8
    sections = [2, 1, 1]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    text = {**TEXT, "vocab_size": rows or len(tokenizer) + spare, "rope_parameters": rope}
    if kind == "qwen3_vl":
        text["head_dim"] = 8
        vision = {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        vision |= {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4}
    elif kind == "qwen2_5_vl":
        vision = {"out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1]}
        vision |= {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4}
    else:
        vision = {"hidden_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    config = transformers.AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config={**vision, "patch_size": patch},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    image = transformers.Qwen2VLImageProcessor(patch_size=patch, temporal_patch_size=2, merge_size=2, size=pixels)
    template = chat_template(
        "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    )
    names = {"qwen3_vl": "Qwen3VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}
    video = {"qwen3_vl": "Qwen3VLVideoProcessor"}.get(kind, "Qwen2VLVideoProcessor")
    sizes = {"shortest_edge": 2 * 16 * 16, "longest_edge": 8 * 32 * 32}
    video_processor = getattr(transformers, video)(patch_size=patch, temporal_patch_size=2, merge_size=2, size=sizes)
    processor = getattr(transformers, f"{names[kind]}Processor")(image, tokenizer, video_processor, template)
    return config, processor


def internvl_parts(rows: int | None, spare: int) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(INTERN_VISION)
    text = {**TEXT, "model_type": "qwen2", "vocab_size": rows or len(tokenizer) + spare}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.AutoConfig.for_model(
        "internvl",
        text_config=text,
        vision_config={**vision, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    image = transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.InternVLProcessor(
        image,
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    return config, processor


def fast_vlm_parts(rows: int | None, spare: int) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(["<image>"])
    text = {**TEXT, "model_type": "llama", "vocab_size": rows or len(tokenizer) + spare}
    config = transformers.AutoConfig.for_model(
        "fast_vlm",
        text_config=text,
        # A convolutional tower of timm's own tests, with a token for each 32 x 32 pixels.
        vision_config={"model_type": "timm_wrapper", "architecture": "test_efficientnet", "hidden_size": 256},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    image = transformers.CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        image,
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>\n"),
    )
    return config, processor


def parts_of(kind: str, rows: int | None = None, spare: int = 64) -> tuple[Any, Any]:
    """Configuration and processor of one of :data:`FAMILIES`.

    Args:
        kind: Its ``model_type``.
        rows: Rows of the embedding table; by default the tokenizer's length and ``spare``.
        spare: Rows past the tokenizer's last id.
    """
    return {"internvl": internvl_parts, "fast_vlm": fast_vlm_parts}.get(kind, partial(qwen_parts, kind))(rows, spare)


def draw_weights(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Draw weights wide enough that embeddings differ; ``scale`` is that of all matrices but the embedding tables."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                is_table = parameter.ndim == 2 and parameter.shape[0] > 200
                size = 0.5 if is_table else scale * parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def build(folder: Path, kind: str = "qwen3_vl", *, rows: int | None = None, spare: int = 64, seed: int = 0) -> Path:
    """Write a checkpoint with random weights."""
    config, processor = parts_of(kind, rows, spare)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    draw_weights(model, seed, scale=1.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
