"""Conversations with a backbone that is to generate: in its own chat template, and with text that is only ever text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import BatchFeature, ProcessorMixin

from slq_embed.backbone.chat_template import as_strings, control_strings, is_slq_template, neutralise, shows_system
from slq_embed.backbone.families import load_processor, tokenizer_of
from slq_embed.encoder import SLQEncoder
from slq_embed.inputs.rows import Row, read_row


def require_encoder(model: object) -> None:
    """Raise a TypeError if the model is no ``SLQEncoder``."""
    if not isinstance(model, SLQEncoder):
        raise TypeError(
            f"The model is a {type(model).__name__}, but an SLQEncoder is needed. Load a saved model with SLQEncoder(folder)."
        )


def speaking_processor(model: SLQEncoder, processor: ProcessorMixin | None = None) -> ProcessorMixin:
    """The processor for conversations with a backbone.

    The encoder's own chat template ends every conversation with query tokens: with it, the backbone cannot answer.

    Args:
        model: The encoder.
        processor: The backbone's processor, used as it is. By default the encoder's processor, which reads images as for
            embedding, with the chat template from where the backbone was loaded.

    Returns:
        The processor.

    Raises:
        ValueError: If there is no such template, or the template is an encoder's: a merged model has no other.
    """
    if processor is None:
        processor = copy.copy(model.processor)
        processor.chat_template = _recorded_template(model.slq_config.backbone, model.slq_config.revision)
    if not processor.chat_template or is_slq_template(processor.chat_template):
        raise ValueError(
            f"The backbone cannot answer with the chat template from {model.slq_config.backbone!r}: the template "
            f"{'ends with query tokens' if processor.chat_template else 'is empty'}. Pass the backbone's own "
            "processor: processor=AutoProcessor.from_pretrained(...)."
        )
    return processor


@lru_cache
def _recorded_template(name: str, revision: str | None) -> Any:
    try:
        return load_processor(name, revision=revision).chat_template
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The backbone's own chat template is needed, but no processor can be loaded from {name!r}. Pass the "
            f"backbone's own processor: processor=AutoProcessor.from_pretrained(...). ({error})"
        ) from error


def read_named(model: SLQEncoder, value: Any, name: str) -> Row:
    """Read and decode one input.

    Args:
        model: The encoder.
        value: The input.
        name: Its name; an error begins with it.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        row = read_row(value)
        model.transformer.reader.require_readable(row)
        if row.videos:
            raise ValueError(
                "There is a video, but answers and reranking take texts and images. Pass some of its frames."
            )
        for picture in row.pictures:
            _ = picture.image  # decodes it, so that a bad image is refused here
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return row


def user_turn(
    processor: ProcessorMixin, pieces: Sequence[Row | str], prompt: str | None = None, *, max_text_chars: int
) -> list[dict[str, Any]]:
    """One user turn, in the transformers chat format.

    Args:
        processor: From :func:`speaking_processor`.
        pieces: Inputs and the words between them, in order. The images of an input precede its text.
        prompt: A system message. Where the chat template knows no system role, it is put before the pieces.
        max_text_chars: Longest text of an input, in characters; the rest is cut.

    Returns:
        The conversation.
    """
    system = bool(prompt) and shows_system(processor)
    if prompt and not system:
        pieces = [f"{prompt}\n\n", *pieces]
    content: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Row):
            content += [{"type": "image", "image": picture.image} for picture in piece.pictures]
        text = piece if isinstance(piece, str) else (piece.text or "")[:max_text_chars]
        if text and content and content[-1]["type"] == "text":
            content[-1]["text"] += text  # joined first, because two pieces together can spell a control token
        elif text:
            content.append({"type": "text", "text": text})
    controls = control_strings(processor)
    for part in content:
        if part["type"] == "text":
            part["text"] = neutralise(part["text"], controls)
    chat = [{"role": "user", "content": content}]
    if prompt and system:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": neutralise(prompt, controls)}]})
    return chat


def to_features(model: SLQEncoder, processor: ProcessorMixin, chats: list[list[dict[str, Any]]]) -> BatchFeature:
    """Turn conversations into the backbone's inputs, up to where its answer begins.

    Args:
        model: The encoder; its image settings are used.
        processor: From :func:`speaking_processor`.
        chats: From :func:`user_turn`.

    Returns:
        ``input_ids`` and ``attention_mask``, both ``(batch, seq)`` and padded on the left, and the processor's tensors
        of the images.
    """
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if tokenizer_of(processor) is processor:
        ids_only = {"padding_side": "left", "return_token_type_ids": False}
        return processor.apply_chat_template(
            list(map(as_strings, chats)), padding=True, tokenizer_kwargs=ids_only, **settings
        )
    return processor.apply_chat_template(
        chats,
        processor_kwargs={
            "text_kwargs": {"padding": True, "padding_side": "left"},
            "images_kwargs": model.slq_config.image_kwargs,
            "common_kwargs": {"return_tensors": "pt"},
        },
        **settings,
    )
