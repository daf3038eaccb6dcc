"""A store in memory and in a folder: what both do, and what a caller sees."""

from __future__ import annotations

import pytest

from slq_embed import PrefixStore
from tests.unit.prefix.rows import file_of, fill, kept, key, row


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    store = PrefixStore(tmp_path / "prefixes" if request.param == "folder" else None)
    yield store
    store.close()


def test_what_was_written_is_read_back(store):
    fill(store, range(4))
    assert store._entries.lengths([key(n) for n in range(6)]) == {key(n): 5 + n for n in range(4)}
    assert kept(store, range(6)) == {0, 1, 2, 3}
    assert len(store) == store.counts.reused == 4
    assert store.nbytes >= sum(row(n).nbytes for n in range(4))
    fill(store, range(4))
    assert len(store) == 4


def test_forgetting_leaves_the_others(store):
    fill(store, range(4))
    nbytes = store.nbytes
    assert store.forget([key(1), key(1), key(2), key(9)]) == 2
    assert store.nbytes < nbytes
    assert set(store._entries.lengths([key(n) for n in range(4)])) == {key(0), key(3)}
    assert kept(store, range(4)) == {0, 3}
    fill(store, [1, 2])
    assert kept(store, range(4)) == {0, 1, 2, 3}
    assert (len(store), store.nbytes) == (4, nbytes)


def test_a_full_store_says_so_until_something_is_forgotten(store):
    fill(store, range(2))
    store.budget = store.nbytes + 1
    assert not store._entries.full
    assert fill(store, [5]) == 1
    assert store._entries.full
    store.forget([key(0)])
    assert not store._entries.full
    assert fill(store, [0]) == 0
    assert kept(store, range(6)) == {0, 1}


def test_the_budget_counts_what_another_store_has_written(tmp_path):
    one, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    assert fill(other, [0]) == 0
    fill(one, range(1, 5))
    assert other._entries._bytes < one.nbytes  # what its own last scan saw
    other._entries._next_scan = 0.0
    other.budget = one.nbytes
    assert fill(other, [7]) == 1
    assert len(one) == 5


def test_the_budget_counts_what_this_store_has_written_since_its_scan(tmp_path):
    store = PrefixStore(tmp_path)
    fill(store, [3])
    store._entries._next_scan = float("inf")
    store.budget = file_of(tmp_path, 3).stat().st_size + 100
    assert fill(store, [0]) == 1
    assert kept(store, [0, 3]) == {3}


def test_by_default_a_folder_may_grow_by_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("slq_embed.store.prefix_store.free_bytes", lambda folder: 1000)
    first = PrefixStore(tmp_path, budget="1GB")
    fill(first, range(3))
    assert PrefixStore(tmp_path).budget == first.nbytes + 1000


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = PrefixStore().budget
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert PrefixStore().budget < alone / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "many"}, "number of bytes"),
        ({"level": "logits"}, "'keys_values', 'vision'"),
        ({"precision": "fp4"}, "'exact', 'bfloat16', 'int8'"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixStore(**options)


def test_budgets_are_read(tmp_path):
    assert PrefixStore(budget="1.5 GB").budget == 1_500_000_000
    assert PrefixStore(budget=7).budget == 7
    assert PrefixStore().budget > 10**8
    assert PrefixStore(tmp_path / "not" / "there").budget > 10**8


def test_a_store_has_few_public_names():
    assert {name for name in dir(PrefixStore()) if not name.startswith("_")} == {
        *("folder", "budget", "level", "precision", "one_by_one"),
        *("nbytes", "counts", "forget", "close"),
    }


def test_an_empty_store_is_a_store(store):
    assert len(store) == 0
    assert store


@pytest.mark.parametrize(("limit", "free"), [("8000", 8000 - 5000 + 1000), ("max", None), ("4000", 0)])
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr("slq_embed.store.budget._CGROUP", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for name, text in (("max", limit), ("current", "5000"), ("stat", "anon 4000\ninactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert PrefixStore().budget == free // 2 if free is not None else PrefixStore().budget > 10**6
