"""Answers to a question on retrieved images and texts, by the backbone that embeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from slq_embed.backbone.families import tokenizer_of
from slq_embed.backbone.lock import lock_of
from slq_embed.encoder import SLQEncoder
from slq_embed.generation.conversation import read_named, require_encoder, speaking_processor, to_features, user_turn
from slq_embed.inputs.rows import Row


def answer(
    model: SLQEncoder,
    question: str,
    retrieved: Sequence[Any] = (),
    *,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    processor: ProcessorMixin | None = None,
    **generate_kwargs: Any,
) -> str:
    """Answer a question on retrieved images and texts with an encoder's backbone; from any thread.

    Args:
        model: The encoder. Its queries take no part.
        question: The question. It follows the retrieved inputs in one user turn.
        retrieved: One text, image, or dict of both, or a list, most relevant first; see
            :func:`slq_embed.inputs.rows.read_row`. Texts are cut as for embedding, the question is not.
        prompt: A system message. A chat template without a system role gets it before the user turn's text.
        max_new_tokens: Longest answer, in tokens.
        processor: The backbone's own; as for :func:`slq_embed.generation.build_reranker`.
        **generate_kwargs: For ``generate``, such as ``do_sample=False``; by default the backbone's generation
            configuration.

    Returns:
        The answer, without special tokens and surrounding white space.

    Raises:
        TypeError: If the model is no ``SLQEncoder``.
        ValueError: If a retrieved input cannot be read, the question is no str, or there is no chat template.
    """
    require_encoder(model)
    if not isinstance(question, str):
        raise ValueError(f"The question is a {type(question).__name__}, but a str is needed.")
    inputs = [retrieved] if model.is_singular_input(retrieved) else list(retrieved)
    pieces: list[Row | str] = []
    for index, value in enumerate(inputs):
        row = read_named(model, value, f"Retrieved {index} of {len(inputs)}")
        pieces += [row, "\n"] if row.text is not None else [row]
    processor = speaking_processor(model, processor)
    chat = user_turn(processor, [*pieces, question], prompt, max_text_chars=model.slq_config.max_text_chars)
    with lock_of(model.backbone):
        features = to_features(model, processor, [chat]).to(model.backbone.device)
        tokens = model.backbone.generate(**features, max_new_tokens=max_new_tokens, **generate_kwargs)
        text: str = tokenizer_of(processor).decode(
            tokens[0, features["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return text.strip()
