"""What goes wrong between a client and a server: each time one error that says what came, and no result is lost."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from langchain_slq import SLQEmbeddings
from llama_index.embeddings.slq import SLQEmbedding

from slq_embed import SLQEncoder
from slq_embed.remote import PartlyEmbeddedError, RemoteEncoder
from slq_embed.serving import UnreadableInputsError, embed, embed_images
from tests.server import LONGEST, NAME, serving


@pytest.fixture(scope="module")
def local(checkpoint) -> SLQEncoder:
    return SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")


@pytest.fixture(scope="module")
def _running(local):
    with serving(local) as running:
        yield running


@pytest.fixture
def server(_running, monkeypatch):
    """The server, with pauses that a test can wait for."""
    monkeypatch.setattr("slq_embed.remote._PAUSES_S", (0.0, 0.0))
    yield _running
    _running.failures, _running.wait_s, _running.empty = [], 0.0, ""


@pytest.fixture
def remote(server) -> RemoteEncoder:
    return RemoteEncoder(server.url)


def test_no_server_no_model_no_key(server, local):
    with pytest.raises(ConnectionError, match=r"No server answers at http://127\.0\.0\.1:9"):
        RemoteEncoder("http://127.0.0.1:9")
    with pytest.raises(ValueError, match=f"has no model 'another'. It has: {NAME}"):
        RemoteEncoder(server.url, "another")
    with pytest.raises(ValueError, match="an address such as"):
        RemoteEncoder("file:///etc")
    with serving(local, key="secret") as locked:
        with pytest.raises(RuntimeError, match=r"401: Unauthorized\. Pass the server's key: api_key=, or SLQ_API_KEY"):
            RemoteEncoder(locked.url)
        with_key = RemoteEncoder(f"{locked.url}/v1/", api_key="secret")
        assert embed(with_key, ["a"]).shape == (1, 32)
        assert "secret" not in repr(with_key)


def test_the_key_can_come_from_the_environment(local, monkeypatch):
    monkeypatch.setenv("SLQ_API_KEY", "secret\n")  # as files end
    with serving(local, key="secret") as locked:
        assert embed(RemoteEncoder(locked.url), ["a"]).shape == (1, 32)


@pytest.mark.parametrize("key", ["sec\nret", "sécret"])
def test_a_key_that_no_header_can_hold_is_not_printed(server, key):
    with pytest.raises(ValueError, match="holds a character that no header can hold") as raised:
        RemoteEncoder(server.url, api_key=key)
    assert "ret" not in str(raised.value)
    assert raised.value.__cause__ is raised.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate_dim": -3}, "truncate_dim is -3, but at least 1"),
        ({"timeout_s": 0}, "timeout_s is 0, but a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(server, options, message):
    with pytest.raises(ValueError, match=message):
        RemoteEncoder(server.url, **options)


@pytest.mark.parametrize(
    "content", [b"<html>Welcome</html>", {"object": "list"}, {"data": [{"name": 3}]}, [3], b"\xff"]
)
def test_what_is_no_server_for_embeddings_is_named_with_what_it_says(server, remote, content, monkeypatch):
    server.failures = [(200, content)]
    with pytest.raises(RuntimeError, match=r"no server for embeddings: to /v1/embeddings it says .*Check base_url"):
        embed(remote, ["a"])
    monkeypatch.setattr(RemoteEncoder, "_send", lambda self, path, body=None: b"<html>Welcome</html>")
    with pytest.raises(RuntimeError, match=r"to /v1/models it says '<html>Welcome"):
        RemoteEncoder(server.url)
    monkeypatch.setattr(RemoteEncoder, "_send", lambda self, path, body=None: b'{"data": []}')
    with pytest.raises(RuntimeError, match="lists no models"):
        RemoteEncoder(server.url)


def test_a_server_that_has_too_much_to_do_is_asked_again(server, local, remote, caplog):
    server.failures = [(503, {"error": "starting"}), (429, {"error": "too many"})]
    with caplog.at_level(logging.WARNING, "slq_embed.remote"):
        found = embed(remote, ["a", "b"], batch_size=1)
    assert np.abs(found - embed(local, ["a", "b"])).max() < 1e-5
    assert "with 503: starting Asking again" in caplog.text
    server.failures = [(503, {"error": "starting"})] * 3
    with pytest.raises(RuntimeError, match="503: starting"):
        embed(remote, ["a"])
    server.failures = [(500, {"error": "broken"})]
    with pytest.raises(RuntimeError, match="500: broken"):
        embed(remote, ["a"])


def test_a_lost_connection_is_made_again(local, remote, monkeypatch):
    sent, failures = RemoteEncoder._send_once, [ConnectionError("reset"), ConnectionError("reset")]

    def lose(self, *arguments):
        if failures:
            raise failures.pop()
        return sent(self, *arguments)

    monkeypatch.setattr(RemoteEncoder, "_send_once", lose)
    assert np.abs(embed(remote, ["a"]) - embed(local, ["a"])).max() < 1e-5
    failures += [ConnectionError("reset")] * 3
    with pytest.raises(ConnectionError, match="reset"):
        embed(remote, ["a"])


@pytest.mark.parametrize("truncate_dim", [None, 8])
def test_what_was_embedded_before_a_server_fails_is_not_lost(server, local, truncate_dim):
    remote = RemoteEncoder(server.url, truncate_dim=truncate_dim)
    expected = embed(remote, ["a", "b"])
    answer = json.dumps({"data": [{"index": 0, "embedding": embed(local, ["a"])[0].tolist()}]}).encode()
    server.failures = [(200, answer), (500, {"error": "broken"})]
    with pytest.raises(PartlyEmbeddedError, match=r"^1 of 3 inputs were embedded .*failed: .*500: broken") as raised:
        embed(remote, ["a", "b", "c"], batch_size=1)
    assert not raised.value.skipped
    server.failures = [(200, answer), (500, {"error": "broken"})]
    with pytest.raises(PartlyEmbeddedError, match=r"broken Before that: 1 skipped: input 1 \(missing\.png\)") as raised:
        embed(remote, ["a", Path("missing.png"), "b"], batch_size=1)
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert [row.index for row in error.skipped] == [1]
        assert np.abs(error.embeddings[0] - expected[0]).max() < 1e-5
        assert np.isnan(error.embeddings[1:]).all()
        assert str(error) == str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_images_that_could_not_be_opened_are_named_when_a_server_fails(server, local, remote, images):
    answer = json.dumps({"data": [{"index": 0, "embedding": embed(local, ["a"])[0].tolist()}]}).encode()
    server.failures = [(200, answer), (500, {"error": "broken"})]
    sources = [images[0], Path("missing.png"), "http://127.0.0.1/photo.png", images[1]]
    with pytest.raises(
        PartlyEmbeddedError, match=r"^1 of 4 inputs .* 2 skipped: input 1 \(missing\.png\).*input 2"
    ) as raised:
        embed_images(remote, sources, batch_size=1)
    assert [row.index for row in raised.value.skipped] == [1, 2]


def test_a_slow_server_is_told_from_none_and_asked_once(server):
    remote = RemoteEncoder(server.url, timeout_s=1)
    server.wait_s = 2.0
    server.bodies.clear()
    with pytest.raises(TimeoutError, match=r"has not answered /v1/embeddings within 1 s\. Pass a larger timeout_s"):
        embed(remote, ["a"])
    assert len(server.bodies) == 1
    for embedding in (
        SLQEmbeddings(base_url=server.url, timeout_s=1),
        SLQEmbedding(base_url=server.url, timeout_s=1),
    ):
        assert embedding.encoder.timeout_s == 1
    for kind in (SLQEmbeddings, SLQEmbedding):
        assert kind(base_url=server.url).encoder.timeout_s == 300
        with pytest.raises(ValueError, match="timeout_s"):
            kind(base_url=server.url, timeout_s=0)


def test_a_row_without_numbers_costs_the_others_nothing(server, local, remote):
    server.empty = "nothing"
    for batch_size in (1, 3):
        for inputs in (["nothing", "a", "b"], ["a", "b", "nothing"]):
            with pytest.raises(
                UnreadableInputsError, match=r"1 of 3 .*\(nothing\): the server gave no numbers"
            ) as raised:
                embed(remote, inputs, batch_size=batch_size)
            read = [number for number, text in enumerate(inputs) if text != "nothing"]
            assert np.abs(raised.value.embeddings[read] - embed(local, ["a", "b"])).max() < 1e-5
            assert np.isnan(np.delete(raised.value.embeddings, read, 0)).all()


def test_a_server_without_numbers_is_an_error_at_once(server, remote):
    server.empty = "nothing"
    server.batches.clear()
    with pytest.raises(
        RuntimeError,
        match=r"no numbers for any input so far \(input 0 \(nothing\), .*\)\. Serve a folder of slq_embed\.saving\.export_vllm",
    ):
        embed(remote, ["nothing"] * 8, batch_size=2)
    assert server.batches == [2], "it goes on without a chance"
    with pytest.raises(RuntimeError, match="no numbers"):
        embed(remote, ["nothing"])


@pytest.mark.parametrize("embedding", ["AAA", None, [], "text"])
def test_what_is_no_embedding_is_as_good_as_no_numbers(server, remote, embedding):
    server.failures = [(200, {"data": [{"index": 0, "embedding": embedding}]})]
    with pytest.raises(RuntimeError, match="no numbers"):
        embed(remote, ["a"])


def test_batches_of_nothing_are_refused(server, remote):
    server.batches.clear()
    with pytest.raises(ValueError, match="batch_size is 0, but at least 1"):
        embed(remote, ["a"], batch_size=0)
    assert not server.batches


def test_too_few_embeddings_are_an_error(server, remote):
    server.failures = [(200, {"data": [{"index": 0, "embedding": [0.5, 0.5]}]})]
    with pytest.raises(RuntimeError, match="gave 1 embeddings for 2 inputs"):
        embed(remote, ["a", "b"])


@pytest.mark.parametrize("width", [1, 2])
def test_embeddings_of_another_width_are_an_error(server, local, remote, width):
    of_a = embed(local, ["a"])[0].tolist()
    message = rf"gave embeddings of {width} and 32 numbers, but those of one model .* Check what it serves"
    server.failures = [(200, {"data": [{"index": 0, "embedding": of_a}, {"index": 1, "embedding": of_a[:width]}]})]
    with pytest.raises(RuntimeError, match=message) as raised:
        embed(remote, ["a", "b"])
    assert not isinstance(raised.value, PartlyEmbeddedError)
    server.failures = [(200, {"data": [{"index": 0, "embedding": row}]}) for row in (of_a, of_a[:width])]
    with pytest.raises(PartlyEmbeddedError, match=message) as raised:
        embed(remote, ["a", "b"], batch_size=1)
    assert np.abs(raised.value.embeddings[0] - of_a).max() < 1e-6
    assert np.isnan(raised.value.embeddings[1]).all()


def test_what_is_refused_is_named_by_its_file_as_for_a_local_model(server, remote, tmp_path):
    inputs = [{"image": tmp_path / "missing.png"}, "b" * (LONGEST + 1)]
    with pytest.raises(UnreadableInputsError, match=r"input 0 \(.*missing\.png\): .*; input 1 \(bbb.*\): the server"):
        embed(remote, inputs)


def test_where_nothing_was_embedded_the_rows_have_their_width(server, local):
    for options in ({}, {"truncate_dim": 8}):
        remote = RemoteEncoder(server.url, **options)
        width = options.get("truncate_dim", local.get_embedding_dimension())
        with pytest.raises(UnreadableInputsError) as raised:
            embed_images(remote, ["missing.png", "gone.png"])
        assert raised.value.embeddings.shape == (2, width)
        assert embed(remote, []).shape == (0, width)
