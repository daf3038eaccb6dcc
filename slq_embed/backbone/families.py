"""Model families: a row for each, and one clear error for everything else. No other file knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash


@dataclass(frozen=True)
class Family:
    """What is special about a family of backbones.

    Args:
        example: A checkpoint that people use, for error messages.
        resizes_by_area: Whether the image processor keeps the aspect ratio within a budget of pixels, so that
            ``max_pixels`` means something.
        image_kwargs: How its image processor is called unless the user says otherwise.
        package: A package that its code needs and transformers does not require. It is an extra of slq-embed.
    """

    example: str
    resizes_by_area: bool = False
    image_kwargs: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None


FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family("Qwen/Qwen3-VL-2B-Instruct", resizes_by_area=True),
    "qwen2_5_vl": Family("Qwen/Qwen2.5-VL-3B-Instruct", resizes_by_area=True),
    "qwen2_vl": Family("Qwen/Qwen2-VL-2B-Instruct", resizes_by_area=True),
    # One tile of 448 px (256 visual tokens) an image, as in the paper; the processor's own default cuts up to 12.
    "internvl": Family("OpenGVLab/InternVL3-1B-hf", image_kwargs={"crop_to_patches": False}),
    "fast_vlm": Family("KamilaMila/FastVLM-0.5B", package="timm"),
}
"""Families by the ``model_type`` of their configuration. A row stands here when the contract tests pass on it."""

_CROSS_ATTENTION = {"mllama", "flamingo", "idefics"}


def family_of(config: PretrainedConfig) -> Family:
    """Look up the family of a backbone.

    Raises:
        ValueError: If latent queries cannot work on it, or it is not in the table; the message says which.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    choices = ", ".join(f"{name} ({row.example})" for name, row in FAMILIES.items())
    if config.is_encoder_decoder:
        reason = "is an encoder-decoder, whose decoder does not hold the input in its own sequence"
    elif kind in _CROSS_ATTENTION:
        reason = "sees images through cross-attention, outside of the token sequence that queries are appended to"
    elif getattr(config, "vision_config", None) is None:
        reason = "takes no images"
    else:
        reason = "is not in the table of tested families"
    raise ValueError(f"The backbone's model_type {kind!r} {reason}. Use one of these families: {choices}.")


def load_backbone(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a multimodal LLM whole (with its head, so that it can also answer) from a folder or the hub.

    Args:
        name: Hub name or folder.
        **kwargs: For ``from_pretrained``: ``revision``, ``dtype``, ``device_map``, ``quantization_config``, ...

    Raises:
        ValueError: If the family is not supported.
        ImportError: If the family needs a package that is not installed.
        OSError: If nothing can be loaded from there.
    """
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    package = family_of(config).package
    if package is not None and find_spec(package) is None:
        raise ImportError(
            f"The backbone {name!r} is of the family {config.model_type!r}, whose vision tower is built by the package "
            f"{package}, which is not installed. Install it: pip install 'slq-embed[{package}]'."
        )
    kwargs.setdefault("dtype", "auto")
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(name, **kwargs)
    return model


def commit_of(name: str, **hub: Any) -> str | None:
    """The commit of a checkpoint on the hub, or None for a folder.

    Args:
        name: Hub name or folder.
        **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.
    """
    commit: str | None = extract_commit_hash(cached_file(name, "config.json", **hub), None)
    return commit


def decoder_of(backbone: PreTrainedModel) -> PreTrainedModel:
    """The part that ends in the last hidden states: the model without its language head."""
    base: PreTrainedModel = backbone.base_model
    return base


def text_config(backbone: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the language model."""
    return backbone.config.get_text_config()


def embedding_table(backbone: PreTrainedModel) -> torch.Tensor:
    """The token embeddings, ``(rows, H)``; rows may be more than the tokenizer has tokens."""
    table = backbone.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"The input embeddings are a {type(table).__name__}, but a plain table is needed. "
            "Give the backbone without adapters."
        )
    return table.weight


def is_placed(backbone: PreTrainedModel) -> bool:
    """Whether a device map or a quantizer decides where the weights are, so that they must not be moved."""
    return getattr(backbone, "hf_device_map", None) is not None or bool(getattr(backbone, "is_quantized", False))


def limit_pixels(processor: Any, backbone: PreTrainedModel, max_pixels: int) -> None:
    """Set the largest image that a processor passes on, in pixels.

    Raises:
        ValueError: If the family resizes every image to one size.
    """
    if not family_of(backbone.config).resizes_by_area:
        raise ValueError(
            f"max_pixels={max_pixels} does not apply to {backbone.config.model_type}, which resizes every image to one "
            "size. Set that with processor_kwargs, for example {'size': {'height': 448, 'width': 448}}."
        )
    size = dict(processor.image_processor.size)
    size["longest_edge"] = max_pixels  # in these families: the largest number of pixels
    size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
    processor.image_processor.size = type(processor.image_processor.size)(**size)
