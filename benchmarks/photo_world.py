"""Photos and emoji, and a small real multimodal LLM: the second world of `quality.py` and `ablations.py`.

The backbone is what `examples/photo_mllm.py` made. The data are two folders with `captions.jsonl`: `flickr8k` (photos with
five captions, splits `train` and `val`) and `noto_emoji` (pictures with a name and keywords). They are read from SLQ_DATA,
else from ../shared/data. Neither they nor weights trained on them are part of the project.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from worlds import Chat, Knowledge, Split, ask

from slq_embed.data import RetrievalSet
from slq_embed.inputs import read_image

BACKBONE = os.environ.get("SLQ_PHOTO_MLLM", "output/photo-mllm/model")
DATA = Path(os.environ.get("SLQ_DATA", Path(__file__).parents[2] / "shared/data"))
DESCRIBE = "Describe the photo in one sentence."
EMOJI_SHARE = 4  # one pair of four is an emoji with its name
KEYWORDS = 3  # of an emoji, joined to a query
WINDOW = 256  # tokens of plain text that are scored at once
FACTS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the largest planet of the solar system?", "Jupiter"),
    ("Which planet is known as the red planet?", "Mars"),
    ("What is the closest star to the Earth?", "Sun"),
    ("What gas do plants take from the air?", "carbon dioxide"),
    ("What is H2O called in everyday language?", "water"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What is the freezing point of water in degrees Celsius?", "0"),
    ("How many legs does a spider have?", "eight"),
    ("How many days are in a week?", "seven"),
    ("How many months are in a year?", "12"),
    ("What is two plus two?", "4"),
    ("What is the opposite of hot?", "cold"),
    ("Which animal barks?", "dog"),
    ("Which animal says meow?", "cat"),
    ("What do bees make?", "honey"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What colour is grass?", "green"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("What is the largest ocean?", "Pacific"),
    ("What is the highest mountain of the world?", "Everest"),
    ("On which continent is Brazil?", "South America"),
    ("On which continent is Kenya?", "Africa"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("What is frozen water called?", "ice"),
    ("Which organ pumps blood?", "heart"),
    ("What do we use to see?", "eyes"),
    ("Which season comes after winter?", "spring"),
    ("What is the currency of Japan?", "yen"),
)


def words(text: str) -> set[str]:
    """The words of a text; a singular and its plural count as one."""
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.lower())}


class PhotoWorld:
    """Photos by their captions, and emoji by keywords that share no word with their names.

    Args:
        photos: Photos of the test split to retrieve, at most: of one half of those that were held out. The validation split has
            half as many of the other half.
        emoji: Emoji of the test split to retrieve, and half as many in the validation split. Training draws from the names of all, so
            it sees some of these, and not the others.
        captions: Captions a photo in the test split. In the validation split it is one.
        asked: Photos to describe.
        tokens: Tokens of plain text to score.
    """

    kinds = ("photos", "knowledge")
    recall_at = 10

    def __init__(
        self, photos: int = 500, emoji: int = 250, captions: int = 2, asked: int = 20, tokens: int = 2048
    ) -> None:
        self.photos, self.emoji, self.captions, self.asked, self.tokens = photos, emoji, captions, asked, tokens

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of the data by split: `train`, `val` and `emoji`."""
        rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "emoji": []}
        for name in ("flickr8k", "noto_emoji"):
            file = DATA / name / "captions.jsonl"
            if not file.is_file():
                raise SystemExit(f"There is no {file}. Set SLQ_DATA to a folder that holds flickr8k and noto_emoji.")
            for line in file.read_text().splitlines():
                row = json.loads(line)
                row["path"] = file.parent / row["image"]
                if (kind := row.get("split") or row["kind"]) in rows:
                    rows[kind].append(row)
        for name in rows:
            Random(0).shuffle(rows[name])
        return rows

    def load(self) -> tuple[Any, Any]:
        """The backbone and its processor."""
        if not Path(BACKBONE, "config.json").is_file():
            raise SystemExit(
                f"There is no model in {BACKBONE}. Make it with examples/photo_mllm.py; set SLQ_PHOTO_MLLM."
            )
        return AutoModelForImageTextToText.from_pretrained(BACKBONE), AutoProcessor.from_pretrained(BACKBONE)

    def batches(self, seed: int, steps: int, size: int, siblings: int = 1) -> Iterator[tuple[list[Any], list[str]]]:
        """Images and texts of each training step: photos with some of their captions, emoji with their names."""
        rng = Random(seed)
        photos = rng.sample(self.rows["train"], len(self.rows["train"]))
        emoji = rng.sample(self.rows["emoji"], len(self.rows["emoji"]))
        few = size // EMOJI_SHARE // siblings
        many = size // siblings - few
        for step in range(steps):
            part = [photos[(step * many + index) % len(photos)] for index in range(many)]
            named = [emoji[(step * few + index) % len(emoji)] for index in range(few)]
            texts = [caption for row in part for caption in rng.sample(row["captions"], siblings)]
            images = [read_image(row["path"]) for row in [*part, *named] for _ in range(siblings)]
            yield images, texts + [row["name"] for row in named for _ in range(siblings)]

    def retrieval(self, split: Split) -> dict[str, RetrievalSet]:
        """Captions of photos that were held out, and keywords of emoji."""
        half = len(self.rows["val"]) // 2
        start, count, share = (0, 1, 2) if split == "validation" else (half, self.captions, 1)
        photos = self.rows["val"][start : start + min(half, self.photos) // share]
        texts = [(caption, index) for index, row in enumerate(photos) for caption in row["captions"][:count]]
        emoji = []
        for row in self.rows["emoji"][0 if split == "validation" else 1 :: 2]:
            unknown = [keyword for keyword in row["keywords"] if words(keyword).isdisjoint(words(row["name"]))]
            if unknown:
                emoji.append((row["path"], ", ".join(unknown[:KEYWORDS])))
        emoji = emoji[: self.emoji // share]
        return {
            "photos": RetrievalSet([read_image(row["path"]) for row in photos], *map(list, zip(*texts, strict=True))),
            "knowledge": RetrievalSet(
                [read_image(path) for path, _ in emoji], [query for _, query in emoji], list(range(len(emoji)))
            ),
        }

    def knowledge(self, model: Any, processor: Any) -> Knowledge:
        """Answers to short factual questions, descriptions of photos, and the perplexity of plain text."""
        photos = self.rows["val"][-self.asked :]
        chats: list[Chat] = [(read_image(row["path"]), DESCRIBE, None) for row in photos]
        answers = ask(model, processor, [*chats, *((None, *fact) for fact in FACTS)])
        return replace(answers, perplexity=self.perplexity(model, processor))

    @torch.inference_mode()
    def perplexity(self, model: Any, processor: Any) -> float:
        """Of English prose that every Python carries: the help texts of the language."""
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in ("types", "execmodel", "objects", "exceptions", "import"))
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0, : self.tokens]
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(model.device)
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
        return math.exp(sum(losses) / len(losses))
