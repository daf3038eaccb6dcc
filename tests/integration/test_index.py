"""The search index: every kind finds what exact search finds, survives crashes, and refuses what does not belong."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from slq_embed import SLQEncoder, pretrained
from slq_embed.index import EmbeddingIndex, faiss_index, faiss_types, image_files, table
from slq_embed.toy import captions, render, sample_scenes

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


def test_images_texts_and_both_are_searched_by_each_other(tmp_path):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    scenes = sample_scenes(40, "test")
    for number, scene in enumerate(scenes):
        render(scene, seed=number).save(tmp_path / f"{number:02}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = image_files(tmp_path)
    assert len(files) == 41
    index = EmbeddingIndex(model)
    (skipped,) = index.add(files, batch_size=8, show_progress_bar=True)
    assert "broken.png" in skipped.name
    texts = [captions(scene)[0] for scene in scenes]
    results = index.search(texts, k=1)
    assert sum(line[0].metadata["path"].endswith(f"{n:02}.png") for n, line in enumerate(results)) >= 36
    assert index.search(files[5], k=2)[0].id == str(files[5])
    assert index.search(render(scenes[5], seed=5), k=1)[0].score == pytest.approx(1, abs=1e-5)
    assert len(index.search({"image": files[5], "text": "now in blue"}, k=3)) == 3
    index.add(texts, ids=[f"text {n}" for n in range(40)], metadata=[{"of": n} for n in range(40)])
    hit = next(hit for hit in index.search(files[5], k=10) if hit.id.startswith("text"))
    assert hit.metadata == {"of": 5}
    assert index.search([], k=3) == []
    with pytest.raises(ValueError, match="one of them ends at index 2"):
        index.add(texts, ids=["one", "two"])
    index.add([{"image": files[0], "text": "in red"}], ids=["both"])
    index.save(tmp_path / "index")
    again = EmbeddingIndex.load(tmp_path / "index", model)
    assert [h.id for h in again.search(texts[3])] == [h.id for h in index.search(texts[3])]
    with pytest.raises(ValueError, match=r"in the index already: \['.*00\.png'\]"):
        index.add(files[:1])
    other = model.with_queries(4, seed=9)
    with pytest.raises(ValueError, match="another model"):
        EmbeddingIndex.load(tmp_path / "index", other)
    model.truncate_dim = 16
    with pytest.raises(ValueError, match=r"dimension 192, but this model's embeddings have 16"):
        EmbeddingIndex.load(tmp_path / "index", model)


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


def test_file_names_need_not_be_unicode_and_folders_are_no_images(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    try:
        render(sample_scenes(1, "test")[0]).save(tmp_path / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes Unicode only")
    (file,) = image_files(tmp_path)
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    assert index.add([file]) == []
    (hit,) = index.search(file)
    assert hit.id.endswith("caf\\udce9.png")
    assert Path(hit.metadata["path"]) == file


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


def test_one_thing_is_one_thing_and_names_may_be_of_any_type():
    pandas = pytest.importorskip("pandas")
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    index.add("a red circle", [Path("a")], [{"n": 1}])
    index.add({"text": "two blue stars"}, iter([5]))
    index.add("a green square", "green", {"n": 2})
    assert index.metadata("green") == {"n": 2}
    assert index.delete("green") == 1
    assert (index.ids(), Path("a") in index, 5 in index) == (["a", "5"], True, True)
    assert index.delete("5a") == index.delete(np.array([7])) == 0
    assert index.delete("a") == index.delete(np.array([5])) == 1
    table = pandas.DataFrame({"text": ["a circle", "two stars", "a square"], "name": ["c", "t", "s"]}).iloc[[2, 0, 1]]
    index.add(table["text"], table["name"])
    for id_ in "cts":
        assert index.metadata(id_)["text"] == table.set_index("name")["text"][id_]
    assert index.search("two stars", k=np.int64(1))[0].id == "t"
    index.add_embeddings([], [])
    assert index.search_embeddings([]) == []


def test_another_model_is_refused_whatever_happened_in_between(tmp_path):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index = EmbeddingIndex(model)
    index.add_embeddings(model.encode(["a", "b"]), ["a", "b"])
    index.save(tmp_path)
    without = EmbeddingIndex.load(tmp_path)
    without.delete(["b"])
    without.save(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        EmbeddingIndex.load(tmp_path, model.with_queries(4, seed=9))
    with torch.no_grad():
        model.queries.add_(0.1)  # trained further
    for call in (lambda: index.add(["c"]), lambda: index.search("a"), lambda: EmbeddingIndex.load(tmp_path, model)):
        with pytest.raises(ValueError, match="another model"):
            call()
    index.delete(["a", "b"])
    assert index.add(["c"], ["c"]) == []
    assert index.search("c")[0].id == "c", "an empty index takes any model"


def test_a_search_meanwhile_does_not_forget_the_model(monkeypatch):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index, searching = EmbeddingIndex(model), threading.Event()

    length = table.IndexTable.__len__

    def slow(self):
        rows = length(self)
        if threading.current_thread() is not threading.main_thread():
            searching.set()
            time.sleep(0.5)
        return rows

    monkeypatch.setattr(table.IndexTable, "__len__", slow)
    other = threading.Thread(target=lambda: index.search("a red circle"))
    other.start()
    searching.wait()
    index.add(["a red circle"])
    other.join()
    assert index._identity.digest is not None


@pytest.mark.parametrize(
    ("prompts", "default"), [({"p": "find:"}, "p"), ({"query": "find:", "passage": "keep:"}, None), ({}, None)]
)
def test_prompts_are_those_of_the_host(prompts, default):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.prompts, model.default_prompt_name = prompts, default
    index = EmbeddingIndex(model)
    index.add(["a red circle"])
    (hit,) = index.search("one red circle")
    expected = model.encode_query("one red circle") @ model.encode_document("a red circle")
    assert hit.score == pytest.approx(float(expected), abs=1e-5)


def test_others_search_while_inputs_are_awaited():
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index, other, results = EmbeddingIndex(model), EmbeddingIndex(model), []
    other.add(["a red circle"], ["it"])

    def slow():
        yield "two blue stars"
        thread = threading.Thread(target=lambda: results.append(other.search("a red circle")[0].id), daemon=True)
        thread.start()
        thread.join(60)
        yield "a green square"

    index.add(slow())
    assert results == ["it"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    forward, sizes = type(model.transformer).forward, []

    def small(self, features, **kwargs):
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, features, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", small)
    index = EmbeddingIndex(model)
    index.add([f"{n} red circles" for n in range(6)], range(6), batch_size=4)
    assert sorted(index.ids()) == list("012345")
    with pytest.raises(ValueError, match="batch_size is 0"):
        index.add(["a"], batch_size=0)


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


def test_a_dataset_is_indexed_by_its_columns():
    datasets = pytest.importorskip("datasets")
    scenes = sample_scenes(6, "test")
    rows = {"image": [render(scene) for scene in scenes], "text": [captions(scene)[0] for scene in scenes]}
    dataset = datasets.Dataset.from_dict({**rows, "sku": [f"s{n}" for n in range(6)]})
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    assert index.add(dataset["image"], ids=dataset["sku"], metadata=dataset.select_columns(["text", "sku"])) == []
    hits = index.search(rows["text"], k=1)
    assert sum(line[0].metadata["text"] == text for line, text in zip(hits, rows["text"], strict=True)) >= 5
    assert hits[0][0].id == hits[0][0].metadata["sku"]
