"""One encoder for many callers: loaded once, safe in threads, smaller batches when memory runs out, bad input by name."""

from __future__ import annotations

import base64
import copy
import io
import pickle
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from slq_embed import SLQEncoder
from slq_embed.backbone import lock_of
from slq_embed.inputs import open_image
from slq_embed.serving import UnreadableInputsError, embed, embed_images, shared_encoder


@pytest.fixture
def picture(tmp_path, images) -> Path:
    path = tmp_path / "a picture, 10:30, 100%25 ü.png"
    images[0].save(path)
    return path


def test_a_model_is_loaded_once(encoder, tmp_path, monkeypatch):
    encoder.save_pretrained(tmp_path / "slq")
    monkeypatch.chdir(tmp_path)
    first = shared_encoder(tmp_path / "slq", device="cpu")
    assert shared_encoder("slq", device="cpu") is first
    assert shared_encoder("slq", device="cpu", truncate_dim=None, revision=None) is first
    assert shared_encoder("slq", device="cpu", truncate_dim=8) is not first
    assert shared_encoder(first) is first
    backbones = [copy.deepcopy(encoder.backbone) for _ in range(2)]
    given = [shared_encoder(tmp_path / "slq", backbone=backbone) for backbone in [*backbones, backbones[0]]]
    assert [model.backbone for model in given] == [*backbones, backbones[0]]
    assert given[2] is given[0]
    with pytest.raises(ValueError, match="loaded already, so device cannot"):
        shared_encoder(first, device="cpu")


def test_a_model_that_is_loading_holds_up_nobody(encoder, mixed, tmp_path, monkeypatch):
    encoder.save_pretrained(tmp_path / "slq")
    load, embedded = SLQEncoder.__init__, []

    def slow(*args, **kwargs):
        other = threading.Thread(target=lambda: embedded.append(embed(encoder, mixed)), daemon=True)
        other.start()
        other.join(60)
        load(*args, **kwargs)

    monkeypatch.setattr(SLQEncoder, "__init__", slow)
    shared_encoder(tmp_path / "slq")
    assert embedded


def test_every_form_of_an_image_is_read(encoder, images, picture):
    expected = encoder.encode(images[0])
    raw = picture.read_bytes()
    forms = [str(picture), picture, picture.as_uri(), raw, io.BytesIO(raw), images[0], picture.open("rb")]
    forms += [{"bytes": raw, "path": None}, {"image": {"bytes": None, "path": str(picture)}}]
    forms.append("data:image/png;base64," + base64.b64encode(raw).decode())
    forms.append("data:image/png;base64," + quote(base64.encodebytes(raw).decode()))
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw)
        forms.append(open_image(file))
    found = embed_images(encoder, forms)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6


def test_an_image_with_a_text_is_read_in_every_form(encoder, images, picture):
    expected = encoder.encode({"image": images[0], "text": "in blue"})
    raw = picture.read_bytes()
    forms = [str(picture), picture.as_uri(), raw, io.BytesIO(raw), images[0]]
    found = embed_images(encoder, [{"image": form, "text": "in blue"} for form in forms] + [{"text": "in blue"}])
    assert np.abs(found[:-1] - expected).max() < 1e-6
    assert np.abs(found[-1] - encoder.encode("in blue")).max() < 1e-6
    with pytest.raises(UnreadableInputsError, match="pass fetch_urls=True"):
        embed_images(encoder, [{"image": "https://example.com/a.png", "text": "in blue"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.png", "pass fetch_urls=True"),
        ("ftp://example.com/a.png", "neither a path nor"),
        ("data:image/png;base64,%%%", "does not hold base64"),
        (io.StringIO("/etc/hosts"), "open it with 'rb'"),
    ],
)
def test_a_source_that_cannot_be_opened_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_what_is_no_image_does_not_fill_the_message(encoder):
    much = base64.b64encode(bytes(100_000)).decode()
    for source, reason in ((much, "no image file"), (f"data:text/plain;base64,{much}", "neither a path nor")):
        with pytest.raises(UnreadableInputsError, match=reason) as caught:
            embed_images(encoder, [source])
        assert len(str(caught.value)) < 3000


def test_a_colon_makes_no_address():
    assert open_image("shot-2024T10:00.png") == Path("shot-2024T10:00.png")


def test_a_url_is_fetched_when_asked(encoder, images, picture, monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            good = self.path == "/the%20picture.png"
            self.send_response(404 if self.path == "/gone.png" else 200)
            self.end_headers()
            self.wfile.write(picture.read_bytes() if good else b"")
            while self.path == "/slow.png":
                self.wfile.write(b".")
                time.sleep(0.02)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        found = embed_images(encoder, [f"{address}/the picture.png"], fetch_urls=True)
        assert np.abs(found[0] - encoder.encode(images[0])).max() < 1e-6
        with pytest.raises(UnreadableInputsError, match=r"gone\.png' cannot be fetched: .*404"):
            embed_images(encoder, [f"{address}/gone.png"], fetch_urls=True)
        with pytest.raises(ValueError, match="cannot be fetched"):
            open_image(f"{address[:-1]}x/a", fetch=True)
        with monkeypatch.context() as patch:
            patch.setattr("slq_embed.inputs.sources.FETCH_SECONDS", 0.3)
            with pytest.raises(ValueError, match=r"it took more than 0\.3 s"):
                open_image(f"{address}/slow.png", fetch=True)
        monkeypatch.setattr("slq_embed.inputs.sources.MAX_FETCHED_BYTES", 10)
        with pytest.raises(ValueError, match="is larger than"):
            open_image(f"{address}/the picture.png", fetch=True)
    finally:
        server.shutdown()


def test_one_bad_image_fails_alone_and_by_name(encoder, images, picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:-40])
    sources = [images[1], str(broken), "https://example.com/a.png", picture, tmp_path / "none.png"]
    with pytest.raises(UnreadableInputsError, match=r"3 of 5 .*broken\.png.*pass fetch_urls.*none\.png") as caught:
        embed_images(encoder, sources, batch_size=2)
    assert [row.index for row in caught.value.skipped] == [1, 2, 4]
    good = caught.value.embeddings[[0, 3]]
    assert np.abs(good - encoder.encode([images[1], images[0]])).max() < 1e-6
    assert np.isnan(caught.value.embeddings[[1, 2, 4]]).all()
    with pytest.raises(UnreadableInputsError, match="1 of 2"):
        embed(encoder, ["a text", 5.0])


def test_a_batch_that_does_not_fit_is_halved(encoder, mixed, monkeypatch, caplog):
    expected = encoder.encode(mixed)
    sizes = []
    forward = encoder.forward

    def limited(features, **kwargs):
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(features, **kwargs)

    monkeypatch.setattr(encoder, "forward", limited)
    assert np.abs(embed(encoder, mixed, batch_size=6) - expected).max() < 1e-6
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert "going on with 3 at a time" in caplog.text
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: limited({"input_ids": range(9)}))
    with pytest.raises(RuntimeError, match="One input alone does not fit"):
        embed(encoder, mixed)
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        embed(encoder, mixed)


def test_threads_may_embed_at_once_and_while_the_backbone_answers(checkpoint, mixed):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")
    other = encoder.with_queries(2, seed=1)
    assert lock_of(encoder.backbone) is lock_of(other.backbone)
    expected = encoder.encode(mixed), other.encode(mixed)
    prompt = encoder.tokenizer("what is that", return_tensors="pt")

    def answer():
        return encoder.backbone.generate(**prompt, max_new_tokens=12, do_sample=False)

    said = answer()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answer) for _ in range(4)]
        rows = [pool.submit(embed, (encoder, other)[n % 2], mixed[n % 6 :] + mixed[: n % 6]) for n in range(24)]
        for n, row in enumerate(rows):
            wanted = np.roll(expected[n % 2], -(n % 6), axis=0)
            assert np.abs(row.result() - wanted).max() < 1e-5
        assert all(torch.equal(found.result(), said) for found in answers)


def test_shorter_embeddings_are_normalised(encoder, mixed):
    encoder.truncate_dim = 8
    found = embed(encoder, mixed)
    assert found.shape == (6, 8)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(6))
    assert np.abs(embed(encoder, mixed, normalize_embeddings=False) - encoder.encode(mixed)).max() < 1e-6


def test_nothing_in_nothing_out(encoder):
    assert embed(encoder, []).shape == embed_images(encoder, []).shape == (0, 32)
    with Image.new("RGB", (8, 8)) as image:
        assert embed_images(encoder, [image]).shape == (1, 32)


def test_a_model_that_was_saved_anew_is_loaded_anew(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "slq")
    first = shared_encoder(tmp_path / "slq")
    other = encoder.with_queries(seed=9)
    other.save_pretrained(tmp_path / "slq")
    assert shared_encoder(tmp_path / "slq").encode("a") == pytest.approx(other.encode("a"), abs=1e-6)
    assert first.encode("a") == pytest.approx(encoder.encode("a"), abs=1e-6)
    again = shared_encoder(tmp_path / "slq")
    (tmp_path / "slq" / "notes.txt").write_text("mine")
    assert shared_encoder(tmp_path / "slq") is again


def test_half_a_character_fails_alone_and_the_error_travels(encoder):
    with pytest.raises(
        UnreadableInputsError, match=r"input 1 \(bad \\ud83d\): A text holds half a character"
    ) as caught:
        embed(encoder, ["good", "bad \ud83d", "fine"])
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.skipped) == (str(caught.value), caught.value.skipped)
    assert np.isnan(error.embeddings).any(axis=1).tolist() == [False, True, False]


def test_batches_are_of_one_at_least(encoder):
    with pytest.raises(ValueError, match="batch_size is 0"):
        embed(encoder, ["a"], batch_size=0)
