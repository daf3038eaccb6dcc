"""Search among the embeddings whose metadata fit a filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

from slq_embed.index import EmbeddingIndex, faiss_index

COUNT, DIMENSION = 400, 16
METADATA: list[dict[str, Any]] = [
    {
        "number": n,
        "share": n / COUNT,
        "kind": "photo" if n % 2 else "page",
        "year": str(2000 + n % 30) if n % 7 == 0 else 2000 + n % 30,
        "tags": ["red", f"tag {n % 5}"],
        "nothing": None,
        **({"rare": n % 3 == 0} if n % 10 == 0 else {}),
        'a "strange".key': n % 4,
    }
    for n in range(COUNT)
]
FILTERS: list[tuple[dict[str, Any], Any]] = [
    ({}, lambda m: True),
    ({"kind": "photo"}, lambda m: m["kind"] == "photo"),
    ({"kind": "photo", "number": {"$lt": 60}}, lambda m: m["kind"] == "photo" and m["number"] < 60),
    ({"kind": {"$ne": "photo"}}, lambda m: m["kind"] != "photo"),
    ({"number": {"$gte": 10, "$lte": 20}}, lambda m: 10 <= m["number"] <= 20),
    ({"share": {"$gt": 0.25}}, lambda m: m["share"] > 0.25),
    ({"kind": {"$gte": "ph"}}, lambda m: m["kind"] >= "ph"),
    ({"year": {"$gt": 2020}}, lambda m: not isinstance(m["year"], str) and m["year"] > 2020),
    ({"year": {"$gt": "2020"}}, lambda m: isinstance(m["year"], str) and m["year"] > "2020"),
    ({"year": 2003}, lambda m: m["year"] == 2003),
    ({"number": {"$in": [1, 2, 3, 1000]}}, lambda m: m["number"] in (1, 2, 3)),
    ({"number": {"$nin": [1, 2, 3]}}, lambda m: m["number"] not in (1, 2, 3)),
    ({"number": {"$in": []}}, lambda m: False),
    ({"number": {"$nin": []}}, lambda m: True),
    ({"tags": {"$contains": "tag 3"}}, lambda m: "tag 3" in m["tags"]),
    ({"kind": {"$contains": "photo"}}, lambda m: False),
    ({"rare": True}, lambda m: m.get("rare") is True),
    ({"rare": {"$ne": True}}, lambda m: m.get("rare") is not True),
    ({"nothing": None, "missing": None}, lambda m: True),
    ({"missing": 1}, lambda m: False),
    ({"missing": {"$gt": 1}}, lambda m: False),
    ({'a "strange".key': 3}, lambda m: m['a "strange".key'] == 3),
    ({"number": 2**70}, lambda m: False),
    ({"$or": [{"number": 5}, {"kind": "page", "share": {"$lt": 0.1}}]}, lambda m: m["number"] == 5 or (m["kind"] == "page" and m["share"] < 0.1)),
    ({"$and": [{"number": {"$gt": 5}}, {"$or": [{"number": {"$lt": 9}}, {"rare": True}]}]}, lambda m: m["number"] > 5 and (m["number"] < 9 or m.get("rare") is True)),
    ({"$or": []}, lambda m: False),
    ({"$and": []}, lambda m: True),
    ({"number": {"$in": list(range(300, 5000))}}, lambda m: m["number"] >= 300),
    ({"number": {"$nin": list(range(300, 5000))}}, lambda m: m["number"] < 300),
    ({"$or": [{"number": n} for n in range(3000)]}, lambda m: True),
    ({"rare": {"$in": [None, False]}}, lambda m: not m.get("rare")),
    ({"rare": {"$nin": [None, False]}}, lambda m: m.get("rare")),
    ({"rare": {"$nin": [True]}}, lambda m: m.get("rare") is not True),
    ({"year": {"$in": [2003, "2014"]}}, lambda m: m["year"] in (2003, "2014")),
    ({"tags": '["red","tag 3"]'}, lambda m: False),
    ({"tags": {"$ne": '["red","tag 3"]'}}, lambda m: True),
]  # fmt: skip


@pytest.fixture(scope="module")
def vectors():
    rows = np.random.default_rng(0).normal(size=(COUNT, DIMENSION)).astype("float32")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def filled(vectors, factory="Flat", **options):
    index = EmbeddingIndex(factory=factory, dimension=DIMENSION, **options)
    index.add_embeddings(vectors, range(COUNT), METADATA)
    return index


def expected(vectors, queries, k, fits, left=range(COUNT)):
    allowed = [n for n in left if fits(METADATA[n])]
    scores = queries @ vectors[allowed].T if allowed else np.zeros((len(queries), 0))
    return [[str(allowed[n]) for n in row] for row in np.argsort(-scores, axis=1)[:, :k]]


@pytest.mark.parametrize("chunk", [65_536, 7])
@pytest.mark.parametrize(("where", "fits"), FILTERS, ids=[str(where)[:80] for where, _ in FILTERS])
def test_only_what_fits_is_found(vectors, where, fits, chunk, monkeypatch):
    monkeypatch.setattr(faiss_index, "_CHUNK", chunk)
    index, queries = filled(vectors), vectors[:3] + 0.1
    found = [[hit.id for hit in hits] for hits in index.search_embeddings(queries, 12, where=where)]
    assert found == expected(vectors, index._table.vectors.normalised(queries), 12, fits)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32,Flat", "IVF4,Flat", "SQ8,RFlat"])
@pytest.mark.parametrize(("where", "fits"), FILTERS[:3])
def test_all_types_and_deleted_rows(vectors, factory, where, fits, monkeypatch):
    monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 100)
    parameters = {"IVF4,Flat": "nprobe=4", "HNSW32,Flat": "efSearch=400", "SQ8,RFlat": "k_factor_rf=8"}.get(factory, "")
    index = filled(vectors, factory, search_parameters=parameters)
    index.delete(str(n) for n in range(0, COUNT, 9))
    left = [n for n in range(COUNT) if n % 9]
    found = [[hit.id for hit in hits] for hits in index.search_embeddings(vectors[:3], 12, where=where)]
    assert found == expected(vectors, vectors[:3], 12, fits, left)


def test_few_rows_are_scored_alone(vectors, monkeypatch):
    """An index that was asked for more and more hits would return nearly all of its rows."""
    index = filled(vectors)
    monkeypatch.setattr(index._table.vectors, "search", None)
    assert index.search_embeddings(vectors[:1], 1, where={"number": 17})[0][0].metadata["number"] == 17


def test_scores_are_those_of_a_plain_search(vectors):
    index = filled(vectors)
    plain = {hit.id: hit.score for hit in index.search_embeddings(vectors[:1], COUNT)[0]}
    for hit in index.search_embeddings(vectors[:1], 20, where={"number": {"$lt": 20}})[0]:
        assert hit.score == pytest.approx(plain[hit.id], abs=1e-6)


def test_a_saved_index(vectors, tmp_path):
    filled(vectors).save(tmp_path)
    hits = EmbeddingIndex.load(tmp_path).search_embeddings(vectors[:1], 3, where={"number": {"$in": [4, 5]}})[0]
    assert {hit.id for hit in hits} == {"4", "5"}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"kind": {"$like": "p"}}, r"operator '\$like', but one of"),
        ({"kind": {"$in": "photo"}}, "a list or a set is needed"),
        ({"number": {"$in": b"12"}}, "a list or a set is needed"),
        ({"kind": ["photo"]}, "compares with a list"),
        ({"kind": {"$gt": None}}, "a number or a str is needed"),
        ({"$or": {"kind": "photo"}}, "a list of dicts is needed"),
        ({"$not": {"kind": "photo"}}, "a metadata key"),
        ({"kind": {"$contains": {"a": 1}}}, "compares with a dict"),
        ({"kind": {"$in": ["a", ["b"]]}}, "compares with a list"),
        ({"number": float("nan")}, "a finite number is needed"),
        ({"number": {"$lt": 10**400}}, "a finite number is needed"),
    ],
)
def test_what_is_no_filter_is_named(vectors, where, message):
    with pytest.raises(ValueError, match=message):
        filled(vectors).search_embeddings(vectors[:1], 3, where=where)


def test_a_text_query_takes_a_filter(encoder):
    index = EmbeddingIndex(encoder)
    index.add(["a red circle", "a blue circle"], ["red", "blue"], [{"colour": "red"}, {"colour": "blue"}])
    assert [hit.id for hit in index.search("a red circle", where={"colour": "blue"})] == ["blue"]
    with pytest.raises(ValueError, match="operator"):
        index.search("a red circle", where={"colour": {"$is": "blue"}})
