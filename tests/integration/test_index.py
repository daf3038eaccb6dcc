"""The search index: every kind finds what exact search finds, survives crashes, and refuses what does not belong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import slq_embed.index as index_module
from slq_embed import SLQEncoder, pretrained
from slq_embed.data.scene_text import captions
from slq_embed.data.scenes import render, sample_scenes
from slq_embed.index import EmbeddingIndex, Hit, image_files

ROOT = str(Path(__file__).parents[2])
KINDS = [
    ("Flat", "", 1.0),
    ("IVF16,Flat", "nprobe=16", 1.0),
    ("IVF16,Flat", "nprobe=4", 0.6),
    ("HNSW32,Flat", "efSearch=128", 0.95),
    ("SQ8", "", 0.9),
    ("SQ4,RFlat", "k_factor_rf=8", 0.98),
    ("IVF16,SQ8,RFlat", "nprobe=16,k_factor_rf=4", 0.98),
]


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
    found = index.search_embeddings(queries, k)
    assert all(len(line) == k for line in found)
    for line in found:
        assert all(alive[hit.metadata["n"]] for hit in line)
        assert [hit.score for hit in line] == sorted((hit.score for hit in line), reverse=True)
    hits = [{hit.metadata["n"] for hit in line} for line in found]
    return float(np.mean([len(h & set(e.tolist())) / k for h, e in zip(hits, exact, strict=True)]))


@pytest.mark.parametrize(("factory", "parameters", "least"), KINDS)
def test_every_kind_finds_deletes_and_comes_back(factory, parameters, least, tmp_path):
    index = filled(factory, parameters)
    alive = np.ones(2000, bool)
    assert recall(index, alive) >= least
    gone = random.Random(0).sample(range(2000), 300)
    alive[gone] = False
    assert index.delete([f"n{n}" for n in gone] + ["never"]) == 300
    assert index._index.ntotal == 2000
    assert recall(index, alive) >= least
    index.save(tmp_path / "index")
    for mmap in (True, False):
        again = EmbeddingIndex.load(tmp_path / "index", mmap=mmap)
        assert len(again) == 1700
        assert recall(again, alive) >= least
    before = again.search_embeddings(vectors(50, seed=1), 10)
    again.compact()
    assert again._index.ntotal == 1700
    if not factory.startswith("HNSW"):  # a new graph may find others
        assert again.search_embeddings(vectors(50, seed=1), 10) == before
    again.delete(names(0, 500))
    assert again._index.ntotal == len(again) < 1300, "much was deleted, so it was compacted"
    alive[:500] = False
    assert recall(again, alive) >= least
    again.add_embeddings(vectors(2000)[gone], [f"n{n}" for n in gone], [{"n": n} for n in gone])
    alive[gone] = True
    assert recall(again, alive) >= least


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


def test_a_mapped_index_can_change_and_be_saved_in_place(tmp_path):
    filled(count=1000).save(tmp_path)
    index = EmbeddingIndex.load(tmp_path)
    assert index.delete(["n3"]) == 1
    index.save(tmp_path)
    assert "n3" not in index
    assert "n4" in index
    index.add_embeddings(vectors(1, seed=5), ["new"], [{"n": -1}])
    assert index.search_embeddings(vectors(1, seed=5), 1)[0][0] == Hit("new", pytest.approx(1.0), {"n": -1})
    index.save(tmp_path)
    assert len(list(tmp_path.glob("v-*"))) == 1
    assert len(EmbeddingIndex.load(tmp_path)) == 1000


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
    found = index.search(texts, k=1)
    assert sum(line[0].metadata["path"].endswith(f"{n:02}.png") for n, line in enumerate(found)) >= 36
    assert index.search(files[5], k=2)[0].id == str(files[5])
    assert index.search(render(scenes[5], seed=5), k=1)[0].score == pytest.approx(1, abs=1e-5)
    assert len(index.search({"image": files[5], "text": "now in blue"}, k=3)) == 3
    index.add(texts, ids=[f"text {n}" for n in range(40)], metadata=[{"of": n} for n in range(40)])
    hit = next(hit for hit in index.search(files[5], k=10) if hit.id.startswith("text"))
    assert hit.metadata == {"of": 5}
    assert index.search([], k=3) == []
    with pytest.raises(ValueError, match="input 2 has none"):
        index.add(texts, ids=["one", "two"])
    index.add([{"image": files[0], "text": "in red"}], ids=["both"])
    index.save(tmp_path / "index")
    again = EmbeddingIndex.load(tmp_path / "index", model)
    assert [h.id for h in again.search(texts[3])] == [h.id for h in index.search(texts[3])]
    with pytest.raises(ValueError, match=r"'.*00\.png' is in the index already"):
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
    assert index._index.ntotal == 0, "it waits for more"
    assert (index.ids(), index.metadata("n7")) == (names(0, 500), {"n": 7})
    assert index.delete(["n3"]) == 1
    index.add_embeddings(vectors(1, seed=2), ["last"])
    index.save(tmp_path)
    for kept in (index, EmbeddingIndex.load(tmp_path)):
        assert kept.ids() == [*names(0, 3), *names(4, 500), "last"]
        assert (kept.metadata("n7"), kept.metadata("last")) == ({"n": 7}, {})
        with pytest.raises(KeyError, match="no id 'n3'"):
            kept.metadata("n3")


def test_what_cannot_be_stored_is_refused_whole():
    index = filled(count=500)
    for ids, metadata in ((["a", "b"], [{"n": 1}, {"n": {1, 2}}]), (["a", "caf\udce9"], None)):
        with pytest.raises(ValueError, match=r"cannot be stored|surrogates"):
            index.add_embeddings(vectors(2, seed=3), ids, metadata)
        assert (len(index), index._index.ntotal, "a" in index) == (500, 500, False)
    index.add_embeddings(vectors(2, seed=3), ["a", "b"])
    assert index.search_embeddings(vectors(1, seed=3), 1)[0][0].id == "a"


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
    monkeypatch.setattr(index_module, "TRAINING_EMBEDDINGS", 1000)
    index = EmbeddingIndex(dimension=32, factory="IVF16,Flat", search_parameters="nprobe=16")
    index.add_embeddings(vectors(2000)[:600], names(0, 600), [{"n": n} for n in range(600)])
    assert index._index.ntotal == 0
    assert len(index) == 600
    assert "n5" in index
    with pytest.raises(ValueError, match="in the index already"):
        index.add_embeddings(vectors(1), ["n5"])
    index.add_embeddings(vectors(2000)[600:], names(600, 2000), [{"n": n} for n in range(600, 2000)])
    assert index._index.ntotal == 2000
    assert recall(index, np.ones(2000, bool)) == 1


def test_a_gpu_is_asked_for_no_more_than_it_finds(monkeypatch):
    index, asked = filled(count=500), []

    class OnGpu:
        def search(self, rows, k):
            asked.append(k)
            return index._index.search(rows, k)

    monkeypatch.setattr(index_module, "has_gpu", lambda: True)
    monkeypatch.setattr(index_module, "copy_to_gpu", lambda *_: (OnGpu(), None))
    monkeypatch.setattr(index_module, "MOST_ON_GPU", 20)
    index.delete(names(0, 10))
    assert [len(index.search_embeddings(vectors(1), k)[0]) for k in (20, 30)] == [20, 30]
    assert asked == [20]


def test_too_few_to_learn_from_are_kept_exactly(tmp_path, caplog):
    index = EmbeddingIndex(dimension=32, factory="IVF16,Flat", search_parameters="nprobe=4")
    index.add_embeddings(vectors(10), names(0, 10), [{"n": n} for n in range(10)])
    index.save(tmp_path)
    assert "'IVF16,Flat' cannot learn from 10 embeddings" in caplog.text
    for kept in (index, EmbeddingIndex.load(tmp_path)):
        assert kept.factory == "Flat"
        assert [hits[0].id for hits in kept.search_embeddings(vectors(10), 1)] == names(0, 10)


def test_an_index_that_was_saved_anew_from_elsewhere_is_searched_but_not_changed(tmp_path):
    filled(count=500).save(tmp_path)
    here = EmbeddingIndex.load(tmp_path)
    EmbeddingIndex.load(tmp_path).save(tmp_path)
    assert here.search_embeddings(vectors(500)[:1], 1)[0][0].id == "n0"
    with pytest.raises(ValueError, match="saved anew from elsewhere: load it again"):
        here.add_embeddings(vectors(1, seed=2), ["last"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EmbeddingIndex(), "needs a model, or the dimension"),
        (lambda: EmbeddingIndex(dimension=32, factory="Nonsense"), "no index of 'Nonsense'"),
        (lambda: EmbeddingIndex(dimension=32, search_parameters="nprobe=4"), "'Flat' has no 'nprobe=4'"),
        (lambda: EmbeddingIndex(dimension=32).add(["a"]), "has no model"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(2, dimension=8), ["a", "b"]), r"\(n, 32\)"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(np.full((1, 32), np.nan), ["a"]), "finite"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(2), ["a"]), "2 embeddings, but 1 ids"),
        (lambda: EmbeddingIndex(dimension=32).add_embeddings(vectors(2), ["a", "a"]), "only 1 differ"),
        (lambda: filled(count=500).add_embeddings(vectors(2), ["x", "n3"]), r"already: \['n3'\]"),
        (lambda: EmbeddingIndex.load("nowhere"), "holds no index"),
        (lambda: filled(count=500).search_embeddings(vectors(1), 0), "k is 0"),
        (lambda: EmbeddingIndex(dimension=32, gpu=True, factory="Flat").search_embeddings(vectors(1)), None),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    if message is None:
        assert call() == [[]]
        return
    with pytest.raises(ValueError, match=message):
        call()


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"slq-embed\[faiss\]"):
        EmbeddingIndex(dimension=4)


def test_threads_share_an_index():
    index = filled(count=1000)
    expected = index.search_embeddings(vectors(20, seed=1), 5)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(index.search_embeddings, vectors(20, seed=1), 5) for _ in range(20)]
        added = [pool.submit(index.add_embeddings, -expected_row(n), [f"t{n}"]) for n in range(10)]
        for future in added:
            future.result()
    assert all(future.result() == expected for future in found)
    assert len(index) == 1010


def expected_row(number: int) -> np.ndarray:
    """The opposite of a query, which no search for it finds."""
    return vectors(20, seed=1).sum(axis=0, keepdims=True) * (1 + number)


SAVER = f"""
import sys
sys.path.insert(0, {ROOT!r})
from slq_embed.index import EmbeddingIndex
from tests.integration.test_index import names, vectors
index = EmbeddingIndex.load(sys.argv[1], mmap=False)
print("ready", flush=True)
number = len(index)
while True:
    index.add_embeddings(vectors(50, seed=number), names(number, number + 50))
    number += 50
    index.save(sys.argv[1])
"""


def test_a_killed_save_leaves_the_index_whole(tmp_path):
    filled(count=500).save(tmp_path)
    count = 500
    for turn in range(2):
        run = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.15 + 0.1 * turn)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        index = EmbeddingIndex.load(tmp_path)
        assert len(index) == index._index.ntotal >= count
        count = len(index)
        assert count % 50 == 0
        assert index.search_embeddings(vectors(500)[:1], 1)[0][0].id == "n0"
    assert count > 500
    index.save(tmp_path)
    assert len(list(tmp_path.glob("v-*"))) == 1, "what killed saves left is cleared"


def test_a_save_that_fails_in_the_middle_changes_nothing(tmp_path, monkeypatch):
    index = filled(count=500)
    index.save(tmp_path)
    index.add_embeddings(vectors(1, seed=3), ["new"])
    monkeypatch.setattr("slq_embed.index_records.IndexRecords.save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.save(tmp_path)
    assert len(EmbeddingIndex.load(tmp_path)) == 500


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
