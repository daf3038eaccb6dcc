"""What SLQEmbeddings adds to slq-embed's own serving: names, prompts, settings, one model, no copies of weights."""

from __future__ import annotations

import base64
import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from langchain_core.stores import InMemoryByteStore
from PIL import Image
from slq_embed import SLQEncoder, pretrained
from slq_embed.serving import UnreadableInputsError, shared_encoder

from langchain_slq import SLQEmbeddings

FOLDER = pretrained("slq-tiny")


def close(rows, expected) -> bool:
    return bool(np.abs(np.asarray(rows) - np.asarray(expected)).max() < 1e-5)


def test_the_vectors_are_the_models_own(embeddings, gallery):
    model = embeddings.encoder
    assert close(embeddings.embed_documents(gallery.texts), model.encode_document(gallery.texts))
    assert close(embeddings.embed_query(gallery.texts[0]), model.encode_query(gallery.texts[0]))
    rows = embeddings.embed_image(gallery.paths)
    assert close(rows, model.encode([Path(path) for path in gallery.paths]))
    assert embeddings.embed_images(gallery.paths) == rows
    assert type(rows) is list
    assert type(rows[0]) is list
    assert {type(value) for value in rows[0]} == {float}


def test_a_text_is_only_ever_a_text(embeddings, gallery):
    path = gallery.paths[0]
    assert close(embeddings.embed_query(path), embeddings.encoder.encode({"text": path}))
    assert not close(embeddings.embed_documents([path]), embeddings.embed_image([path]))
    assert close(embeddings.embed_inputs([path, {"text": "a"}])[0], embeddings.embed_query(path))
    assert close(embeddings.embed_inputs(iter([path])), [embeddings.embed_query(path)])


def test_what_is_no_text_is_an_input_of_the_model(embeddings, gallery):
    with Image.open(gallery.paths[0]) as picture:
        assert close(embeddings.embed_documents([picture]), embeddings.embed_image([picture]))
    with pytest.raises(UnreadableInputsError, match="1 of 1 inputs cannot be read: input 0"):
        embeddings.embed_query(3)


def test_arguments_of_the_backbone_are_one_level_deeper():
    half = SLQEmbeddings(model=FOLDER, device="cpu", model_kwargs={"model_kwargs": {"dtype": "float16"}})
    assert half.encoder.backbone.dtype == torch.float16
    with pytest.raises(TypeError, match="dtype"):  # as in langchain-huggingface
        SLQEmbeddings(model=FOLDER, device="cpu", model_kwargs={"dtype": "float16"})


def test_every_form_of_an_image_is_read(embeddings, gallery):
    path = Path(gallery.paths[0])
    raw = path.read_bytes()
    data = "data:image/png;base64," + base64.b64encode(raw).decode()
    with Image.open(path) as picture:
        forms = [str(path), path, path.as_uri(), data, raw, io.BytesIO(raw), picture.copy()]
    expected = embeddings.embed_image([path])
    assert close(embeddings.embed_image(forms), expected * len(forms))
    both = embeddings.embed_inputs([{"image": form, "text": "in green"} for form in forms])
    assert close(both, both[:1] * len(forms))
    assert not close(both[:1], expected)


def test_one_input_is_no_list(embeddings, gallery):
    for call in (embeddings.embed_image, embeddings.embed_images, embeddings.embed_documents):
        for one in (gallery.paths[0], Path(gallery.paths[0]).read_bytes()):
            with pytest.raises(ValueError, match=f"is a {type(one).__name__}, but a list is needed"):
                call(one)
    with pytest.raises(ValueError, match="is a dict, but a list is needed"):
        embeddings.embed_inputs({"text": "a"})
    assert close(embeddings.embed_documents(iter(["a"])), embeddings.embed_documents(["a"]))


def test_nothing_in_nothing_out(embeddings):
    assert embeddings.embed_documents([]) == embeddings.embed_image([]) == embeddings.embed_inputs([]) == []


def test_a_bad_image_fails_alone_and_by_name(embeddings, gallery, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UnreadableInputsError, match=r"1 of 2 .*broken\.png") as caught:
        embeddings.embed_image([str(broken), gallery.paths[0]])
    assert close(caught.value.embeddings[1], embeddings.embed_image(gallery.paths[:1])[0])


def test_urls_are_fetched_only_when_asked(embeddings, monkeypatch, gallery):
    url = "http://127.0.0.1:9/picture.png"
    with pytest.raises(UnreadableInputsError, match="pass fetch_urls=True"):
        embeddings.embed_image([url])
    monkeypatch.setattr("slq_embed.inputs.sources._fetch", lambda url: Path(gallery.paths[0]).read_bytes())
    asked = SLQEmbeddings(model=FOLDER, device="cpu", fetch_urls=True)
    assert close(asked.embed_image([url]), embeddings.embed_image(gallery.paths[:1]))


def test_model_name_is_another_name_for_model(embeddings):
    other = SLQEmbeddings(model_name=FOLDER, device="cpu")
    assert other.model == other.model_name == FOLDER
    with pytest.raises(ValueError, match="model"):
        SLQEmbeddings()
    with pytest.raises(ValueError, match="Extra inputs"):
        SLQEmbeddings(model=FOLDER, batchsize=3)
    with pytest.raises(ValueError, match="batch_size"):
        SLQEmbeddings(model=FOLDER, batch_size=0)


def test_one_model_in_memory(embeddings):
    other = SLQEmbeddings(model=Path(FOLDER), device="cpu")
    assert other.encoder is embeddings.encoder is shared_encoder(FOLDER, device="cpu")
    assert SLQEmbeddings(model=FOLDER).encoder is shared_encoder(FOLDER)
    assert SLQEmbeddings(model=other.encoder).encoder is embeddings.encoder
    with pytest.raises(ValueError, match="loaded already, so device cannot"):
        SLQEmbeddings(model=other.encoder, device="cpu")


def test_a_name_that_is_nothing_fails_at_once(tmp_path):
    with pytest.raises((OSError, ValueError), match="nothing"):
        SLQEmbeddings(model=str(tmp_path / "nothing"))


def test_settings_are_dumped_printed_and_pickled_without_weights(embeddings):
    dumped = embeddings.model_dump()
    assert json.loads(embeddings.model_dump_json()) == dumped
    assert SLQEmbeddings(**dumped) == embeddings
    assert len(repr(embeddings)) < 500
    stored = pickle.dumps(embeddings)
    assert len(stored) < 2000
    again = pickle.loads(stored)
    assert again.batch_size == 8
    assert again.encoder is embeddings.encoder
    for copied in (copy.deepcopy(embeddings), copy.copy(embeddings), embeddings.model_copy(deep=True)):
        assert copied.encoder is embeddings.encoder


def test_a_loaded_model_is_described_and_not_pickled(embeddings):
    held = SLQEmbeddings(model=embeddings.encoder)
    assert held.model_dump()["model"] == held.model_name
    assert held.model_name.startswith("<SLQEncoder in memory, 16 x 192, ")
    assert held.model_name == SLQEmbeddings(model=embeddings.encoder, batch_size=3).model_name
    assert held.model_name != SLQEmbeddings(model=embeddings.encoder.with_queries(seed=1)).model_name
    with pytest.raises(ValueError, match="Pass the SLQEncoder itself"):
        SLQEmbeddings(**held.model_dump())
    assert len(repr(held)) < 500
    assert copy.deepcopy(held).encoder is embeddings.encoder
    with pytest.raises(ValueError, match="Save it with save_pretrained"):
        pickle.dumps(held)


def test_what_decides_loading_is_not_changed_afterwards(embeddings):
    with pytest.raises(ValueError, match="frozen"):
        embeddings.truncate_dim = 64
    shorter = embeddings.model_copy(update={"truncate_dim": 64})
    assert [len(model.embed_query("a")) for model in (shorter, embeddings)] == [64, 192]
    assert embeddings.model_copy(update={"batch_size": 3}).encoder is embeddings.encoder


@pytest.fixture
def prompted(tmp_path) -> str:
    model = SLQEncoder(FOLDER, device="cpu", prompts={"query": "Search.", "document": "Keep."})
    model.save_pretrained(str(tmp_path / "prompted"))
    return str(tmp_path / "prompted")


def test_prompts_are_the_saved_ones_unless_given(prompted, gallery):
    text, image = gallery.texts[0], Path(gallery.paths[0])
    plain = SLQEmbeddings(model=prompted, device="cpu")
    model = plain.encoder
    assert close(plain.embed_query(text), model.encode(text, prompt="Search."))
    assert close(plain.embed_documents([text])[0], model.encode(text, prompt="Keep."))
    assert close(plain.embed_image([image])[0], model.encode(image, prompt="Keep."))
    both = {"image": image, "text": text}
    assert close(plain.embed_inputs([both])[0], model.encode(both, prompt="Search."))
    assert not close(plain.embed_query(text), plain.embed_documents([text])[0])

    with_prompts = SLQEmbeddings(
        model=prompted, device="cpu", query_prompt="", document_prompt="Doc.", image_prompt="Pic."
    )
    assert with_prompts.encoder is model
    assert close(with_prompts.embed_query(text), model.encode(text, prompt=""))
    assert close(with_prompts.embed_documents([text])[0], model.encode(text, prompt="Doc."))
    assert close(with_prompts.embed_image([image])[0], model.encode(image, prompt="Pic."))


def test_a_cache_of_both_gives_a_query_the_vector_of_a_document(prompted, gallery):
    """The README says so: with prompts, queries need a store of their own."""
    cached = pytest.importorskip("langchain_classic.embeddings").CacheBackedEmbeddings.from_bytes_store
    embeddings, text = SLQEmbeddings(model=prompted, device="cpu"), gallery.texts[0]
    assert not close(embeddings.embed_query(text), embeddings.embed_documents([text])[0])
    for store, expected in (
        (True, embeddings.embed_documents([text])[0]),
        (InMemoryByteStore(), embeddings.embed_query(text)),
    ):
        cache = cached(embeddings, InMemoryByteStore(), query_embedding_cache=store, key_encoder="sha256")
        cache.embed_documents([text])
        assert close(cache.embed_query(text), expected)


def test_settings_reach_the_model(embeddings, gallery, monkeypatch, capfd):
    sizes = []
    forward = embeddings.encoder.forward

    def counted(features, **kwargs):
        sizes.append(len(features["input_ids"]))
        return forward(features, **kwargs)

    monkeypatch.setattr(embeddings.encoder, "forward", counted)
    small = SLQEmbeddings(model=FOLDER, device="cpu", batch_size=3, show_progress=True)
    small.embed_documents(gallery.texts)
    assert max(sizes) <= 3
    assert sum(sizes) == 12
    assert "Batches: 100%" in capfd.readouterr().err
    embeddings.embed_documents(gallery.texts)
    assert "Batches" not in capfd.readouterr().err


def test_shorter_embeddings_have_norm_one():
    short = SLQEmbeddings(model=FOLDER, device="cpu", truncate_dim=16, model_kwargs={"local_files_only": True})
    row = short.embed_query("a red circle")
    assert len(row) == 16
    assert np.linalg.norm(row) == pytest.approx(1)
