"""Gemma, Llama 4, Molmo 2, and language models that read texts only."""

from __future__ import annotations

from typing import Any

import transformers

from tests.checkpoints import TEXT
from tests.families.building import SIGLIP, SQUARE, TOWER, Parts, config, ids, rows, template, tokenizer_with

WINDOWS = {"num_hidden_layers": 4, "sliding_window": 16, "head_dim": 8}
WINDOWS |= {"layer_types": ["sliding_attention", "full_attention"] * 2}


def gemma3() -> Parts:
    tokenizer = tokenizer_with(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    image = transformers.Gemma3ImageProcessor(size=SQUARE)
    processor = transformers.Gemma3Processor(image, tokenizer, template("<start_of_image>"), image_seq_length=4)
    built = config(
        "gemma3",
        text_config={**TEXT, **WINDOWS, "model_type": "gemma3_text", "vocab_size": rows(tokenizer)},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        **ids(
            tokenizer,
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
            image_token_index="<image_soft_token>",
        ),
    )
    return Parts(built, processor)


def gemma3n() -> Parts:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    named |= {"boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    # All rows past the text belong to the towers, so the queries need tokens that are set aside, as Gemma's are.
    tokenizer = tokenizer_with(**{f"unused_{n}": f"<unused{n}>" for n in range(16)}, **named)
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(feature_size=8),
        transformers.SiglipImageProcessor(size={"height": 64, "width": 64}),
        tokenizer,
        template("<image_soft_token>"),
        image_seq_length=4,
    )
    used = len(tokenizer)
    # Text, then rows of the two towers, then spare rows.
    layers = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": used, "hidden_size_per_layer_input": 8}
    layers |= {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
    audio = {"hidden_size": 32, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 1, "input_feat_size": 8}
    built = config(
        "gemma3n",
        text_config={**TEXT, **WINDOWS, **layers, "vocab_size": rows(tokenizer), "intermediate_size": [48] * 4},
        # A convolutional tower of timm's own tests, with a token for each 32 x 32 pixels.
        vision_config={"architecture": "test_efficientnet", "hidden_size": 256, "vocab_offset": used, "vocab_size": 8},
        audio_config={**audio, "vocab_offset": used + 8, "vocab_size": 8, "sscp_conv_channel_size": [4, 2]},
        vision_soft_tokens_per_image=4,
        **ids(
            tokenizer,
            boi_token_id="<start_of_image>",
            eoi_token_id="<end_of_image>",
            image_token_id="<image_soft_token>",
            boa_token_id="<start_of_audio>",
            eoa_token_id="<end_of_audio>",
            audio_token_id="<audio_soft_token>",
        ),
    )
    return Parts(built, processor)


def gemma4() -> Parts:
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    tokenizer = tokenizer_with(**named)
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(patch_size=2, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer,
        transformers.Gemma4VideoProcessor(patch_size=2, pooling_kernel_size=2, num_frames=4),
        template("<|image|>", "<|video|>"),
    )
    shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "use_bidirectional_attention": "vision"}
    text = {**TEXT, **WINDOWS, **shared, "vocab_size": rows(tokenizer), "vocab_size_per_layer_input": rows(tokenizer)}
    vision = {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 2, "pooling_kernel_size": 2}
    built = config(
        "gemma4",
        text_config=text,
        vision_config={**vision, "position_embedding_size": 128},
        audio_config=None,
        **ids(
            tokenizer,
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            boa_token_id="<|audio>",
            eoa_token_index="<audio|>",
            audio_token_id="<|audio|>",
        ),
    )
    return Parts(built, processor)


def _paligemma(text: str, **more: Any) -> Parts:
    tokenizer = tokenizer_with(image_token="<image>")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    image = transformers.SiglipImageProcessor(size=SQUARE)
    image.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(
        image,
        tokenizer,
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}",
    )
    built = config(
        "paligemma",
        text_config={**TEXT, "model_type": text, "vocab_size": rows(tokenizer), "head_dim": 8, **more},
        vision_config=SIGLIP,
        projection_dim=32,
        **ids(tokenizer, image_token_index="<image>"),
    )
    return Parts(built, processor)


def paligemma() -> Parts:
    return _paligemma("gemma")


def paligemma2() -> Parts:
    return _paligemma("gemma2", sliding_window=16)


def llama4() -> Parts:
    tokenizer = tokenizer_with(
        image_token="<|image|>",
        start="<|image_start|>",
        end="<|image_end|>",
        patch="<|patch|>",
        x="<|tile_x_separator|>",
        y="<|tile_y_separator|>",
    )
    processor = transformers.Llama4Processor(
        transformers.Llama4ImageProcessor(size=SQUARE, max_patches=4),
        tokenizer,
        patch_size=8,
        pixel_shuffle_ratio=0.5,
        chat_template=template("<|image|>"),
    )
    text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    text |= {"model_type": "llama4_text", "no_rope_layers": [1, 1, 1, 0], "vocab_size": rows(tokenizer)}
    vision = {**TOWER, "image_size": 32, "patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32}
    vision |= {"projector_output_dim": 32, "intermediate_size": 128}
    built = config(
        "llama4",
        text_config=text,
        vision_config=vision,
        **ids(
            tokenizer,
            boi_token_index="<|image_start|>",
            eoi_token_index="<|image_end|>",
            image_token_index="<|patch|>",
        ),
    )
    return Parts(built, processor)


def molmo2() -> Parts:
    named = {"image_token": "<|image|>", "video_token": "<|video|>", "patch": "<im_patch>", "col": "<im_col>"}
    named |= {"start": "<im_start>", "end": "<im_end>", "low": "<low_res_im_start>"}
    named |= {"frame_start": "<frame_start>", "frame_end": "<frame_end>", "low_res": "<im_low>"}
    tokenizer = tokenizer_with(**named)
    image = transformers.Molmo2ImageProcessor(size=SQUARE, patch_size=8, max_crops=2, overlap_margins=[1, 1])
    processor = transformers.Molmo2Processor(
        image,
        transformers.Molmo2VideoProcessor(size=SQUARE, patch_size=8),
        tokenizer,
        template("<|image|>", "<|video|>"),
    )
    vision = {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "image_size": [32, 32], "patch_size": 8}
    adapter = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    text = {**TEXT, "head_dim": 8, "vocab_size": 200, "additional_vocab_size": rows(tokenizer) - 200}
    built = config(
        "molmo2",
        text_config=text,
        vision_config={**vision, "num_position_embeddings": 16},
        adapter_config={**adapter, "vision_feature_layer": [-1], "intermediate_size": 48, "text_hidden_size": 32},
        **ids(
            tokenizer,
            image_start_token_id="<im_start>",
            low_res_image_start_token_id="<low_res_im_start>",
            image_end_token_id="<im_end>",
            image_patch_id="<im_patch>",
            frame_start_token_id="<frame_start>",
            frame_end_token_id="<frame_end>",
        ),
    )
    return Parts(built, processor)


def phi4_multimodal() -> Parts:
    tokenizer = tokenizer_with(image_token="<|endoftext10|>", audio_token="<|endoftext11|>")
    processor = transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(), transformers.Phi4MultimodalFeatureExtractor(), tokenizer
    )
    processor.chat_template = template("<|endoftext10|>")  # the class does not take it as an argument
    # Its processor counts the tokens of 448 x 448 pixels, whatever the configuration says.
    vision = {**TOWER, "image_size": 448, "patch_size": 14, "crop_size": 448}
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}
    built = config(
        "phi4_multimodal",
        **{**TEXT, "vocab_size": rows(tokenizer), "pad_token_id": 0},
        vision_config={**vision, **ids(tokenizer, image_token_id="<|endoftext10|>")},
        audio_config={**audio, **ids(tokenizer, audio_token_id="<|endoftext11|>")},
    )
    return Parts(built, processor)


def text_only(kind: str, **more: Any) -> Parts:
    tokenizer = tokenizer_with(nothing="<|nothing|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Parts(config(kind, **{**TEXT, "vocab_size": rows(tokenizer), "pad_token_id": 0, **more}), tokenizer)


def qwen3() -> Parts:
    return text_only("qwen3", head_dim=8)


def llama() -> Parts:
    """Llama, and SmolLM2, which has its architecture."""
    return text_only("llama")


def gemma() -> Parts:
    parts = text_only("gemma", head_dim=8)
    parts.processor.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + parts.processor.chat_template
    )
    return parts


def gemma3_text() -> Parts:
    return text_only("gemma3_text", **WINDOWS)


def smollm3() -> Parts:
    return text_only("smollm3")
