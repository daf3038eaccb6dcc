"""Rerank with the backbone that embeds: a stock CrossEncoder that asks it yes or no, without a second copy."""

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

from slq_embed.backbone.families import decoder_of
from slq_embed.backbone.lock import lock_of
from slq_embed.encoder import SLQEncoder
from slq_embed.generation.conversation import read_named, speaking_processor, to_features, user_turn
from slq_embed.prefix.passes import backbone_inputs, token_positions

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
    """A reranker on an encoder's own backbone, as it is in memory.

    A score is the log-odds of the next token: the logit of ``true_token`` less that of ``false_token``;
    ``predict(..., activation_fn=torch.nn.Sigmoid())`` makes it a probability. It is as good as the backbone's
    judgement: nothing is trained here, and nothing of the queries takes part.

    Args:
        model: The encoder. Its device is the reranker's: moving the reranker moves nothing.
        instruction: The user turn, with ``{query}`` and ``{document}`` where those belong. Each may be a text, an image,
            or an image with a text, as :func:`slq_embed.inputs.rows.read_row` takes them.
        true_token: What the backbone says of a match; one token.
        false_token: What it says otherwise; one token.
        processor: The backbone's own. Needed where its chat template cannot be found: for merged models, and for
            backbones without a name.
        **kwargs: For ``CrossEncoder``: ``prompts`` (system messages), ``activation_fn``, ...

    Returns:
        A :class:`~sentence_transformers.CrossEncoder`, for ``predict`` and ``rank``. It cannot be saved or trained.

    Raises:
        ValueError: If the instruction lacks a place, an answer is not one token, or there is no chat template.
    """
    for place in ("{query}", "{document}"):
        if instruction.count(place) != 1:
            raise ValueError(f"The instruction is {instruction!r}, but it must hold {place} once.")
    answers = [_single_token(model.tokenizer, token) for token in (true_token, false_token)]
    if answers[0] == answers[1]:
        raise ValueError(f"true_token and false_token are both {true_token!r}, so every score would be 0.")
    kwargs.setdefault("activation_fn", nn.Identity())  # the host's default, a sigmoid, makes ties of sure answers
    module = SharedCausalLM(model, speaking_processor(model, processor), instruction)
    return CrossEncoder(modules=[module, LogitScore(*answers)], device=str(model.backbone.device), **kwargs)


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"The answer {text!r} is {len(ids)} tokens of this backbone, but one is needed. "
            "Give others: true_token=..., false_token=..., and an instruction that asks for them."
        )
    return int(ids[0])


class SharedCausalLM(InputModule):
    """Reads pairs, and returns an encoder's backbone's logits for the next token.

    The backbone is no submodule, so it is neither moved nor saved nor trained from here.

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
        """What a pair can hold."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn pairs into features.

        Args:
            inputs: Pairs of a query and a document.
            prompt: A system message.
            **kwargs: Ignored.

        Raises:
            ValueError: If an input is no pair, or cannot be read; the message names it.
        """
        (model,) = self._encoder
        chats = []
        for pair in inputs:
            name = f"Pair {reprlib.repr(pair)}"  # not its place: the host sorts pairs by size before they come here
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"{name} is a {type(pair).__name__}, but (query, document) is needed.")
            parts = {
                f"{{{key}}}": read_named(value, f"{name}, {key}")
                for key, value in zip(("query", "document"), pair, strict=True)
            }
            pieces: list[Any] = re.split(r"(\{query\}|\{document\})", self.instruction)
            pieces = [parts.get(piece, piece) for piece in pieces]
            chats.append(user_turn(self.processor, pieces, prompt, max_text_chars=model.slq_config.max_text_chars))
        with lock_of(model.backbone):
            return dict(to_features(model, self.processor, chats))

    @torch.no_grad()
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``causal_logits``, ``(batch, 1, vocabulary)``, of the token after the last."""
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
        """Refuse: there is nothing here to save."""
        raise RuntimeError("A reranker shares its encoder's backbone: save the encoder, and call build_reranker again.")
