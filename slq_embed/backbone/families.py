"""Model families: what is special about some of them, and what no latent query can work on. No other file knows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from slq_embed.backbone.quantization import is_packed, require_package


@dataclass(frozen=True)
class Family:
    """What is special about a family of backbones.

    Args:
        example: A checkpoint that people use, for error messages.
        resizes_by_area: Whether the image processor keeps the aspect ratio within a budget of pixels, as that of Qwen-VL does, so
            that ``max_pixels`` means something.
        image_kwargs: How its image processor is called unless the user says otherwise.
        package: A package that its code needs and transformers does not require. It is an extra of slq-embed.
        batches_images: Whether its processor reads a batch at once and gives each row pixels by its image tokens. Of
            other families, each row with an image is processed alone.
        query_token_type: Token type of the queries, where its processor gives token types.
        pixels_axis: The axis of ``pixel_values`` along which its processor puts one image after the other.
        patch_indices: Features that number the patches of a row's own images or videos, each with the feature that holds these.
            In a batch, the model counts all of them.
        reads_videos: Whether its code reads videos right where its processor has a video processor.
        reads_ids: Whether images enter only where token ids come in, so that the queries must be ids too.
        casts_pixels: Whether its tower computes with the pixels as they are, and then casts them itself.
        call_kwargs: What the parts of its processor must be asked for, by part, as Sentence Transformers names them.
    """

    example: str = ""
    resizes_by_area: bool = False
    image_kwargs: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    batches_images: bool = False
    query_token_type: int = 0
    pixels_axis: int = 0
    patch_indices: Mapping[str, str] = field(default_factory=dict)
    reads_videos: bool = True
    reads_ids: bool = False
    casts_pixels: bool = False
    call_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family("Qwen/Qwen3-VL-2B-Instruct", resizes_by_area=True, batches_images=True),
    "qwen2_5_vl": Family("Qwen/Qwen2.5-VL-3B-Instruct", resizes_by_area=True, batches_images=True),
    "qwen2_vl": Family("Qwen/Qwen2-VL-2B-Instruct", resizes_by_area=True, batches_images=True),
    # One tile of 448 px (256 visual tokens) an image, as in the paper; the processor's own default cuts up to 12.
    "internvl": Family("OpenGVLab/InternVL3-1B-hf", image_kwargs={"crop_to_patches": False}, batches_images=True),
    "fast_vlm": Family("KamilaMila/FastVLM-0.5B", package="timm", batches_images=True),
}
"""Families by the ``model_type`` of their configuration. The contract tests prove these, so nothing is checked on loading."""

_LIKE_QWEN_VL = Family(resizes_by_area=True, batches_images=True)
QUIRKS: dict[str, Family] = {
    "qwen3_5": _LIKE_QWEN_VL,
    "qwen3_5_moe": _LIKE_QWEN_VL,
    "qwen3_vl_moe": _LIKE_QWEN_VL,
    "qwen4_exp": _LIKE_QWEN_VL,
    "cosmos3_omni": _LIKE_QWEN_VL,
    "qwen2_5_omni_thinker": _LIKE_QWEN_VL,
    "qwen3_omni_moe_thinker": _LIKE_QWEN_VL,
    "paddleocr_vl": _LIKE_QWEN_VL,
    "video_llama_3": _LIKE_QWEN_VL,
    # Token type 0 is a prompt whose tokens see each other, 1 is what follows.
    "paligemma": Family(query_token_type=1),
    "minicpmv4_6": Family(pixels_axis=3, reads_videos=False),
    # Their videos are found by other tokens in embeddings than in token ids (transformers 5.23).
    "glm4v": Family(reads_videos=False),
    "glm4v_moe": Family(reads_videos=False),
    "glm46v": Family(reads_videos=False),
    "glm_ocr": Family(reads_videos=False),
    "glmga": Family(reads_videos=False),
    # Their processors need the times of a video's frames, and one forgets the token types (transformers 5.23).
    "cosmos3_edge": Family(
        call_kwargs={"text": {"return_mm_token_type_ids": True}, "video": {"return_metadata": True}}
    ),
    "muse_glimmer": Family(call_kwargs={"video": {"return_metadata": True}}),
    "muse_spark": Family(call_kwargs={"video": {"return_metadata": True}}),
    # Its processor takes no times of a video's frames, and one video a call (transformers 5.23).
    "nemotron_h_omni": Family(reads_videos=False),
    "minicpmv4_7": Family(pixels_axis=3, reads_videos=False),
    "minicpm_ocr": Family(pixels_axis=3, reads_videos=False),
    "molmo2": Family(
        patch_indices={"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
    ),
    # One tile: its processor cannot read images with different numbers of tiles at once.
    "perception_lm": Family(pixels_axis=1, package="timm", image_kwargs={"vision_input_type": "vanilla"}),
    # Its model counts the pieces of a video for each frame, but its tower averages over frames (transformers 5.23).
    "kimi_k25": Family(reads_videos=False),
    # Without tiles: its processor gives their numbers as lists, and with a tile its model needs these.
    "unlimited_ocr": Family(image_kwargs={"crop_to_patches": False}),
    "gemma3n": Family(package="timm"),
    # It moves pixels from 0..1 to -1..1, which loses digits in half precision.
    "gemma4": Family(casts_pixels=True),
    # Its processor renders conversations with a video by a template of its own, which has no queries (transformers 5.23).
    "smolvlm": Family(package="num2words", reads_videos=False),
    # One tile: its processor pads images to the same number of tiles, so that a row alone has others than in a batch.
    "phi4_multimodal": Family(reads_ids=True, image_kwargs={"dynamic_hd": 1}),
}
"""What is special about other families. Of those, :func:`slq_embed.backbone.check` decides."""

_CROSS_ATTENTION = {"mllama", "flamingo", "idefics"}
_FROM_PADDING = {"minimax_m3_sparse"}
"""Kinds of layers that count blocks of keys from the start of the padding (transformers 5.23)."""
_NEEDS_IMAGES = {"blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"}
_NEEDS_IMAGES |= {"got_ocr2", "pp_chart2table", "shieldgemma2"}
_OTHER_REFUSALS = {
    "evolla": "reads proteins, through cross-attention, outside of the token sequence that queries are appended to",
    "fuyu": "has a processor that places images by itself, and writes tokens of its own after every text with an image",
    "git": "puts an image before all tokens of its sequence, where neither mask nor positions of a batch count it",
    "pi0": "gives actions of a robot, and no states of tokens",
}


def refusal(config: PretrainedConfig) -> str | None:
    """Why latent queries cannot work on a backbone of this architecture, or None if they may."""
    if config.is_encoder_decoder:
        return "is an encoder-decoder, whose decoder does not hold the input in its own sequence"
    if config.model_type in _CROSS_ATTENTION:
        return "sees images through cross-attention, outside of the token sequence that queries are appended to"
    if getattr(config, "canvas_length", None) is not None:
        return "is a diffusion model, which writes into a canvas that no input is a part of"
    if _FROM_PADDING.intersection(getattr(config.get_text_config(), "layer_types", None) or ()):
        return (
            "counts the blocks of its sparse attention from the padding, so an input in a batch sees others than alone"
        )
    if config.model_type in _NEEDS_IMAGES:
        return "reads no text without an image, so it could not encode texts that are searched for, or searched in"
    if (reason := _OTHER_REFUSALS.get(config.model_type)) is not None:
        return reason
    if getattr(config, "thinker_config", None) is not None:
        return "holds a thinker and a talker; only the thinker reads: save it alone (model.thinker.save_pretrained)"
    return None


def family_of(config: PretrainedConfig) -> Family:
    """What is special about the family of a backbone.

    Raises:
        ValueError: If latent queries cannot work on it; the message says why.
    """
    kind = config.model_type
    if (reason := refusal(config)) is not None:
        choices = ", ".join(f"{name} ({row.example})" for name, row in FAMILIES.items())
        raise ValueError(f"The backbone's model_type {kind!r} {reason}. Use one of these families: {choices}.")
    return FAMILIES.get(kind) or QUIRKS.get(kind) or Family()


def load_backbone(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a multimodal LLM whole (with its head, so that it can also answer) from a folder or the hub.

    Args:
        name: Hub name or folder.
        **kwargs: For ``from_pretrained``: ``revision``, ``dtype``, ``device_map``, ``quantization_config``, ...

    Raises:
        ValueError: If latent queries cannot work on the architecture.
        ImportError: If the family or the quantization needs a package that is not installed.
        OSError: If nothing can be loaded from there.
    """
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    package = family_of(config).package
    if package is not None and find_spec(package) is None:
        raise ImportError(
            f"The backbone {name!r} is of the family {config.model_type!r}, which needs the package {package}, and it is "
            f"not installed. Install it: pip install 'slq-embed[{package}]'."
        )
    kwargs.setdefault("dtype", "auto")
    if kwargs.get("quantization_config") is not None:
        require_package(kwargs["quantization_config"])
    model: PreTrainedModel = auto_class(config).from_pretrained(name, **kwargs)
    return model


def load_processor(name: str, **kwargs: Any) -> Any:
    """Load a processor with its chat template; arguments are those of ``AutoProcessor.from_pretrained``."""
    return with_template(AutoProcessor.from_pretrained(name, **kwargs))


def with_template(processor: Any) -> Any:
    """The processor itself, with the chat template of its tokenizer where it has lost its own."""
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = getattr(tokenizer_of(processor), "chat_template", None)
    return processor


def loses_template(processor: Any) -> bool:
    """Whether loading gives the processor no chat template (Phi-4-multimodal), but only its tokenizer has it then."""
    known = inspect.signature(type(processor).__init__).parameters
    return tokenizer_of(processor) is not processor and "chat_template" not in known


def auto_class(config: PretrainedConfig) -> Any:
    """The class that loads a model with its head."""
    choices = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    return next((kind for kind in choices if type(config) in kind._model_mapping), choices[0])


def commit_of(name: str, **hub: Any) -> str | None:
    """The commit of a checkpoint on the hub, or None for a folder.

    Args:
        name: Hub name or folder.
        **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.
    """
    commit: str | None = extract_commit_hash(cached_file(name, "config.json", **hub), None)
    return commit


def decoder_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The part that ends in the last hidden states: the model without its language head, where it is a part."""
    base: PreTrainedModel = backbone.base_model
    return base


def language_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """The layers of the language model, without towers and heads.

    Raises:
        ValueError: If there is no such list.
    """
    text: Any = decoder.get_decoder()
    if not hasattr(text, "layers"):  # Llama 4's has a head of its own
        text = getattr(text, "model", text)
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"A {type(text).__name__} has no list of layers, in which deep queries or a query adapter could act. Train queries "
            "with a projection head."
        )
    return layers


def reads_ids(backbone: PreTrainedModel) -> bool:
    """Whether a backbone must see token ids, because embeddings alone do not tell it all that it uses of a token."""
    decoder = decoder_of(backbone)
    if family_of(backbone.config).reads_ids:
        return True
    if hasattr(decoder.get_decoder(), "reverse_embedding"):  # it looks tokens up in further tables
        return True
    return decoder is backbone or "per_layer_inputs" in inspect.signature(decoder.forward).parameters


def image_token_of(backbone: PreTrainedModel, processor: Any) -> int:
    """Id of the token that stands for a piece of an image; -1 where no image is read."""
    for owner in (backbone.config, processor):
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            if isinstance(number := getattr(owner, name, None), int):
                return number
    return -1


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, which is one itself where only text is read."""
    return getattr(processor, "tokenizer", processor)


def media_settings(processor: Any, kind: str) -> dict[str, Any] | None:
    """The settings of a processor's part for a kind, ``"image"`` or ``"video"``, or None where it has no such part."""
    part = getattr(processor, f"{kind}_processor", None)
    return None if part is None else part.to_dict()


def embedding_table(backbone: PreTrainedModel) -> torch.Tensor:
    """The token embeddings, ``(rows, H)``; rows may be more than the tokenizer has tokens."""
    table = backbone.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"The input embeddings are a {type(table).__name__}, but a plain table is needed. "
            "Give the backbone without adapters."
        )
    if is_packed(table.weight):
        raise ValueError(
            f"The input embeddings are quantized ({type(table.weight).__name__}), but a saved model holds the latent queries as "
            "rows of this table. Quantize linear layers only."
        )
    return table.weight


def embedding_scale(backbone: PreTrainedModel) -> float | nn.Module:
    """What the embedding layer makes of a row of its table: it multiplies it by 1, in Gemma by the square root of ``H``.

    Or it normalises it (Muse Glimmer). Then the norm itself.
    """
    layer, table = backbone.get_input_embeddings(), embedding_table(backbone)
    if type(layer) is nn.Embedding:
        return 1.0
    ids = torch.arange(min(64, len(table)), device=table.device)
    norm = getattr(layer, "embed_norm", None)
    with torch.no_grad():
        rows, given = table[ids].float(), layer(ids).float()
        if isinstance(norm, nn.Module) and torch.equal(norm(table[ids]).float(), given):
            return norm
        scale = float((rows * given).sum() / (rows * rows).sum())
    if not torch.allclose(given, rows * scale, rtol=0.02, atol=1e-3 * float(given.abs().max())):
        raise ValueError(
            f"The input embeddings are a {type(layer).__name__}, which does more than scale rows of a table, so no row of it "
            "can be a latent query. Use another backbone."
        )
    return scale


def usable_rows(backbone: PreTrainedModel) -> int:
    """How many rows of the embedding table a token id reaches; the rest of Gemma 3n's belongs to its towers."""
    rows = len(embedding_table(backbone))
    return min(rows, getattr(getattr(backbone.config, "vision_config", None), "vocab_offset", None) or rows)


def can_grow(backbone: PreTrainedModel) -> bool:
    """Whether rows can be added to the embedding table: no other table goes by token ids, and one number is its length."""
    rows: int = backbone.config.get_text_config().vocab_size
    return not reads_ids(backbone) and rows == len(embedding_table(backbone))


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Tokens beyond which a row changes the others of its batch, or None.

    Beyond it, rotary embeddings of the kinds "dynamic" and "longrope" have other frequencies, for the whole batch.
    """
    text = config.get_text_config()
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings")
    return text.max_position_embeddings if rope.get("rope_type") == "dynamic" else None


def is_placed(backbone: PreTrainedModel) -> bool:
    """Whether a device map decides where the weights are, so that they must not be moved."""
    return getattr(backbone, "hf_device_map", None) is not None


def limit_pixels(processor: Any, backbone: PreTrainedModel, max_pixels: int) -> None:
    """Set the largest image that a processor passes on, in pixels.

    Raises:
        ValueError: If the family has no such limit, or there would be no pixel.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}, but at least 1 is needed.")
    if not family_of(backbone.config).resizes_by_area:
        raise ValueError(
            f"max_pixels={max_pixels} does not apply to {backbone.config.model_type}: it is for Qwen-VL and what is built like it. Set "
            "the size of images with processor_kwargs, for example {'size': {'height': 448, 'width': 448}}."
        )
    size = dict(processor.image_processor.size)
    size["longest_edge"] = max_pixels  # in these families: the largest number of pixels
    size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
    processor.image_processor.size = type(processor.image_processor.size)(**size)
