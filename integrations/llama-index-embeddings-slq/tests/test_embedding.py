"""Texts, queries and images become the model's own embeddings, each with the prompt it should have."""

from __future__ import annotations

import base64
import importlib.util
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import llama_index
import numpy as np
import pytest
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.embeddings.slq import SLQEmbedding
from PIL import Image

from slq_embed import SLQEncoder, pretrained
from slq_embed.serving import UnreadableInputsError, shared_encoder


def same(rows, expected) -> bool:
    return np.abs(np.asarray(rows) - np.asarray(expected)).max() < 1e-6


@pytest.fixture
def sizes(encoder, monkeypatch) -> list[int]:
    """How many inputs went through the model at a time."""
    seen = []
    forward = encoder.forward

    def counted(features, **kwargs):
        seen.append(len(features["input_ids"]))
        return forward(features, **kwargs)

    monkeypatch.setattr(encoder, "forward", counted)
    return seen


def test_it_is_one_module_of_the_namespace():
    assert issubclass(SLQEmbedding, MultiModalEmbedding)
    assert SLQEmbedding.class_name() == "SLQEmbedding"
    assert llama_index.__file__ is None, "an __init__.py in llama_index/ would hide the host"
    assert importlib.util.find_spec("llama_index.embeddings").origin is None


def test_texts_queries_and_images_are_embedded_as_by_the_model(embedding, encoder, scenes):
    captions, pictures = [s.caption for s in scenes], [str(s.picture) for s in scenes]
    texts, images = encoder.encode(captions), encoder.encode([s.picture for s in scenes])
    assert same(embedding.get_text_embedding(captions[0]), texts[0])
    assert same(embedding.get_query_embedding(captions[0]), texts[0])
    assert same(embedding.get_text_embedding_batch(captions), texts)
    assert same(embedding.get_image_embedding(pictures[0]), images[0])
    assert same(embedding.get_image_embedding_batch(pictures), images)
    assert same(embedding.get_agg_embedding_from_queries(captions[:3]), texts[:3].mean(0))
    assert type(embedding.get_text_embedding("a")[0]) is float
    assert embedding.get_text_embedding_batch([]) == embedding.get_image_embedding_batch([]) == []


def test_the_right_picture_comes_first(embedding, scenes):
    pictures = np.array(embedding.get_image_embedding_batch([str(s.picture) for s in scenes]))
    for asked in ([s.caption for s in scenes], [s.implicit for s in scenes]):
        scores = np.array([embedding.get_query_embedding(text) for text in asked]) @ pictures.T
        assert np.mean(scores.argmax(1) == np.arange(len(scenes))) > 0.9
    one, two = (embedding.get_image_embedding(str(path)) for path in (scenes[3].picture, scenes[3].other))
    assert embedding.similarity(one, two) > embedding.similarity(one, list(pictures[4]))


def test_a_batch_is_one_pass(embedding, scenes, sizes):
    embedding.get_text_embedding_batch([s.caption for s in scenes])
    embedding.get_image_embedding_batch([str(s.picture) for s in scenes])
    assert sum(sizes) == 24
    assert max(sizes) > 1, "the host's own methods would go one by one"
    sizes.clear()
    embedding.get_image_embedding_batch([str(scenes[0].picture)] * 7)
    assert sizes == [5, 2]


def test_every_form_of_an_image_is_read(embedding, encoder, scenes):
    path = scenes[0].picture
    raw = path.read_bytes()
    read_to_the_end = io.BytesIO(raw)
    read_to_the_end.read()
    data = "data:image/png;base64," + base64.b64encode(raw).decode()
    forms = [str(path), path, path.as_uri(), io.BytesIO(raw), read_to_the_end, data, raw, Image.open(path)]
    assert same(embedding.get_image_embedding_batch(forms), encoder.encode(path))


def test_a_text_is_never_a_file_or_an_address(embedding, encoder, scenes):
    for text in (str(scenes[0].picture), "http://127.0.0.1:9/a.png", "data:image/png;base64,AAAA"):
        assert same(embedding.get_text_embedding(text), encoder.encode({"text": text}))
        assert same(embedding.get_query_embedding(text), encoder.encode({"text": text}))


def test_a_url_is_fetched_only_when_asked(embedding, encoder, scenes):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = scenes[0].picture.parent
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{scenes[0].picture.name}"
        with pytest.raises(UnreadableInputsError, match="pass fetch_urls=True"):
            embedding.get_image_embedding(url)
        asked = SLQEmbedding(model=encoder, fetch_urls=True)
        assert same(asked.get_image_embedding(url), encoder.encode(scenes[0].picture))
        server.shutdown()


def test_bad_images_are_named_and_the_others_embedded(embedding, encoder, scenes, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(scenes[0].picture.read_bytes()[:100])
    images = [str(broken), str(scenes[1].picture), str(tmp_path / "none.png")]
    with pytest.raises(UnreadableInputsError, match=r"2 of 3 .*broken\.png.*none\.png") as caught:
        embedding.get_image_embedding_batch(images)
    assert same(caught.value.embeddings[1], encoder.encode(scenes[1].picture))


def test_prompts_are_the_saved_ones_unless_others_are_given(encoder, scenes, monkeypatch):
    monkeypatch.setattr(encoder, "prompts", {"query": "find this.", "document": "keep this."})
    picture, text = scenes[0].picture, scenes[0].caption
    saved = SLQEmbedding(model=encoder)
    assert same(saved.get_query_embedding(text), encoder.encode_query(text))
    assert same(saved.get_text_embedding_batch([text]), encoder.encode_document([text]))
    assert same(saved.get_image_embedding(picture), encoder.encode_document(picture))
    with_instructions = SLQEmbedding(
        model=encoder, query_instruction="ask.", text_instruction="", image_instruction="look."
    )
    assert same(with_instructions.get_query_embedding(text), encoder.encode(text, prompt="ask."))
    assert same(with_instructions.get_text_embedding(text), encoder.encode(text))
    assert same(with_instructions.get_image_embedding(picture), encoder.encode(picture, prompt="look."))
    assert not same(saved.get_query_embedding(text), saved.get_text_embedding(text))
    assert not same(with_instructions.get_image_embedding(picture), saved.get_image_embedding(picture))


def test_shorter_embeddings_are_normalised_unless_that_is_off(scenes):
    for normalize in (True, False):
        short = SLQEmbedding(pretrained("slq-tiny"), device="cpu", truncate_dim=16, normalize=normalize)
        rows = short.get_text_embedding(scenes[0].caption), short.get_image_embedding(scenes[0].picture)
        assert [len(row) for row in rows] == [16, 16]
        assert np.isclose(np.linalg.norm(rows, axis=1), 1).tolist() == [normalize, normalize]


def test_progress_is_shown_when_asked(embedding, encoder, scenes, capsys):
    embedding.get_image_embedding_batch([scenes[0].picture])
    assert capsys.readouterr().err == ""
    embedding.get_image_embedding_batch([scenes[0].picture], show_progress=True)
    assert "Generating image embeddings" in capsys.readouterr().err
    SLQEmbedding(model=encoder, show_progress_bar=True).get_text_embedding("a")
    assert "1/1" in capsys.readouterr().err


def test_one_model_in_memory_for_all_who_ask_for_the_same(embedding, encoder, tmp_path, monkeypatch):
    folder = pretrained("slq-tiny")
    assert embedding.encoder is encoder
    assert SLQEmbedding(model_name=folder, device="cpu", query_instruction="ask.").encoder is encoder
    assert shared_encoder(folder, device="cpu", revision=None, cache_folder=None) is embedding.encoder
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert SLQEmbedding("link", device="cpu").encoder is encoder


def test_a_loaded_encoder_is_taken_as_it_is(encoder, scenes):
    mine: SLQEncoder = encoder.with_queries(2, seed=0)
    embedding = SLQEmbedding(model=mine)
    assert embedding.encoder is mine
    assert embedding.encoder.backbone is encoder.backbone
    assert same(embedding.get_text_embedding("a"), mine.encode("a"))
    with pytest.raises(ValueError, match="loaded already, so device, truncate_dim cannot"):
        SLQEmbedding(model=mine, device="cpu", truncate_dim=8)


def test_wrong_arguments_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"Pass a loaded model as model=: SLQEmbedding\(model=encoder\)"):
        SLQEmbedding(encoder)
    with pytest.raises(ValueError, match=r"model is a str.*Pass a folder or hub name as model_name="):
        SLQEmbedding(model=str(tmp_path))
    with pytest.raises(ValueError, match="There is no model to load"):
        SLQEmbedding()
    with pytest.raises(ValueError, match="query_instructions"):
        SLQEmbedding(model=encoder, query_instructions="misspelt")
    with pytest.raises(ValueError, match="embed_batch_size"):
        SLQEmbedding(model=encoder, embed_batch_size=0)
    with pytest.raises(ValueError, match="slq_config"):
        SLQEmbedding(tmp_path)
