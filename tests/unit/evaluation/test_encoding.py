"""How evaluators encode: each input once, any Sentence Transformer, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder, pretrained
from slq_embed.evaluation.encoding import EvaluatorOptions, embed


@pytest.fixture(scope="module")
def model():
    return SLQEncoder(pretrained("slq-tiny"), device="cpu")


@pytest.fixture
def inputs(tmp_path):
    """A text, an image file, an undecoded image and an image with a text; some come twice."""
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
    red, blue = tmp_path / "red.png", {"bytes": (tmp_path / "blue.png").read_bytes(), "path": None}
    composed = {"image": red, "text": "but in blue"}
    return ["a red circle", red, blue, composed, red, {"image": red, "text": "but in blue"}, "a red circle", blue]


def test_each_distinct_input_is_encoded_once(model, inputs, monkeypatch):
    seen = []
    encode = SLQEncoder.encode_query
    monkeypatch.setattr(
        SLQEncoder, "encode_query", lambda self, rows, **kw: (seen.extend(rows), encode(self, rows, **kw))[1]
    )
    rows = embed(model, inputs, "query", EvaluatorOptions(), "queries")
    assert len(seen) == 4
    assert rows.shape == (8, model.get_embedding_dimension())
    for first, second in ((0, 6), (1, 4), (2, 7), (3, 5)):
        assert torch.equal(rows[first], rows[second])
    assert torch.allclose(rows, torch.from_numpy(encode(model, inputs)), atol=1e-6)
    assert torch.unique(rows, dim=0).shape[0] == 4
    others = [{**({"image": inputs[1]} if image else {}), "text": text} for image in (0, 1) for text in ("new", "old")]
    assert torch.unique(embed(model, others, "query", EvaluatorOptions(), "queries"), dim=0).shape[0] == 4
    several = [{"images": list(images), "text": "both"} for images in (inputs[1:3], inputs[2:0:-1])]
    assert torch.unique(embed(model, several, "query", EvaluatorOptions(), "queries"), dim=0).shape[0] == 2


def test_a_plain_sentence_transformer_gets_decoded_images_some_batches_at_a_time(model, inputs, monkeypatch):
    plain = SentenceTransformer(pretrained("slq-tiny"), device="cpu")
    chunks = []
    encode = SentenceTransformer.encode_document
    monkeypatch.setattr(
        SentenceTransformer,
        "encode_document",
        lambda self, rows, **kw: (chunks.append(rows), encode(self, rows, **kw))[1],
    )
    monkeypatch.setattr("slq_embed.evaluation.encoding._BATCHES_A_CHUNK", 1)
    rows = embed(plain, inputs, "document", EvaluatorOptions(batch_size=3), "images")
    assert [len(chunk) for chunk in chunks] == [3, 1]
    assert isinstance(chunks[0][1], Image.Image)
    assert torch.allclose(rows, embed(model, inputs, "document", EvaluatorOptions(), "images"), atol=1e-5)
    with pytest.raises(
        ValueError, match="embeddings_folder needs an SLQEncoder, but the model is a SentenceTransformer"
    ):
        embed(plain, inputs, "document", EvaluatorOptions(embeddings_folder="x"), "images")


def test_prompts_and_the_similarity_decide_the_embeddings(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "prompts", {"query": "Search: ", "document": ""})
    for task in ("query", "document"):
        kept = embed(model, inputs, task, EvaluatorOptions(embeddings_folder=tmp_path), task)
        assert torch.allclose(kept, embed(model, inputs, task, EvaluatorOptions(), task), atol=1e-6)
    assert not torch.allclose(embed(model, inputs, "query", EvaluatorOptions(), "q"), kept, atol=1e-3)
    monkeypatch.setattr(model, "truncate_dim", 8)
    assert torch.allclose(embed(model, inputs, "query", EvaluatorOptions(), "q").norm(dim=1), torch.ones(8))
    monkeypatch.setattr(model, "similarity_fn_name", "dot")
    assert (embed(model, inputs, "query", EvaluatorOptions(), "q").norm(dim=1) < 0.99).all()


def test_a_killed_run_goes_on_and_names_what_cannot_be_read(model, inputs, tmp_path, monkeypatch):
    options = EvaluatorOptions(name="toy", embeddings_folder=tmp_path / "kept")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"of the queries, 1 skipped: .*bad\.png.* Repair these and run again"):
        embed(model, [*inputs, bad], "query", options, "queries")
    Image.new("RGB", (32, 32), "green").save(bad)
    encoded = []
    encode = SLQEncoder.encode_to_file
    monkeypatch.setattr(
        SLQEncoder, "encode_to_file", lambda *a, **kw: (result := encode(*a, **kw), encoded.append(result.encoded))[0]
    )
    rows = embed(model, [*inputs, bad], "query", options, "queries")
    again = embed(model, [*inputs, bad], "query", options, "queries")
    assert encoded == [1, 0]
    assert torch.equal(rows, again)
    assert rows.isfinite().all()
    assert [file.name for file in sorted(Path(tmp_path / "kept").glob("*.npy"))] == [
        "toy_queries.npy",
        "toy_queries.progress.npy",
    ]
