"""The folder of a saved index: it survives crashes, and whoever else saves there."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import faiss
import pytest

from slq_embed.index import EmbeddingIndex, Hit
from tests.forks import forked, needs_fork
from tests.integration.test_index import filled, names, vectors


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


def test_search_parameters_that_faiss_does_not_write_come_back(tmp_path, monkeypatch):
    """FAISS keeps nprobe in its file, and forgets max_codes."""
    monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 500)
    filled("IVF16,Flat", "nprobe=4,max_codes=100", count=1000).save(tmp_path)
    index = EmbeddingIndex.load(tmp_path)
    for change in (lambda: None, lambda: index.add_embeddings(vectors(1, seed=3), ["new"])):  # mapped, then in memory
        change()
        clusters = faiss.downcast_index(index._table.vectors._index)
        assert (clusters.nprobe, clusters.max_codes) == (4, 100)


def test_the_format_stays(tmp_path):
    """What an earlier version saved is read by these names, and what is saved now by an earlier version."""
    filled("IVF16,Flat", "nprobe=4", count=500).save(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    (files,) = tmp_path.glob("v-*")
    assert about == {
        "format_version": 1,
        "version": files.name,
        "factory": "IVF16,Flat",
        "built": False,
        "search_parameters": "nprobe=4",
        "dimension": 32,
        "model": None,
        "model_name": None,
        "document_prompt": None,
    }
    assert sorted(file.name for file in files.iterdir()) == ["embeddings.faiss", "records.sqlite"]
    with sqlite3.connect(files / "records.sqlite") as database:
        assert database.execute("SELECT row, id, metadata FROM records WHERE row = 7").fetchall() == [
            (7, "n7", '{"n": 7}')
        ]
    assert type(faiss.read_index(str(files / "embeddings.faiss"))).__name__ == "IndexFlatIP"


def test_an_index_that_was_saved_anew_from_elsewhere_is_searched_but_not_changed(tmp_path, monkeypatch):
    filled(count=500).save(tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    mapped, whole = EmbeddingIndex.load("index"), EmbeddingIndex.load("index", mmap=False)
    monkeypatch.chdir(tmp_path.parent)
    other = EmbeddingIndex.load(tmp_path / "index")
    other.add_embeddings(vectors(1, seed=3), ["other's"])
    other.save(tmp_path / "index")
    for change in (lambda: mapped.add_embeddings(vectors(1, seed=2), ["last"]), lambda: mapped.delete(names(0, 400))):
        with pytest.raises(ValueError, match="saved anew from elsewhere: load it again"):
            change()
    assert mapped.ids() == names(0, 500)
    whole.delete(["n1"])
    for kept in (mapped, whole):
        assert kept.search_embeddings(vectors(500)[:1], 1)[0][0].id == "n0"
        with pytest.raises(ValueError, match="saving would undo that"):
            kept.save(tmp_path / "index")
    assert "other's" in EmbeddingIndex.load(tmp_path / "index")
    other.save(tmp_path / "index")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    whole.save(tmp_path / "elsewhere")
    whole.save(tmp_path / "link")
    assert "n1" not in EmbeddingIndex.load(tmp_path / "elsewhere")
    for way in ("index", "link", "elsewhere/../elsewhere"):
        EmbeddingIndex.load(tmp_path / way).save(tmp_path / way)
        with pytest.raises(ValueError, match="saving would undo that"):
            whole.save(tmp_path / way)


def test_saving_at_once_and_loading_meanwhile(tmp_path):
    def save(number):
        index = filled(count=500)
        index.save(tmp_path)
        return len(index)

    def load(number):
        return len(EmbeddingIndex.load(tmp_path))

    save(0)
    with ThreadPoolExecutor(6) as threads:
        lengths = [threads.submit(save if n % 4 else load, n) for n in range(60)]
        lengths += [threads.submit(load, n) for n in range(300)]
    assert {future.result() for future in lengths} == {500}


def test_saving_leaves_what_belongs_to_others(tmp_path):
    for folder in ("v-holidays", "v-0123456789ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "photo.png").write_text("mine")
    (tmp_path / "v-1.txt").write_text("mine")
    index = filled(count=500)
    index.save(tmp_path)
    index.save(tmp_path)
    assert len(list(tmp_path.rglob("photo.png"))) == 2
    assert len(list(tmp_path.glob("v-*"))) == 4
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").write_text("[1]")
    with pytest.raises(ValueError, match="Use another folder"):
        index.save(tmp_path / "other")
    assert (tmp_path / "other" / "index.json").read_text() == "[1]"


def _save_again_and_again(folder, ready):
    index = EmbeddingIndex.load(folder, mmap=False)
    ready.set()
    number = len(index)
    while True:
        index.add_embeddings(vectors(50, seed=number), names(number, number + 50))
        number += 50
        index.save(folder)


@needs_fork
def test_a_killed_save_leaves_the_index_whole(tmp_path):
    filled(count=500).save(tmp_path)
    count = 500
    for turn in range(2):
        ready = multiprocessing.get_context("fork").Event()
        with forked(_save_again_and_again, tmp_path, ready):
            assert ready.wait(60)
            time.sleep(0.15 + 0.1 * turn)
        index = EmbeddingIndex.load(tmp_path)
        assert len(index) == len(index._table.vectors) >= count
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
    monkeypatch.setattr("slq_embed.index.records.IndexRecords.save", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.save(tmp_path)
    assert len(EmbeddingIndex.load(tmp_path)) == 500
    assert len(list(tmp_path.glob("v-*"))) == 1, "what it has written does not take up the disk"


def _save_with_no_room_for_the_last_bytes(folder):
    import resource  # not on Windows

    index = EmbeddingIndex.load(folder)
    index.add_embeddings(vectors(500, seed=3), names(500, 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000 * 32 * 4, 1000 * 32 * 4)
    )  # the embeddings without the head of their file
    with pytest.raises(OSError, match="File too large"):
        index.save(folder)


@needs_fork
def test_a_save_whose_last_bytes_find_no_room_changes_nothing(tmp_path):
    """FAISS writes through a buffer, and what fails when the file is closed is not said."""
    filled(count=500).save(tmp_path)
    with forked(_save_with_no_room_for_the_last_bytes, tmp_path) as process:
        process.join(60)
        assert process.exitcode == 0
    assert len(EmbeddingIndex.load(tmp_path)) == 500
