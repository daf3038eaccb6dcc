"""Models that draw images as well: Janus, and Chameleon and Emu 3, which read an image as tokens of a codebook."""

from __future__ import annotations

from typing import Any

import transformers

from tests.checkpoints import TEXT
from tests.families.building import SQUARE, TOWER, Parts, config, ids, rows, template, text, tokenizer_with

CODEBOOK: dict[str, Any] = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}


def janus() -> Parts:
    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_with(**named)
    processor = transformers.JanusProcessor(
        transformers.JanusImageProcessor(size=SQUARE, min_size=8),
        tokenizer,
        template("<image_placeholder>\n"),
        num_image_tokens=16,
    )
    tower = {**TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 32, "num_image_tokens": 16}
    drawn = {**CODEBOOK, "num_embeddings": 8, "channel_multiplier": [1, 1], "projection_dim": 32}
    built = config(
        "janus",
        text_config=text(tokenizer),
        vision_config=tower,
        vq_config={**drawn, "image_token_embed_dim": 32, "num_patches": 4},
        **ids(tokenizer, image_token_id="<image_placeholder>"),
    )
    return Parts(built, processor)


def chameleon() -> Parts:
    named = {
        "image_token": "<image>",
        "boi_token": "<racm3:break>",
        "eoi_token": "<eoss>",
        "sep_token": "<reserved08706>",
    }
    # A code is named IMGIMG and letters from A to J, which stand for the figures of its number, and then Z.
    codes = {f"code_{n}": f"IMGIMG{chr(ord('A') + n)}Z" for n in range(8)}
    tokenizer = tokenizer_with(**named, **codes)
    processor = transformers.ChameleonProcessor(
        transformers.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE), tokenizer, 16
    )
    processor.chat_template = template("<image>")  # the class does not take it as an argument
    built = config(
        "chameleon",
        **{**TEXT, "vocab_size": rows(tokenizer), "pad_token_id": 0, "num_key_value_heads": 4},
        vq_config={**CODEBOOK, "num_embeddings": 8, "resolution": 32, "channel_multiplier": [1, 1, 1, 1]},
        vocabulary_map=tokenizer.get_vocab(),
    )
    return Parts(built, processor)


def emu3() -> Parts:
    """The self-check refuses it, so it is in no list."""
    named = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    named |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>", "eol_token": "<|extra_200|>"}
    codes = {f"code_{n}": f"<|visual token {n:06d}|>" for n in range(64)}
    tokenizer = tokenizer_with(**named, **codes)
    tokenizer.add_special_tokens({"bos_token": "<|extra_203|>"})
    image = transformers.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=48 * 48)
    processor = transformers.Emu3Processor(image, tokenizer, template("<image>"))
    drawn = {**CODEBOOK, "codebook_size": 64, "channel_multiplier": [1, 1, 1, 1], "attn_resolutions": [3]}
    built = config(
        "emu3",
        text_config=text(tokenizer, "emu3_text_model", pad_token_id=0, bos_token_id=1, eos_token_id=2),
        vq_config={**drawn, "hidden_size": 32, "embed_dim": 4, "latent_channels": 4},
        vocabulary_map=tokenizer.get_vocab(),
    )
    return Parts(built, processor)
