"""What the search index refuses: the message says what came, what is needed, and what to do; nothing is added."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slq_embed import SLQEncoder, pretrained
from slq_embed.encoding.protocol import encoder_digest
from slq_embed.index import EmbeddingIndex, image_files
from slq_embed.index.records import IndexRecords
from tests.integration.test_index import filled, names, vectors


def test_what_cannot_be_stored_is_refused_whole():
    index = filled(count=500)
    for ids, metadata in ((["a", "b"], [{"n": 1}, {"n": {1, 2}}]), (["a", "caf\udce9"], None)):
        with pytest.raises(ValueError, match="cannot be stored"):
            index.add_embeddings(vectors(2, seed=3), ids, metadata)
        assert (len(index), len(index._table.vectors), "a" in index) == (500, 500, False)
    index.add_embeddings(vectors(2, seed=3), ["a", "b"])
    assert index.search_embeddings(vectors(1, seed=3), 1)[0][0].id == "a"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EmbeddingIndex(), "needs a model, or the dimension"),
        (lambda: EmbeddingIndex(dimension=0), "dimension is 0, but at least 1"),
        (lambda: EmbeddingIndex(torch.nn.Linear(2, 2)), "is a Linear, but an SLQEncoder is needed"),
        (lambda: EmbeddingIndex(dimension=32, factory="Nonsense"), "no index of the type 'Nonsense'"),
        (lambda: EmbeddingIndex(dimension=32, search_parameters="nprobe=4"), "'Flat' has no 'nprobe=4'"),
        (lambda: EmbeddingIndex(dimension=32).add(["a"]), "has no model"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(2, dimension=8), ["a", "b"]), r"\(n, 32\)"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(np.full((1, 32), np.nan), ["a"]), "not finite"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(3), "abc"), "ids is the str 'abc'"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(1), ["a"], {"n": 1}), "metadata is one dict"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(2), ["a"]), "2 embeddings, but 1 ids"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(2), ["a", "a"]), "'a' was given twice"),
        (lambda: filled(count=500).add_embeddings(vectors(2), ["x", "n3"]), r"already: \['n3'\]"),
        (lambda: EmbeddingIndex.load("nowhere"), "holds no index"),
        (lambda: filled(count=500).search_embeddings(vectors(1), 0), "k is 0"),
        (lambda: filled(count=500).add_embeddings(vectors(1), ["x"], ["ab"]), "is a str, but a dict"),
        (lambda: filled(count=500).add_embeddings(vectors(1), ["x"], [{"y": np.nan}]), "{'y': nan} cannot be stored"),
        (lambda: filled(count=500).add_embeddings(vectors(1), ["x"], [{"y": [np.inf]}]), "{'y': \\[inf\\]} cannot be"),
        (lambda: filled(count=500).search_embeddings(vectors(1), where="x"), "where is 'x', but a dict"),
        (lambda: image_files("nowhere"), "no folder 'nowhere'"),
        (lambda: EmbeddingIndex(dimension=32, factory="HNSW16,PQ4"), "distances only"),
        (lambda: EmbeddingIndex(dimension=32, factory="IDMap,Flat"), "leave IDMap out"),
        (lambda: EmbeddingIndex(dimension=32, factory="L2norm,Flat"), "no index of the type 'L2norm,Flat'"),
        (lambda: EmbeddingIndex(dimension=32, factory="IVF16,RaBitQ"), "IVF16,RaBitQ,RFlat"),
        (lambda: EmbeddingIndex(dimension=32, factory="IVF16,PQ8x4fs"), "IVF16,PQ8x4fs,RFlat"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"slq-embed\[faiss\]"):
        EmbeddingIndex(dimension=4)


@pytest.fixture(scope="module")
def model():
    return SLQEncoder(pretrained("slq-tiny"), device="cpu")


@pytest.mark.parametrize("part", ["image", "video"])
def test_another_size_of_images_or_videos_is_another_model(checkpoint, encoder, part, tmp_path):
    """Else embeddings of both sizes would stand in one index, or in one file."""
    index = EmbeddingIndex(encoder)
    index.add(["a"], ["a"])
    encoder.encode_to_file(["a"], tmp_path / "a.npy")
    other = SLQEncoder.from_backbone(
        checkpoint(), num_queries=4, seed=0, device="cpu", max_pixels=1024 if part == "image" else None
    )
    if part == "video":
        other.processor.video_processor.size["longest_edge"] = 2048
    index.model = other
    with pytest.raises(ValueError, match="made with another model"):
        index.search("a")
    with pytest.raises(ValueError, match="begun with another model"):
        other.encode_to_file(["a"], tmp_path / "a.npy")


def test_sizes_of_videos_matter_to_a_model_that_reads_videos_only(encoder, monkeypatch):
    monkeypatch.setattr(type(encoder.transformer.reader), "reads_videos", False)
    before = encoder_digest(encoder)
    encoder.processor.video_processor.size["longest_edge"] = 2048
    assert encoder_digest(encoder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "inputs is a NoneType"),
        ((None, ["a"]), "inputs is a NoneType"),
        ((b"an image file",), "inputs is a bytes"),
        ((["x", "y"], "ab"), "ids is the str 'ab', but the inputs are a list"),
        ((["x"], ["a"], {"n": 1}), "metadata is one dict, but the inputs are a list"),
        ((["x", "y"], ["a", "a"]), "The id 'a' was given twice"),
        ((["x", "y"], ["a", "b"], [{}]), "one of them ends at index 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_is_added(model, arguments, message):
    index = EmbeddingIndex(model)
    with pytest.raises(ValueError, match=message):
        index.add(*arguments, batch_size=1)
    assert index.ids() == []


def test_an_id_that_is_there_is_refused_before_its_input_is_embedded(model, monkeypatch):
    index = EmbeddingIndex(model)
    index.add("a red circle", "x")
    monkeypatch.setattr(type(model.transformer), "forward", lambda *_: pytest.fail("the input was embedded"))
    with pytest.raises(ValueError, match=r"in the index already: \['x'\]"):
        index.add("two blue stars", "x")


def test_a_dimension_that_is_not_the_models_is_refused(model):
    assert EmbeddingIndex(model, dimension=192).dimension == 192
    with pytest.raises(ValueError, match="dimension 64, but this model's embeddings have 192 numbers"):
        EmbeddingIndex(model, dimension=64)


def test_an_id_that_was_given_twice_is_found_in_one_pass():
    """Counting each id took 49 s for 40,000 ids, and hours for a million."""

    class Ids(list):
        def count(self, id_):
            pytest.fail("all ids are gone through for each of them")

    with pytest.raises(ValueError, match="The id 'n7' was given twice"):
        IndexRecords().check(Ids([*names(0, 10), "n7"]), new=True)


def test_the_row_that_is_not_finite_is_named():
    rows = vectors(4)
    rows[2, 3] = np.inf
    with pytest.raises(ValueError, match=r"1 of 4 embeddings .* the first has index 2\."):
        EmbeddingIndex(dimension=32).add_embeddings(rows, list("abcd"))


def test_search_parameters_hold_from_then_on_and_are_checked(monkeypatch):
    monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 500)
    index = filled("IVF16,Flat", "nprobe=1")
    few = index.search_embeddings(vectors(20, seed=1), 5)
    index.search_parameters = "nprobe=16"
    all_clusters = index.search_embeddings(vectors(20, seed=1), 5)
    exact = filled().search_embeddings(vectors(20, seed=1), 5)
    assert [[hit.id for hit in line] for line in all_clusters] == [[hit.id for hit in line] for line in exact]
    assert few != all_clusters
    for refusing in (index, EmbeddingIndex(dimension=32, factory="IVF16,Flat")):
        with pytest.raises(ValueError, match="has no 'efSearch=4'"):
            refusing.search_parameters = "efSearch=4"
    assert index.search_parameters == "nprobe=16"
    refusing.search_parameters = "nprobe=4"
    assert (refusing.search_parameters, "exact for now" in repr(refusing)) == ("nprobe=4", True)


def test_a_damaged_save_is_named(tmp_path):
    filled(count=500).save(tmp_path)
    (files,) = tmp_path.glob("v-*")
    (files / "embeddings.faiss").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"is damaged .* Restore {files.name}"):
        EmbeddingIndex.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[1]", "{}", '{"format_version": "1", "version": "v"}', '{"format_version": 1, "version": 5}']
)
def test_a_file_of_another_program_is_no_index(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="is not of a search index"):
        EmbeddingIndex.load(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    filled(count=500).save(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"format_version": 2}))
    with pytest.raises(ValueError, match=r"has format 2, but this slq-embed reads up to 1\. Upgrade"):
        EmbeddingIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (None, "queries is a NoneType, but a list is needed"),
        (5, "queries is a int"),
        (b"an image file", r'queries is a bytes.*\{"image": data\}'),
        (
            vectors(2, dimension=192),
            "array in float32, but texts or images are needed. For embeddings, use search_embeddings",
        ),
        (torch.zeros(192), "use search_embeddings"),
    ],
)
def test_queries_that_are_none_are_refused(model, queries, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingIndex(model).search(queries)


def test_a_chat_is_one_input(model):
    index = EmbeddingIndex(model)
    chat = [{"role": "system", "content": "Look."}, {"role": "user", "content": "a red circle"}]
    index.add(chat, "x")
    assert [hit.id for hit in index.search(chat)] == ["x"]


@pytest.mark.parametrize(
    ("given", "left"), [(2, ["a/b", "c", "d"]), (Path("a/b"), ["2", "c", "d"]), (["c", "d"], ["2", "a/b"])]
)
def test_one_id_is_deleted_in_the_form_in_which_it_was_given(given, left):
    index = EmbeddingIndex(dimension=32)
    index.add_embeddings(vectors(4), [2, Path("a/b"), "c", "d"])
    assert index.delete(given) == 4 - len(left)
    assert sorted(index.ids()) == left


def test_photos_that_pillow_cannot_read_are_named(model, tmp_path):
    """Phones write HEIC. Such a photo must not be left out without a word."""
    (tmp_path / "phone.HEIC").write_bytes(b"ftypheic")
    (tmp_path / "notes.txt").write_text("no image")
    assert [row.name for row in EmbeddingIndex(model).add(image_files(tmp_path))] == [
        f"input 0 ({tmp_path}/phone.HEIC)"
    ]


def test_inputs_are_not_added_with_another_document_prompt(encoder, tmp_path):
    encoder.prompts["document"] = "A document."
    index = EmbeddingIndex(encoder)
    index.add(["a", "b"], ["a", "b"])
    index.save(tmp_path)
    encoder.prompts["document"] = "Something else."
    encoder.prompts["query"] = "A query."  # of no matter for what is there
    for one in (index, EmbeddingIndex.load(tmp_path, encoder)):
        with pytest.raises(
            ValueError, match=r"document prompt 'A document\.', and the model now has 'Something else\.'"
        ):
            one.add(["c"], ["c"])
        assert one.search(["a"])
        assert len(one) == 2
    encoder.prompts["document"] = "A document."
    index.add(["c"], ["c"])
    about = json.loads((tmp_path / "index.json").read_text())
    assert about.pop("document_prompt") == "A document."
    (tmp_path / "index.json").write_text(json.dumps(about))  # as saved before prompts were recorded
    encoder.prompts["document"] = "Something else."
    EmbeddingIndex.load(tmp_path, encoder).add(["c"], ["c"])
