"""How a backbone is spoken to when it is to say something: its own chat template, and text that is only ever text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from slq_embed.backbone.chat_template import control_strings, is_slq_template, neutralise
from slq_embed.encoder import SLQEncoder
from slq_embed.inputs.rows import Row, read_row


def speaking_processor(model: SLQEncoder, processor: ProcessorMixin | None = None) -> ProcessorMixin:
    """The processor with which a backbone is spoken to.

    An encoder's own ends every conversation with its query tokens, so it cannot serve here.

    Args:
        model: The encoder.
        processor: The backbone's; used as it is. Without one: the encoder's, which reads images as for embedding,
            with the chat template that stands where the backbone was loaded from.

    Raises:
        ValueError: If there is no such template, or it is an encoder's: a merged model holds no other.
    """
    if processor is None:
        processor = copy.copy(model.processor)
        processor.chat_template = _recorded_template(model.slq_config.backbone, model.slq_config.revision)
    if not processor.chat_template or is_slq_template(processor.chat_template):
        raise ValueError(
            f"The chat template from {model.slq_config.backbone!r} does not let the backbone speak: it "
            f"{'ends with query tokens' if processor.chat_template else 'is empty'}. Pass the backbone's own "
            "processor: processor=AutoProcessor.from_pretrained(...)."
        )
    return processor


@lru_cache
def _recorded_template(name: str, revision: str | None) -> Any:
    try:
        return AutoProcessor.from_pretrained(name, revision=revision).chat_template
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The backbone's own chat template is needed, but no processor can be loaded from {name!r}. Pass one: "
            f"processor=AutoProcessor.from_pretrained(...). ({error})"
        ) from error


def read_named(value: Any, name: str) -> Row:
    """Read and decode one input; an error begins with its name.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        row = read_row(value)
        _ = row.image
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return row


def user_turn(
    processor: ProcessorMixin, pieces: Sequence[Row | str], prompt: str | None = None, *, max_text_chars: int
) -> list[dict[str, Any]]:
    """One user turn, in the transformers chat format.

    Args:
        processor: From :func:`speaking_processor`.
        pieces: Inputs, of which an image goes before its text, and words around them, in order.
        prompt: A system message.
        max_text_chars: Longest text of an input, in characters; the rest is cut.
    """
    content: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Row) and piece.source is not None:
            content.append({"type": "image", "image": piece.image})
        text = piece if isinstance(piece, str) else (piece.text or "")[:max_text_chars]
        if text and content and content[-1]["type"] == "text":
            content[-1]["text"] += text  # joined first: two harmless pieces can spell a control token together
        elif text:
            content.append({"type": "text", "text": text})
    controls = control_strings(processor)
    for part in content:
        if part["type"] == "text":
            part["text"] = neutralise(part["text"], controls)
    chat = [{"role": "user", "content": content}]
    if prompt:
        system = {"type": "text", "text": neutralise(prompt, controls)}
        chat.insert(0, {"role": "system", "content": [system]})
    return chat


def to_features(model: SLQEncoder, processor: ProcessorMixin, chats: list[list[dict[str, Any]]]) -> BatchFeature:
    """Left-padded features of conversations in which the backbone is to speak next.

    Args:
        model: The encoder, whose image settings are used.
        processor: From :func:`speaking_processor`.
        chats: From :func:`user_turn`.
    """
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={
            "text_kwargs": {"padding": True, "padding_side": "left"},
            "images_kwargs": model.slq_config.image_kwargs,
            "common_kwargs": {"return_tensors": "pt"},
        },
    )
