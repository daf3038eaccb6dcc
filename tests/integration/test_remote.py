"""A model behind a server: the same vectors, rules and errors as for one that is loaded here."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
from langchain_slq import SLQEmbeddings
from llama_index.embeddings.slq import SLQEmbedding
from PIL import Image

from slq_embed import SLQEncoder
from slq_embed.remote import RemoteEncoder
from slq_embed.serving import UnreadableInputsError, compare, embed, embed_images
from tests.server import LONGEST, NAME, serving

PROMPTS = {"query": "find the picture", "document": ""}


@pytest.fixture(scope="module")
def local(checkpoint) -> SLQEncoder:
    return SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu", prompts=PROMPTS)


@pytest.fixture(scope="module")
def server(local):
    with serving(local) as running:
        yield running


@pytest.fixture(scope="module")
def remote(server) -> RemoteEncoder:
    return RemoteEncoder(server.url)


@pytest.fixture
def photo(tmp_path):
    """A file with an orientation and an alpha channel: both must be resolved before it is sent."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 4), np.uint8)
    image, exif = Image.fromarray(noise, "RGBA"), Image.Exif()
    exif[0x0112] = 6
    image.save(path := tmp_path / "photo.png", exif=exif)
    return path


def test_all_kinds_of_inputs_give_the_same_vectors(local, remote, photo):
    other = Image.new("RGB", (32, 20), "red")
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": other}]}]
    inputs = ["a red circle", "", {"image": photo, "text": "in blue"}, photo, {"images": [photo, other]}, chat]
    for options in (
        {},
        {"task": "query"},
        {"task": "document"},
        {"prompt": "another"},
        {"prompt": "", "task": "query"},
    ):
        expected = embed(local, inputs, **options)
        assert np.abs(embed(remote, inputs, batch_size=4, **options) - expected).max() < 1e-5, options
    assert np.abs(embed(local, inputs, task="query") - embed(local, inputs)).max() > 1e-3, "the prompt changes nothing"


@pytest.mark.parametrize("content", ["Look. ", [{"type": "text", "text": "Look. "}]], ids=["a str", "parts"])
def test_a_chat_with_its_own_system_message_gets_no_prompt(local, remote, content):
    asked = {"role": "user", "content": "a red circle"}
    chat = [{"role": "system", "content": content}, asked]
    expected = embed(local, [chat], prompt="")
    for options in ({}, {"task": "query"}, {"prompt": "another"}, {"prompt": "another", "task": "query"}):
        assert np.array_equal(embed(local, [chat], **options), expected), options
        assert np.abs(embed(remote, [chat], **options) - expected).max() < 1e-5, options
    assert np.abs(embed(local, [[asked]], prompt="") - expected).max() > 1e-3


def test_the_default_prompt_holds_where_no_task_is_named(checkpoint):
    prompts = {"query": "find the picture", "everything": "say it in one word"}
    local = SLQEncoder.from_backbone(
        checkpoint(), num_queries=4, seed=0, device="cpu", prompts=prompts, default_prompt_name="everything"
    )
    plain = embed(local, ["a red circle"], prompt="")
    with serving(local) as running:
        remote = RemoteEncoder(running.url)
        for options in ({}, {"task": "query"}, {"prompt": ""}, {"prompt": "", "task": "query"}, {"prompt": "b"}):
            expected = embed(local, ["a red circle"], **options)
            assert np.abs(embed(remote, ["a red circle"], **options) - expected).max() < 1e-5, options
            assert (np.abs(expected - plain).max() > 1e-3) == (options.get("prompt") != ""), options


def test_images_as_callers_name_them(local, remote, photo):
    sources = [str(photo), photo.read_bytes(), io.BytesIO(photo.read_bytes()), {"image": str(photo), "text": "in blue"}]
    expected = embed_images(local, sources, task="document")
    assert np.abs(embed_images(remote, sources, task="document") - expected).max() < 1e-5


def test_inputs_go_in_batches_as_chats(server, remote):
    server.batches.clear()
    embed(remote, ["a", "b", "c"], batch_size=2)
    assert server.batches == [2, 1]
    assert "input" not in server.bodies[-1], "raw strings get no template"


def test_what_cannot_be_read_is_named_and_the_rest_embedded(local, remote, photo, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    inputs = ["a", tmp_path / "broken.png", tmp_path / "missing.png", 3, photo]
    with pytest.raises(UnreadableInputsError) as here:
        embed(local, inputs)
    with pytest.raises(UnreadableInputsError) as there:
        embed(remote, inputs)
    assert str(there.value) == str(here.value)
    assert np.isnan(there.value.embeddings[[1, 2, 3]]).all()
    assert np.abs(there.value.embeddings - here.value.embeddings)[[0, 4]].max() < 1e-5


def test_what_the_server_refuses_costs_the_others_nothing(local, remote):
    with pytest.raises(
        UnreadableInputsError, match=r"input 1 \(b+\.\.\.\): the server refuses it: .* maximum context"
    ) as raised:
        embed(remote, ["a", "b" * (LONGEST + 1), "c"])
    assert np.abs(raised.value.embeddings[[0, 2]] - embed(local, ["a", "c"])).max() < 1e-5


def test_a_video_is_refused(remote):
    with pytest.raises(UnreadableInputsError, match="videos"):
        embed(remote, [{"video": np.zeros((4, 32, 32, 3), np.uint8)}])


def test_langchain(local, server, photo):
    here, there = SLQEmbeddings(model=local), SLQEmbeddings(base_url=server.url)
    pairs = [
        (here.embed_documents(["a", "b"]), there.embed_documents(["a", "b"])),
        ([here.embed_query("a")], [there.embed_query("a")]),
        (here.embed_image([str(photo)]), there.embed_image([str(photo)])),
        (
            here.embed_inputs([{"image": str(photo), "text": "in blue"}]),
            there.embed_inputs([{"image": str(photo), "text": "in blue"}]),
        ),
    ]
    for expected, found in pairs:
        assert np.abs(np.array(found) - expected).max() < 1e-5
    assert there.model_name == NAME
    assert there.embed_documents([]) == []
    for again in (pickle.loads(pickle.dumps(there)), copy.deepcopy(there), there.model_copy()):
        assert again.embed_query("a") == pairs[1][1][0]
    short = SLQEmbeddings(base_url=server.url, truncate_dim=8).embed_query("a")
    cut = np.array(pairs[1][0][0][:8])
    assert np.abs(np.array(short) - cut / np.linalg.norm(cut)).max() < 1e-5
    assert "secret" not in str(SLQEmbeddings(base_url=server.url, api_key="secret").model_dump())


def test_langchain_refuses_a_server_with_arguments_for_loading(local, server):
    with pytest.raises(ValueError, match="behind a server, so device and model_kwargs cannot"):
        SLQEmbeddings(base_url=server.url, device="cpu", model_kwargs={"revision": "main"})
    with pytest.raises(ValueError, match="behind a server, so an SLQEncoder cannot"):
        SLQEmbeddings(base_url=server.url, model=local)
    with pytest.raises(ValueError, match="There is no model"):
        SLQEmbeddings()


def test_llama_index(local, server, photo):
    here, there = SLQEmbedding(model=local), SLQEmbedding(base_url=server.url)
    pairs = [
        (here.get_query_embedding("a"), there.get_query_embedding("a")),
        (here.get_text_embedding("a"), there.get_text_embedding("a")),
        (here.get_image_embedding(str(photo)), there.get_image_embedding(str(photo))),
    ]
    for expected, found in pairs:
        assert np.abs(np.array(found) - expected).max() < 1e-5
    assert there.model_name == NAME
    restored = (pickle.loads(pickle.dumps(there)), copy.deepcopy(there), SLQEmbedding.from_dict(there.to_dict()))
    for again in restored:
        assert again.get_query_embedding("a") == pairs[0][1]
    assert "secret" not in str(SLQEmbedding(base_url=server.url, api_key="secret").to_dict())


def test_llama_index_refuses_a_server_with_arguments_for_loading(local, server):
    with pytest.raises(ValueError, match="behind a server, so device cannot"):
        SLQEmbedding(base_url=server.url, device="cpu")
    with pytest.raises(ValueError, match="behind a server, so model cannot"):
        SLQEmbedding(base_url=server.url, model=local)


def without_the_first(chat):
    """A chat without the first 1,500 characters of a long text."""
    *others, last = chat
    content = [
        {**part, "text": part["text"][1500:] or part["text"]} if "text" in part else part for part in last["content"]
    ]
    return [*others, {**last, "content": content}]


KINDS = ["text", "query", "document", "long text", "image", "image and text"]


def test_a_server_is_compared_with_its_model(local, server, remote, monkeypatch):
    monkeypatch.setattr("tests.server.LONGEST", 100_000)
    found = compare(remote, local)
    assert list(found) == KINDS
    assert all(difference < 1e-6 for difference in found.values())
    with monkeypatch.context() as changed:
        changed.setattr(server.model.queries, "data", server.model.queries.data + 0.01)
        assert min(compare(remote, local).values()) > 1e-5, "of each kind"
    with monkeypatch.context() as changed:
        read = server.model.encode
        changed.setattr(server.model, "encode", lambda chat, prompt: read(without_the_first(chat), prompt=prompt))
        assert compare(remote, local)["long text"] > 1e-3, "a server that loses a part of it"
    monkeypatch.setattr(RemoteEncoder, "_options", lambda self, *_: {"model": NAME, "encoding_format": "base64"})
    found = compare(remote, local)
    assert [kind for kind in KINDS if found[kind] > 1e-6] == ["query"], "a server without prompts"


def test_what_a_server_refuses_is_not_compared_and_the_reason_is_said(local, remote, caplog):
    found = compare(remote, local)
    assert [kind for kind in KINDS if np.isnan(found[kind])] == ["long text"]
    assert "maximum context length" in caplog.text


def test_another_width_is_another_model(checkpoint, remote, local, monkeypatch):
    head = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu", projection=8)
    with pytest.raises(ValueError, match="and the model of 8: it serves another model"):
        compare(remote, head)
    assert np.nanmax([*compare(RemoteEncoder(remote.base_url, truncate_dim=5), local).values()]) < 1e-6
    monkeypatch.setattr(local, "truncate_dim", 8)
    assert np.nanmax([*compare(remote, local).values()]) < 1e-6
    assert np.nanmax([*compare(RemoteEncoder(remote.base_url, truncate_dim=16), local).values()]) < 1e-6


def test_zeros_are_far_from_everything(local, server, remote, monkeypatch):
    monkeypatch.setattr(server.model, "encode", lambda chat, prompt: np.zeros(32, np.float32))
    assert compare(remote, local)["text"] == 1


def test_what_the_model_itself_refuses_is_not_compared(local, remote, caplog, monkeypatch):
    monkeypatch.setattr("tests.server.LONGEST", 100_000)

    def refuse_long(length: int) -> None:
        if length > 500:
            raise ValueError("too long")

    monkeypatch.setattr(local.transformer.reader, "_require_length", refuse_long)
    found = compare(remote, local)
    assert [kind for kind in KINDS if np.isnan(found[kind])] == ["long text"]
    assert "Not compared, long text" in caplog.text


def test_other_things_are_not_compared(local, remote):
    for arguments in ((local, remote), (remote, "folder"), (local, local)):
        with pytest.raises(ValueError, match="but a RemoteEncoder and the SLQEncoder that it serves are needed"):
            compare(*arguments)
