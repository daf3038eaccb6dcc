"""A reranker on the backbone that embeds: the untouched model's log-odds for every kind of pair, in the host's class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoProcessor

from slq_embed.generation import RERANK_INSTRUCTION, answer, build_reranker
from slq_embed.prefix.features import lay_out
from tests.checkpoints import FAMILIES
from tests.untouched import Untouched, every_pair, load, rerankable, spelled_out


@pytest.fixture
def pairs(images, tmp_path) -> list[tuple[Any, Any]]:
    return every_pair(images, tmp_path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_are_the_log_odds_of_the_untouched_model(checkpoint, pairs, kind):
    """For every kind of pair, whatever else is in the batch."""
    untouched = Untouched(checkpoint(kind))
    reranker = rerankable(load(checkpoint(kind)))
    expected = np.array([untouched.log_odds(spelled_out(pair)) for pair in pairs])
    together = reranker.predict(pairs)
    assert np.ptp(expected) > 0.1, "the checkpoint must tell pairs apart"
    assert np.abs(together - expected).max() < 1e-5
    assert np.abs(np.array([reranker.predict(pair) for pair in pairs]) - expected).max() < 1e-5
    assert np.abs(reranker.predict(pairs[::-1], batch_size=4)[::-1] - expected).max() < 1e-5
    chances = reranker.predict(pairs, activation_fn=torch.nn.Sigmoid())
    assert np.abs(chances - 1 / (1 + np.exp(-expected))).max() < 1e-5
    prompted = untouched.log_odds(spelled_out(pairs[1]), "be strict")
    assert reranker.predict(pairs[1], prompt="be strict") == pytest.approx(prompted, abs=1e-5)
    assert abs(prompted - expected[1]) > 1e-3


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("qwen3_vl", "internvl") else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES],
)
def test_a_long_neighbour_moves_no_score(checkpoint, kind):
    """Counting its padding as positions would, by 2e-5 to 4e-4."""
    reranker = rerankable(load(checkpoint(kind)))
    short, long = ("a red circle", "two green stars"), ("x y " * 1500, "b")
    assert reranker.predict([short, long])[0] == pytest.approx(reranker.predict(short), abs=1e-5)


def test_documents_are_ranked(encoder, images):
    reranker = rerankable(encoder)
    documents = [*images, "two green stars", {"text": "now in blue", "image": images[0]}]
    scores = reranker.predict([("a red circle", document) for document in documents])
    ranked = reranker.rank("a red circle", documents, return_documents=True)
    assert [row["corpus_id"] for row in ranked] == np.argsort(-scores).tolist()
    assert [row["score"] for row in ranked] == pytest.approx(np.sort(scores)[::-1], abs=1e-5)
    assert all(row["text"] is documents[row["corpus_id"]] for row in ranked)
    assert len(reranker.rank(images[0], ["a", "b", "c"], top_k=2)) == 2
    assert reranker.predict([]).shape == (0,)


def test_a_reranker_is_the_hosts_class_and_runs_the_head_once_a_pair(encoder, pairs, tmp_path):
    reranker = rerankable(encoder)
    assert type(reranker) is CrossEncoder
    rows = encoder.backbone.get_input_embeddings().weight.shape[0]
    assert reranker[0](reranker.preprocess(pairs))["causal_logits"].shape == (len(pairs), 1, rows)
    with pytest.raises(RuntimeError, match="save the encoder, and call build_reranker again"):
        reranker.save_pretrained(str(tmp_path))


def test_images_are_read_as_for_embedding_and_texts_are_cut_alike(checkpoint, images):
    model = load(checkpoint(), max_pixels=16 * 16, max_text_chars=10)
    reranker = rerankable(model)
    read = reranker.preprocess([("x" * 50, images[1])])
    assert torch.equal(read["pixel_values"], lay_out(model.preprocess([images[1]]))["pixel_values"])
    text = reranker.tokenizer.decode(read["input_ids"][0])
    assert "Query: " + "x" * 10 + "\nDocument" in text
    own = AutoProcessor.from_pretrained(checkpoint())
    own.tokenizer.padding_side = "right"
    features = rerankable(model, processor=own).preprocess([("x", images[1]), ("x", "y")])
    assert len(features["pixel_values"]) > len(read["pixel_values"]), "the processor of the caller decides"
    assert features["attention_mask"][:, -1].all()
    assert own.tokenizer.padding_side == "right"


def test_bad_input_is_named(encoder, images, tmp_path):
    reranker = rerankable(encoder)
    with pytest.raises(ValueError, match=r"Pair \('a', .*, document: There is no image file .*gone\.png"):
        reranker.predict([("a", "b"), ("a", tmp_path / "gone.png")])
    with pytest.raises(ValueError, match=r"Pair \[0.5, 'a'\], query: An input is a float"):
        reranker.rank(0.5, ["a"], prompt="a prompt must not be lost on the way")
    with pytest.raises(ValueError, match=r"Pair \('a', 'b', 'c'\) is a tuple, but \(query, document\)"):
        reranker.predict([("a", "b"), ("a", "b", "c")])
    with pytest.raises(ValueError, match=r"Retrieved 1 of 2: An input is a NoneType"):
        answer(encoder, "what is it?", [images[0], None])
    with pytest.raises(
        ValueError, match="Retrieved 0 of 1: There is a video, but answers and reranking take texts and"
    ):
        answer(encoder, "what is it?", [{"video": images[:2], "fps": 1}])
    for call in (build_reranker, lambda model: answer(model, "what is it?")):
        for wrong in ("folder", SentenceTransformer(modules=[torch.nn.Identity()])):
            with pytest.raises(TypeError, match=rf"model is a {type(wrong).__name__}, but .*SLQEncoder\(folder\)"):
                call(wrong)
    with pytest.raises(ValueError, match="The question is a list"):
        answer(encoder, ["what is it?"])
    with pytest.raises(ValueError, match="The answer 'yes' is 3 tokens"):
        build_reranker(encoder)
    with pytest.raises(ValueError, match="both 'a'"):
        build_reranker(encoder, true_token="a", false_token="a")
    for wrong in ("{query}", "{document}{query}{query}"):
        with pytest.raises(ValueError, match=r"holds \{(document|query)\} (0|2) times, but it must hold it once"):
            rerankable(encoder, instruction=wrong)
    assert RERANK_INSTRUCTION.count("{query}") == 1
