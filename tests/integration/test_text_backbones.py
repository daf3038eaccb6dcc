"""Reranking and answering with a language model: its chat template takes strings, and may know no system role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slq_embed.generation import answer
from tests.families import FAMILIES
from tests.families.building import write
from tests.untouched import NO, YES, load, rerankable

PAIRS = [
    ("a red circle", "two green stars"),
    ("x", "a much longer text about red circles, blue squares and all the rest"),
]
SYSTEM = {
    "llama": lambda text: [{"role": "system", "content": "be strict"}, {"role": "user", "content": text}],
    "gemma": lambda text: [
        {"role": "user", "content": f"be strict\n\n{text}"}
    ],  # its template refuses a system message
}


class Untouched:
    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(self, chat: list[dict[str, str]]) -> torch.Tensor:
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def log_odds(self, chat: list[dict[str, str]]) -> float:
        yes, no = self.tokenizer.convert_tokens_to_ids([YES, NO])
        logits = self.model(self.read(chat)).logits[0, -1]
        return float(logits[yes] - logits[no])

    def said(self, chat: list[dict[str, str]]) -> str:
        ids = self.read(chat)
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(params=SYSTEM)
def parts(request: Any, tmp_path: Path) -> Any:
    folder = write(tmp_path, FAMILIES[request.param][1]())
    return Untouched(folder), load(folder), SYSTEM[request.param]


def test_scores_are_the_log_odds_of_the_untouched_model(parts):
    """In a batch of pairs of different lengths, too."""
    untouched, model, with_system = parts
    turns = [
        f"Query: {query}\nDocument: {document}\nDoes the document match the query? Answer with yes or no only."
        for query, document in PAIRS
    ]
    reranker = rerankable(model)
    plain = [untouched.log_odds([{"role": "user", "content": turn}]) for turn in turns]
    assert reranker.predict(PAIRS) == pytest.approx(plain, abs=1e-5)
    prompted = [untouched.log_odds(with_system(turn)) for turn in turns]
    assert reranker.predict(PAIRS, prompt="be strict") == pytest.approx(prompted, abs=1e-5)
    assert abs(plain[0] - prompted[0]) > 1e-3


def test_answers_are_those_of_the_untouched_model(parts):
    untouched, model, with_system = parts
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    chat = [{"role": "user", "content": "a heart\na star\nwhat is it?"}]
    assert answer(model, "what is it?", ["a heart", "a star"], **options) == untouched.said(chat)
    assert answer(model, "why?", prompt="be strict", **options) == untouched.said(with_system("why?"))


def test_images_are_refused(parts, images):
    kind = parts[1].backbone.config.model_type
    with pytest.raises(ValueError, match=f"Retrieved 0 of 1: There is an image, but a {kind} reads texts only"):
        answer(parts[1], "what is it?", images[0])
    with pytest.raises(ValueError, match=f"document: There is an image, but a {kind} reads texts only"):
        rerankable(parts[1]).predict(("a", images[0]))
