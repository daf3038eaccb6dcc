"""What the shared backbone is compared with: the same checkpoint, loaded by transformers alone, and pairs by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import SLQEncoder
from slq_embed.generation import build_reranker

YES, NO = "a", "e"  # single tokens of the tiny checkpoints, whose vocabulary has no "yes"


def load(folder: Path | str, **options: Any) -> SLQEncoder:
    return SLQEncoder.from_backbone(folder, num_queries=4, seed=0, device="cpu", **options)


def rerankable(model: SLQEncoder, **options: Any) -> CrossEncoder:
    return build_reranker(model, true_token=YES, false_token=NO, **options)


class Untouched:
    """The checkpoint as transformers loads it, which nothing of this package has seen."""

    def __init__(self, folder: Path | str) -> None:
        # Frozen, as an encoder's backbone is: where a bias may need a gradient, PyTorch rounds some layers otherwise.
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(folder)
        kind = self.model.config.model_type
        self.images = {"crop_to_patches": False} if kind == "internvl" else {}

    def read(self, content: list[Any], system: str | None = None) -> dict[str, torch.Tensor]:
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in content
        ]
        chat: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if system:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return self.processor.apply_chat_template(
            [chat],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"images_kwargs": self.images},
        )

    @torch.no_grad()
    def log_odds(self, content: list[Any], system: str | None = None) -> float:
        logits = self.model(**self.read(content, system)).logits[0, -1]
        yes, no = self.processor.tokenizer.convert_tokens_to_ids([YES, NO])
        return float(logits[yes] - logits[no])

    def said(self, content: list[Any]) -> str:
        inputs = self.read(content)
        ids = self.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def every_pair(images: list[Image.Image], folder: Path) -> list[tuple[Any, Any]]:
    """Every kind of pair."""
    images[2].save(folder / "a.png")
    return [
        ("a red circle", "two green stars and a heart"),
        ("a red circle", images[0]),
        (images[1], "a much longer text about red circles, blue squares and everything else that there is"),
        ({"text": "now in blue", "image": images[0]}, images[1]),
        ("x", {"image": images[3], "text": "larger"}),
        ("a red circle", folder / "a.png"),
    ]


def spelled_out(pair: tuple[Any, Any]) -> list[Any]:
    """The user turn of a pair, written by hand."""
    parts: list[Any] = []
    for value in pair:
        value = value if isinstance(value, dict) else {"text" if isinstance(value, str) else "image": value}
        image = value.get("image")
        image = Image.open(image) if isinstance(image, Path) else image
        parts.append([part for part in (image, value.get("text")) if part is not None])
    question = "\nDoes the document match the query? Answer with yes or no only."
    joined: list[Any] = []
    for part in ["Query: ", *parts[0], "\nDocument: ", *parts[1], question]:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
