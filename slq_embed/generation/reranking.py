"""Reranking with the backbone that embeds: a stock CrossEncoder asks it yes or no, without a second copy."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import nn
from transformers import ProcessorMixin

from slq_embed.backbone.families import decoder_of, tokenizer_of
from slq_embed.backbone.lock import lock_of
from slq_embed.encoder import SLQEncoder
from slq_embed.generation.conversation import read_named, require_encoder, speaking_processor, to_features, user_turn
from slq_embed.prefix.features import backbone_inputs
from slq_embed.prefix.passes import token_positions

RERANK_INSTRUCTION = (
    "Query: {query}\nDocument: {document}\nDoes the document match the query? Answer with yes or no only."
)
"""The user turn of a reranker, unless another is passed."""


def build_reranker(
    model: SLQEncoder,
    *,
    instruction: str = RERANK_INSTRUCTION,
    true_token: str = "yes",
    false_token: str = "no",
    processor: ProcessorMixin | None = None,
    **kwargs: Any,
) -> CrossEncoder:
    """Build a reranker on an encoder's own backbone, without a copy of it.

    A score is the log-odds of the next token: the logit of ``true_token`` less that of ``false_token``.
    ``predict(..., activation_fn=torch.nn.Sigmoid())`` makes it a probability. It is the untrained backbone's judgement:
    the queries take no part.

    Args:
        model: The encoder. The reranker runs on its device, and moving the reranker moves nothing.
        instruction: The user turn, with ``{query}`` and ``{document}`` once each. Both may be a text, an image, or a dict
            of both, as :func:`slq_embed.inputs.rows.read_row` takes them.
        true_token: The backbone's answer for a match; one token.
        false_token: Its answer for anything else; one token.
        processor: The backbone's own. Needed if its chat template cannot be loaded: for merged models, and for
            backbones without a name.
        **kwargs: For ``CrossEncoder``: ``prompts`` (system messages), ``activation_fn``, ...

    Returns:
        A :class:`~sentence_transformers.CrossEncoder`, for ``predict`` and ``rank``. It cannot be saved or trained.

    Raises:
        TypeError: If the model is no ``SLQEncoder``.
        ValueError: If the instruction lacks a field, an answer is not one token, or there is no chat template.
    """
    require_encoder(model)
    for name in ("{query}", "{document}"):
        if (count := instruction.count(name)) != 1:
            raise ValueError(f"The instruction holds {name} {count} times, but it must hold it once: {instruction!r}.")
    answers = [_single_token(model.tokenizer, token) for token in (true_token, false_token)]
    if answers[0] == answers[1]:
        raise ValueError(
            f"true_token and false_token are both {true_token!r}, so every score is 0. Pass two different ones."
        )
    kwargs.setdefault("activation_fn", nn.Identity())  # the host's default, a sigmoid, gives sure answers equal scores
    module = SharedCausalLM(model, speaking_processor(model, processor), instruction)
    return CrossEncoder(modules=[module, LogitScore(*answers)], device=str(model.backbone.device), **kwargs)


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"The answer {text!r} is {len(ids)} tokens of this backbone, but one is needed. Pass other answers: "
            "true_token=..., false_token=..., and an instruction that asks for them."
        )
    return int(ids[0])


class SharedCausalLM(InputModule):
    """Reads pairs, and returns the logits of an encoder's backbone for the next token.

    The backbone is no submodule: it is not moved, saved or trained with this module.

    Args:
        model: The encoder.
        processor: From :func:`slq_embed.generation.conversation.speaking_processor`.
        instruction: As for :func:`build_reranker`.
    """

    def __init__(self, model: SLQEncoder, processor: ProcessorMixin, instruction: str) -> None:
        super().__init__()
        self._encoder = (model,)  # a tuple hides it from nn.Module
        self.processor = processor
        self.instruction = instruction

    @property
    def modalities(self) -> list[Any]:
        """What each side of a pair can be."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn pairs into features.

        Args:
            inputs: Pairs of a query and a document.
            prompt: A system message.
            **kwargs: Ignored.

        Raises:
            ValueError: If an input is no pair, or cannot be read. The message names it.
        """
        (model,) = self._encoder
        chats = []
        for pair in inputs:
            name = f"Pair {reprlib.repr(pair)}"  # not its index: the host has sorted the pairs by size
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"{name} is a {type(pair).__name__}, but (query, document) is needed.")
            parts = {
                f"{{{key}}}": read_named(model, value, f"{name}, {key}")
                for key, value in zip(("query", "document"), pair, strict=True)
            }
            pieces: list[Any] = re.split(r"(\{query\}|\{document\})", self.instruction)
            pieces = [parts.get(piece, piece) for piece in pieces]
            chats.append(user_turn(self.processor, pieces, prompt, max_text_chars=model.slq_config.max_text_chars))
        with lock_of(model.backbone):
            return dict(to_features(model, self.processor, chats))

    @torch.no_grad()
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``causal_logits`` ``(batch, 1, vocabulary)``: the logits of the next token."""
        (model,) = self._encoder
        backbone = model.backbone
        # The host does not see the backbone, so it leaves features on the CPU.
        on_device = {
            key: value.to(backbone.device) if isinstance(value, torch.Tensor) else value
            for key, value in features.items()
        }
        with lock_of(model.backbone):
            output = backbone(
                input_ids=on_device["input_ids"],
                attention_mask=on_device["attention_mask"],
                position_ids=token_positions(decoder_of(backbone), on_device),
                use_cache=False,
                logits_to_keep=1,
                **backbone_inputs(on_device),
            )
        features["causal_logits"] = output.logits
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Raise an error: a reranker has no weights of its own."""
        raise RuntimeError("A reranker shares its encoder's backbone: save the encoder, and call build_reranker again.")
