"""What `quality.py` trains and measures on: a backbone, training pairs, held-out queries, and what the backbone knows."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import pretrained
from slq_embed.data import RetrievalSet
from slq_embed.toy import DESCRIBE, captions, facts, implicit, questions, render, sample_scenes

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_slq_tiny import near_twins

Split = Literal["validation", "test"]
BATCH = 50


@dataclass(frozen=True)
class Knowledge:
    """What a language model answers.

    Args:
        answers: Its answers.
        right: Share of the questions with a right answer that it answers right.
        bits: A digest of the logits: equal digests are equal bits.
        perplexity: Of plain text, where the world has some.
    """

    answers: tuple[str, ...]
    right: float
    bits: str
    perplexity: float | None = None


class ToyWorld:
    """Coloured shapes, and the embedded backbone that knows them. Trained on literal captions only.

    Args:
        held_out: Scenes to retrieve.
        asked: Scenes to describe and to ask about.
    """

    kinds = ("literal", "implicit")
    recall_at = 1

    def __init__(self, held_out: int = 500, asked: int = 100) -> None:
        self.held_out, self.asked = held_out, asked

    def load(self) -> tuple[Any, Any]:
        """The backbone and its processor."""
        folder = pretrained("mllm-tiny")
        return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

    def batches(self, seed: int, steps: int, size: int, siblings: int = 1) -> Iterator[tuple[list[Any], list[str]]]:
        """Images and texts of each training step: scenes that are hard to tell apart, so many pairs of each scene."""
        rng = Random(seed)
        scenes = near_twins(steps, size, rng)
        for start in range(0, len(scenes), size):
            part = [scene for scene in scenes[start : start + size // siblings] for _ in range(siblings)]
            images = [render(scene, 100_000 + start + number) for number, scene in enumerate(part)]
            yield images, [captions(scene)[rng.randrange(5)] for scene in part]

    def retrieval(self, split: Split) -> dict[str, RetrievalSet]:
        """Literal captions, and descriptions that share no content word with them."""
        scenes = sample_scenes(self.held_out, split)
        images, owners = [render(scene, 7) for scene in scenes], list(range(self.held_out))
        texts = {"literal": [captions(scene)[0] for scene in scenes], "implicit": [implicit(scene) for scene in scenes]}
        return {kind: RetrievalSet(images, lines, owners) for kind, lines in texts.items()}

    def knowledge(self, model: Any, processor: Any) -> Knowledge:
        """Descriptions of scenes, answers to questions on them, and answers without an image."""
        rng = Random(0)
        chats: list[Chat] = []
        for scene in sample_scenes(self.asked, "test"):
            image = render(scene, 7)
            question, answer = rng.choice(questions(scene, rng))
            chats += [(image, DESCRIBE[0], captions(scene)[0]), (image, question, answer)]
        return ask(model, processor, [*chats, *((None, *fact) for fact in facts())])


Chat = tuple[Any, str, str | None]
"""An image or None, a question, and the right answer, if one is right."""


@torch.inference_mode()
def ask(model: Any, processor: Any, chats: list[Chat]) -> Knowledge:
    """Ask a model, greedily. An answer is right if it holds the words of the right one, one after the other.

    Args:
        model: A multimodal LLM with its head.
        processor: Its processor.
        chats: What to ask.
    """
    processor.tokenizer.padding_side = "left"
    digest, answers = hashlib.sha256(), dict.fromkeys(range(len(chats)), "")
    for with_image in (True, False):
        chosen = [index for index, (image, _, _) in enumerate(chats) if (image is not None) == with_image]
        for start in range(0, len(chosen), BATCH):
            part = chosen[start : start + BATCH]
            messages = []
            for image, question, _ in (chats[index] for index in part):
                content = [{"type": "image", "image": image}] if with_image else []
                messages.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
            options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            output = model.generate(**inputs.to(model.device), max_new_tokens=24, **options)
            digest.update(torch.stack(output.logits).float().cpu().numpy().tobytes())
            ids = output.sequences[:, inputs["input_ids"].shape[1] :]
            for index, text in zip(part, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                answers[index] = text.strip()
    rated = [
        bool(re.search(rf"\b{re.escape(right)}\b", answers[index], re.IGNORECASE))
        for index, (_, _, right) in enumerate(chats)
        if right is not None
    ]
    return Knowledge(tuple(answers.values()), sum(rated) / len(rated), digest.hexdigest())
