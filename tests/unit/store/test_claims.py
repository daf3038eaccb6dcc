"""Claims: each prefix of a shared folder is computed by one process, and those of a dead process are free again."""

from __future__ import annotations

import multiprocessing
import threading
import time

from slq_embed import PrefixStore
from tests.forks import forked, needs_fork
from tests.unit.prefix.rows import fill, kept, key


def wait(entries, keys):
    """Wait, but not for ever."""
    waiting = threading.Thread(target=entries.wait, args=(keys,), daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_key_is_claimed_by_one_store_until_it_is_released(tmp_path):
    one, other = PrefixStore(tmp_path)._entries, PrefixStore(tmp_path)._entries
    assert one.claim([key(0), key(1)]) == {key(0), key(1)}
    assert one.claim([key(1), key(2)]) == {key(1), key(2)}
    assert other.claim([key(0), key(3)]) == {key(3)}
    one.release([key(0)])
    assert other.claim([key(0), key(1), key(2)]) == {key(0)}
    one.close()
    assert other.claim([key(1), key(2)]) == {key(1), key(2)}
    assert one.claim([key(1), key(4)]) == {key(4)}  # with another name, after it was closed


def test_waiting_ends_when_the_other_has_written(tmp_path):
    one, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    assert one._entries.claim([key(0)]) == {key(0)}
    assert other._entries.claim([key(0)]) == set()
    threading.Timer(0.2, lambda: fill(one, [0])).start()
    started = time.monotonic()
    wait(other._entries, [key(0), key(1)])
    assert 0.1 < time.monotonic() - started < 20
    assert kept(other, [0]) == {0}


def test_waiting_ends_when_the_other_has_given_up(tmp_path):
    one, other = PrefixStore(tmp_path)._entries, PrefixStore(tmp_path)._entries
    one.claim([key(0)])
    threading.Timer(0.2, lambda: one.release([key(0)])).start()
    wait(other, [key(0)])
    assert other.claim([key(0)]) == {key(0)}


def _claim_and_sleep(folder, claimed):
    store = PrefixStore(folder)
    store._entries.claim([key(1), key(2)])
    claimed.set()
    time.sleep(600)


@needs_fork
def test_what_a_dead_process_claimed_is_free_again(tmp_path):
    entries = PrefixStore(tmp_path)._entries
    claimed = multiprocessing.get_context("fork").Event()
    with forked(_claim_and_sleep, tmp_path, claimed) as process:
        assert claimed.wait(60)
        assert entries.claim([key(1), key(3)]) == {key(3)}
        threading.Timer(0.3, process.kill).start()
        started = time.monotonic()
        wait(entries, [key(1)])
        assert 0.2 < time.monotonic() - started < 20
        assert entries.claim([key(1), key(2)]) == {key(1), key(2)}
    entries.close()
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["all.lock"]


def _claim_as_a_child(entries, results):
    results.put((sorted(entries.claim([key(0), key(1)])), sorted(entries.lengths([key(7)]))))
    entries.close()


@needs_fork
def test_a_forked_child_is_another_owner(tmp_path):
    store = PrefixStore(tmp_path)
    fill(store, [7])
    assert store._entries.claim([key(0)]) == {key(0)}
    results = multiprocessing.get_context("fork").SimpleQueue()
    with forked(_claim_as_a_child, store._entries, results) as process:
        assert results.get() == ([key(1)], [key(7)])
        process.join(60)
    assert PrefixStore(tmp_path)._entries.claim([key(0), key(1)]) == {key(1)}, "the parent holds its claim still"


def _claim_all(folder, start, results):
    entries = PrefixStore(folder)._entries
    start.wait()
    claimed = [number for number in range(40) if entries.claim([key(number)])]
    results.put(claimed)
    start.wait()  # a process that ends frees its claims


@needs_fork
def test_processes_that_claim_at_once_share_the_keys_out(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.SimpleQueue()
    with (
        forked(_claim_all, tmp_path, start, results),
        forked(_claim_all, tmp_path, start, results),
        forked(_claim_all, tmp_path, start, results),
    ):
        shares = [results.get() for _ in range(3)]
        assert sorted(number for share in shares for number in share) == list(range(40))
