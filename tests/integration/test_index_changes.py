"""What is in the index is replaced by its id, and deleted by its metadata."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slq_embed.index import EmbeddingIndex, table


def rows(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def index() -> EmbeddingIndex:
    index = EmbeddingIndex(dimension=8)
    index.add_embeddings(rows(10), range(10), [{"n": n, "even": n % 2 == 0} for n in range(10)])
    return index


@pytest.mark.parametrize("where", ["memory", "file"])
def test_new_embeddings_take_the_place_of_those_with_their_ids(index: EmbeddingIndex, where: str, tmp_path: Path):
    if where == "file":
        index.save(tmp_path)
        index = EmbeddingIndex.load(tmp_path)
    new = rows(2, seed=1)
    index.add_embeddings(new, ["3", "new"], [{"n": 33}, {}], replace=True)
    assert (len(index), index.metadata("3"), sorted(index.ids())) == (
        11,
        {"n": 33},
        sorted([*map(str, range(10)), "new"]),
    )
    assert [hit.id for hit in index.search_embeddings(new, 1)[0]] == ["3"]
    assert index.search_embeddings(rows(10)[3:4], 11)[0][0].score < 0.99, "the old embedding is not found"
    index.save(tmp_path)
    again = EmbeddingIndex.load(tmp_path)
    assert (len(again), again.search_embeddings(new, 1)) == (11, index.search_embeddings(new, 1))


def test_nothing_is_left_of_what_was_replaced(index: EmbeddingIndex, tmp_path: Path):
    old = rows(1, seed=2)
    index.add_embeddings(old, ["x"], [{"text": "old-text"}])
    index.add_embeddings(rows(1, seed=3), ["x"], [{"text": "new-text"}], replace=True)
    index.compact()
    index.save(tmp_path)
    content = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert [trace in content for trace in (old.tobytes(), b"old-text", b"new-text")] == [False, False, True]


def test_an_index_that_is_replaced_again_and_again_does_not_grow(index: EmbeddingIndex):
    for seed in range(20):
        index.add_embeddings(rows(10, seed), range(10), replace=True)
        assert len(index) == 10
        assert len(index._table.vectors) <= 10 / (1 - table._MOST_DELETED)
    assert [hit.id for (hit,) in index.search_embeddings(rows(10, 19), 1)] == list(map(str, range(10)))


def test_without_replace_an_id_that_is_there_is_refused_and_nothing_changes(index: EmbeddingIndex):
    with pytest.raises(ValueError, match=r"in the index already: \['3'\]. .*replace=True"):
        index.add_embeddings(rows(2, seed=1), ["new", "3"])
    with pytest.raises(ValueError, match="'3' was given twice"):
        index.add_embeddings(rows(2, seed=1), ["3", "3"], replace=True)
    assert (len(index), "new" in index, index.metadata("3")["n"]) == (10, False, 3)


def test_inputs_take_the_place_of_those_with_their_ids(encoder, tmp_path: Path):
    index = EmbeddingIndex(encoder)
    index.add(["a red circle", "two blue stars"], ids=["a", "b"])
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    skipped = index.add(["a green heart", damaged, "one moon"], ids=["a", "b", "c"], replace=True)
    assert [row.index for row in skipped] == [1]
    assert (sorted(index.ids()), index.metadata("a"), index.metadata("b")) == (
        ["a", "b", "c"],
        {"text": "a green heart"},
        {"text": "two blue stars"},
    )
    found = index.search("a green heart", k=3)
    assert found[0].id == "a"
    assert found[0].score == pytest.approx(1, abs=1e-5)


def test_an_id_that_cannot_be_stored_is_refused_before_any_input_is_embedded(encoder, monkeypatch):
    index = EmbeddingIndex(encoder)
    monkeypatch.setattr(type(encoder.transformer), "forward", lambda *_: pytest.fail("an input was embedded"))
    with pytest.raises(ValueError, match="An id holds half a character"):
        index.add(["x"] * 70, [*range(69), "\ud800"], replace=True, batch_size=8)


def test_an_id_that_comes_twice_is_refused_however_far_apart(encoder):
    index = EmbeddingIndex(encoder)
    index.add("the first", "x")
    many = ["x", *(str(number) for number in range(80)), "x"]
    with pytest.raises(ValueError, match="'x' was given twice"):
        index.add((f"text {number}" for number in range(len(many))), many, replace=True, batch_size=1)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ({"even": True}, [1, 3, 5, 7, 9]),
        ({"n": {"$in": {2, 3, 11}}}, [0, 1, 4, 5, 6, 7, 8, 9]),
        ({"n": {"$gte": 1}}, [0]),
        ({"other": 1}, range(10)),
    ],
)
def test_what_fits_a_filter_is_deleted(index: EmbeddingIndex, where, left):
    assert index.delete(where=where) == 10 - len(left)
    assert index.ids() == list(map(str, left))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"where": {}},
        {"where": {"$and": []}},
        {"where": {"$and": [{}, {}]}},
        {"where": {"n": {}}},
        {"ids": ["1"], "where": {}},
        {"ids": ["1"], "where": {"n": 1}},
    ],
)
def test_it_must_be_said_what_to_delete(index: EmbeddingIndex, arguments):
    with pytest.raises(ValueError, match=r"Pass ids, or where=\.\.\., to say what to delete"):
        index.delete(**arguments)
    assert len(index) == 10
