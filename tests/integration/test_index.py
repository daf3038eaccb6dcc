"""The search index: every type finds what exact search finds, learns when there is enough, and forgets what was deleted."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch

from slq_embed.index import EmbeddingIndex, faiss_index, faiss_types, table

KINDS = [
    ("Flat", "", 1.0),
    ("IVF16,Flat", "nprobe=16", 1.0),
    ("IVF16,Flat", "nprobe=4", 0.6),
    ("HNSW32,Flat", "efSearch=128", 0.95),
    ("SQ8", "", 0.9),
    ("SQ4,RFlat", "k_factor_rf=8", 0.98),
    ("IVF16,SQ8,RFlat", "nprobe=16,k_factor_rf=4", 0.98),
]


@pytest.fixture(autouse=True)
def _fewer_are_enough(monkeypatch):
    monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 500)


def vectors(count: int, seed: int = 0, dimension: int = 32) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def names(start: int, stop: int) -> list[str]:
    return [f"n{number}" for number in range(start, stop)]


def filled(factory="Flat", parameters="", count=2000) -> EmbeddingIndex:
    index = EmbeddingIndex(dimension=32, factory=factory, search_parameters=parameters)
    for start in range(0, count, 500):
        rows = vectors(count)[start : start + 500]
        index.add_embeddings(rows, names(start, start + len(rows)), [{"n": start + n} for n in range(len(rows))])
    return index


def recall(index: EmbeddingIndex, alive: np.ndarray, k: int = 10) -> float:
    """Share of the exact neighbours among the rows that are alive which the index finds."""
    queries, rows = vectors(50, seed=1), vectors(2000)
    exact = np.where(alive, queries @ rows.T, -np.inf).argsort(axis=1)[:, ::-1][:, :k]
    results = index.search_embeddings(queries, k)
    assert all(len(line) == k for line in results)
    for line in results:
        assert all(alive[hit.metadata["n"]] for hit in line)
        assert [hit.score for hit in line] == sorted((hit.score for hit in line), reverse=True)
    hits = [{hit.metadata["n"] for hit in line} for line in results]
    return float(np.mean([len(h & set(e.tolist())) / k for h, e in zip(hits, exact, strict=True)]))


@pytest.mark.parametrize(("factory", "parameters", "least"), KINDS)
def test_every_kind_finds_deletes_and_comes_back(factory, parameters, least, tmp_path):
    index = filled(factory, parameters)
    alive = np.ones(2000, bool)
    assert recall(index, alive) >= least
    gone = random.Random(0).sample(range(2000), 300)
    alive[gone] = False
    assert index.delete([f"n{n}" for n in gone] + ["never"]) == 300
    assert len(index._table.vectors) == 2000
    assert recall(index, alive) >= least
    index.save(tmp_path / "index")
    for mmap in (True, False):
        again = EmbeddingIndex.load(tmp_path / "index", mmap=mmap)
        assert len(again) == 1700
        assert recall(again, alive) >= least
    before = again.search_embeddings(vectors(50, seed=1), 10)
    again.compact()
    assert len(again._table.vectors) == 1700
    if not factory.startswith("HNSW"):  # a new graph may find others
        assert again.search_embeddings(vectors(50, seed=1), 10) == before
    again.delete(names(0, 500))
    assert len(again._table.vectors) == len(again) < 1300, "much was deleted, so it was compacted"
    alive[:500] = False
    assert recall(again, alive) >= least
    again.add_embeddings(vectors(2000)[gone], [f"n{n}" for n in gone], [{"n": n} for n in gone])
    alive[gone] = True
    assert recall(again, alive) >= least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_of_any_precision_are_embeddings(dtype):
    index, rows = EmbeddingIndex(dimension=32), torch.from_numpy(vectors(8)).to(dtype).requires_grad_()
    before = rows.detach().clone()
    index.add_embeddings(rows, names(0, 8))
    assert [hits[0].id for hits in index.search_embeddings(rows, 1)] == names(0, 8)
    assert index.search_embeddings(rows[2], 1)[0][0].score == pytest.approx(1, abs=1e-5)
    assert torch.equal(rows, before)


def test_what_was_deleted_leaves_no_trace(tmp_path):
    index = filled(count=600)
    index.save(tmp_path)
    secret = vectors(600)[7].tobytes()
    index.add_embeddings(vectors(1, seed=9), ["secret-name"], [{"text": "secret-text"}])
    index.delete(["n7", "secret-name"])
    index.compact()
    index.save(tmp_path)
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    for trace in (secret, b"secret-name", b"secret-text", vectors(1, seed=9).tobytes()):
        assert not any(trace in content for content in files)
    assert any(vectors(600)[8].tobytes() in content for content in files)


def test_ids_and_metadata_are_listed(tmp_path):
    index = EmbeddingIndex(dimension=32, factory="IVF16,Flat")
    index.add_embeddings(vectors(500), names(0, 500), [{"n": n} for n in range(500)])
    assert (index.ids(), index.metadata("n7")) == (names(0, 500), {"n": 7})
    assert index.delete(["n3"]) == 1
    index.add_embeddings(vectors(1, seed=2), ["last"])
    index.save(tmp_path)
    for kept in (index, EmbeddingIndex.load(tmp_path)):
        assert kept.ids() == [*names(0, 3), *names(4, 500), "last"]
        assert (kept.metadata("n7"), kept.metadata("last")) == ({"n": 7}, {})
        with pytest.raises(KeyError, match="no id 'n3'"):
            kept.metadata("n3")


def test_types_that_learn_wait_for_enough(monkeypatch):
    monkeypatch.setattr(table, "LEARN_AT", 1000)
    index = EmbeddingIndex(dimension=32, factory="IVF16,Flat", search_parameters="nprobe=16")
    index.add_embeddings(vectors(2000)[:600], names(0, 600), [{"n": n} for n in range(600)])
    assert "exact for now" in repr(index)
    assert len(index) == 600
    assert "n5" in index
    with pytest.raises(ValueError, match="in the index already"):
        index.add_embeddings(vectors(1), ["n5"])
    index.add_embeddings(vectors(2000)[600:], names(600, 2000), [{"n": n} for n in range(600, 2000)])
    assert "exact for now" not in repr(index)
    assert recall(index, np.ones(2000, bool)) == 1


def test_a_gpu_is_asked_for_no_more_than_it_finds(monkeypatch):
    index, asked = filled(count=500), []

    class OnGpu:
        def __init__(self, index):
            self.copy = faiss.clone_index(index)

        def search(self, rows, k):
            asked.append(k)
            return self.copy.search(rows, k)

    monkeypatch.setattr(faiss_index, "has_gpu", lambda: True)
    monkeypatch.setattr(faiss_index, "copy_to_gpu", lambda index, *_: (OnGpu(index), None))
    monkeypatch.setattr(faiss_index, "MOST_ON_GPU", 20)
    index.delete(names(0, 10))
    assert [len(index.search_embeddings(vectors(1), k)[0]) for k in (20, 30)] == [20, 30]
    assert asked == [20]
    index.add_embeddings(vectors(1, seed=7), ["new"])
    assert index.search_embeddings(vectors(1, seed=7), 1)[0][0].id == "new", "the copy is made anew"
    index.delete(["new"])
    assert index.search_embeddings(vectors(1, seed=7), 1)[0][0].id != "new"


def test_a_gpu_that_was_asked_for_is_not_left_out_without_a_word(monkeypatch):
    def no_gpu_form(*_):
        raise RuntimeError("no GPU form")

    monkeypatch.setattr(faiss_index, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match="gpu=True needs faiss-gpu and a GPU"):
        EmbeddingIndex(dimension=32, gpu=True)
    monkeypatch.setattr(faiss_index, "has_gpu", lambda: True)
    monkeypatch.setattr(faiss_index, "copy_to_gpu", no_gpu_form)
    asked, by_default = EmbeddingIndex(dimension=32, gpu=True), EmbeddingIndex(dimension=32)
    for index in (asked, by_default):
        index.add_embeddings(vectors(2), ["a", "b"])
    with pytest.raises(RuntimeError, match="no GPU form"):
        asked.search_embeddings(vectors(1), 1)
    assert by_default.search_embeddings(vectors(2)[:1], 1)[0][0].id == "a"


@pytest.mark.parametrize(
    ("factory", "parameters", "few"), [("IVF16,Flat", "nprobe=16", 600), ("PQ8x4", "", 10), ("SQ8", "", 1)]
)
def test_too_few_to_learn_from_are_kept_exactly_until_there_are_enough(factory, parameters, few, tmp_path, monkeypatch):
    if factory == "PQ8x4":  # whose 16 values a byte FAISS itself asks for
        monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 5)
    index = EmbeddingIndex(dimension=32, factory=factory, search_parameters=parameters)
    index.add_embeddings(vectors(2000)[:few], names(0, few), [{"n": n} for n in range(few)])
    index.add_embeddings(vectors(2, seed=8), ["gone", "stays"], [{"n": 9999}, {"n": 9999}])
    index.delete(["gone", "nothing"])
    index.save(tmp_path)
    for kept in (index, EmbeddingIndex.load(tmp_path)):
        assert "exact for now" in repr(kept)
        kept.delete(["stays"])
        results = kept.search_embeddings(vectors(2000)[:few], 1)
        assert [hits[0].id for hits in results] == names(0, few)
        kept.add_embeddings(vectors(2000)[few:], names(few, 2000), [{"n": n} for n in range(few, 2000)])
        assert recall(kept, np.ones(2000, bool)) > {"IVF16,Flat": 0.99, "PQ8x4": 0.2, "SQ8": 0.9}[factory]
        assert "exact for now" not in repr(kept)
        assert (kept.ids(), kept.metadata("n10")) == (names(0, 2000), {"n": 10})


def test_what_was_too_few_to_learn_from_is_not_tried_again(monkeypatch):
    monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 5)
    index, attempts = EmbeddingIndex(dimension=32, factory="PQ8x4"), []
    monkeypatch.setattr(
        faiss_index, "make_faiss_index", lambda *a: attempts.append(a) or faiss_types.make_faiss_index(*a)
    )
    for number in (10, 11):
        index.add_embeddings(vectors(number - len(index), seed=number), names(len(index), number))
        for _ in range(3):
            index.search_embeddings(vectors(1), 1)
    assert len(attempts) == 2, "one for each number of embeddings"


@pytest.mark.parametrize("factory", ["PCA16,IVF4,Flat", "IVF4,RaBitQ,RFlat", "IVF4,PQ8x4fs,RFlat", "OPQ8,IVF4,PQ8x4"])
def test_any_type_forgets_what_was_deleted(factory):
    index = filled(factory, "nprobe=4")
    index.search_embeddings(vectors(1), 1)
    assert index.delete(names(0, 1500)) == 1500
    assert len(index._table.vectors) == len(index) == 500
    assert index.search_embeddings(vectors(2000)[1700:1701], 5)[0][0].id == "n1700"


def test_threads_share_an_index():
    index = filled(count=1000)
    expected = index.search_embeddings(vectors(20, seed=1), 5)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(index.search_embeddings, vectors(20, seed=1), 5) for _ in range(20)]
        added = [pool.submit(index.add_embeddings, -expected_row(n), [f"t{n}"]) for n in range(10)]
        for future in added:
            future.result()
    assert all(future.result() == expected for future in results)
    assert len(index) == 1010


def expected_row(number: int) -> np.ndarray:
    """The opposite of a query, which no search for it finds."""
    return vectors(20, seed=1).sum(axis=0, keepdims=True) * (1 + number)


def test_the_nearest_may_all_be_deleted():
    index = filled(count=2000)
    query = vectors(1, seed=1)
    order = (query @ vectors(2000).T)[0].argsort()[::-1]
    index.delete([f"n{n}" for n in order[:200]])
    assert [hit.id for hit in index.search_embeddings(query, 3)[0]] == [f"n{n}" for n in order[200:203]]
