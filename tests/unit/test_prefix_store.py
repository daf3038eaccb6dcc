"""The store itself: what survives a crash, damage, other processes."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import slq_embed.prefix.disk as prefix_disk
from slq_embed import PrefixStore
from slq_embed.prefix.passes import PrefixRow

ROOT = str(Path(__file__).parents[2])


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def row(number: int, length: int = 5) -> PrefixRow:
    generator = torch.Generator().manual_seed(number)
    layers = tuple(
        (torch.randn(2, length, 4, generator=generator), torch.randn(2, length, 4, generator=generator))
        for _ in range(3)
    )
    return PrefixRow(layers, length - 1, 3)


def fill(store: PrefixStore, count: int, start: int = 0) -> None:
    store.write({key(n): store.pack(row(n, 5 + n)) for n in range(start, start + count)})


def check(store: PrefixStore, numbers) -> None:
    """Everything that is read back is what was written."""
    found = store.read([key(n) for n in numbers])
    for n in numbers:
        if key(n) in found:
            back, expected = store.unpack(found[key(n)], torch.float32, torch.device("cpu")), row(n, 5 + n)
            assert (back.last_position, back.axes) == (expected.last_position, expected.axes)
            for got, wanted in zip(back.layers, expected.layers, strict=True):
                assert torch.equal(got[0], wanted[0])
                assert torch.equal(got[1], wanted[1])


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    made = PrefixStore(tmp_path / "prefixes" if request.param == "folder" else None)
    yield made
    made.close()


def test_what_was_written_is_read_back(store):
    fill(store, 4)
    assert store.lengths([key(n) for n in range(6)]) == {key(n): 5 + n for n in range(4)}
    check(store, range(4))
    assert len(store) == store.counts.reused == 4
    assert store.nbytes >= sum(row(n, 5 + n).nbytes for n in range(4))
    fill(store, 4)
    assert len(store) == 4


def test_forgetting_leaves_the_others(store):
    fill(store, 4)
    assert store.forget([key(1), key(2), key(9)]) == 2
    assert set(store.lengths([key(n) for n in range(4)])) == {key(0), key(3)}
    check(store, [0, 3])
    fill(store, 2, start=1)
    check(store, range(4))
    assert len(store) == 4


def test_forgotten_bytes_are_gone_from_the_disk(tmp_path):
    store = PrefixStore(tmp_path)
    fill(store, 3)
    secret = bytes(row(1, 6).layers[0][0].numpy().tobytes())
    files = [file for file in tmp_path.iterdir() if file.suffix == ".bin"]
    assert any(secret in file.read_bytes() for file in files)
    store.forget([key(1)])
    assert not any(secret in file.read_bytes() for file in files)


def test_what_a_killed_writer_left_is_gone_too(tmp_path):
    store = PrefixStore(tmp_path)
    fill(store, 3)
    (shard,) = tmp_path.glob("*.bin")
    with shard.open("ab") as file:  # appended, and killed before it was indexed
        file.write(b"secret" * 1000)
    orphan = tmp_path / "0.bin"
    orphan.write_bytes(b"secret" * 1_000_000)
    assert store.forget([key(1)]) == 1
    assert not any(b"secret" in file.read_bytes() for file in (shard, orphan))
    check(PrefixStore(tmp_path), [0, 2])
    assert len(store.read([key(0), key(2)])) == 2


def test_by_default_a_folder_may_grow_by_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("slq_embed.prefix.store.free_bytes", lambda folder: 1000)
    first = PrefixStore(tmp_path, budget="1GB")
    fill(first, 3)
    assert PrefixStore(tmp_path).budget == first.nbytes + 1000


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = PrefixStore().budget
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert PrefixStore().budget < alone / 4


def test_a_full_store_says_so_until_something_is_forgotten(store):
    fill(store, 2)
    store.budget = store.nbytes + 1
    assert not store.full
    assert store.write({key(5): store.pack(row(5))}) == 1
    assert store.full
    store.forget([key(0)])
    assert not store.full
    assert store.write({key(0): store.pack(row(0))}) == 0


def test_a_folder_is_found_again(tmp_path):
    first = PrefixStore(tmp_path)
    fill(first, 3)
    first.close()
    again = PrefixStore(tmp_path)
    check(again, range(3))
    assert again.counts.reused == 3
    fill(again, 2, start=3)
    assert len(PrefixStore(tmp_path)) == 5


def test_processes_that_open_a_folder_at_once_wait_for_each_other(tmp_path):
    """SQLite itself does not: of four processes at once, one in forty was told that the database is locked."""
    with FileLock(tmp_path / "opening.lock"):
        opened = []
        opening = threading.Thread(target=lambda: opened.append(len(PrefixStore(tmp_path))))
        opening.start()
        opening.join(0.5)
        assert not opened
    opening.join(60)
    assert opened == [0]


def test_two_open_stores_see_each_other(tmp_path):
    one, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    fill(one, 2)
    check(other, range(2))
    assert other.counts.reused == 2
    fill(other, 2, start=2)
    assert set(one.lengths([key(n) for n in range(4)])) == {key(n) for n in range(4)}
    other.forget([key(0)])
    fill(other, 1, start=4)
    assert set(one.lengths([key(n) for n in range(5)])) == {key(n) for n in range(1, 5)}
    check(one, range(1, 5))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_noticed_and_mended(tmp_path, damage):
    store = PrefixStore(tmp_path)
    fill(store, 5)
    store.close()
    (shard,) = tmp_path.glob("*.bin")
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[: len(content) // 2])
    else:
        shard.unlink()
    store = PrefixStore(tmp_path)
    left = store.lengths([key(n) for n in range(5)])
    assert {"flip": 4, "truncate": 2, "remove": 0}[damage] == len(left) == 5 - store.damaged
    check(store, range(5))
    fill(store, 5)
    assert len(store.lengths([key(n) for n in range(5)])) == 5
    check(PrefixStore(tmp_path), range(5))


def test_every_flipped_byte_is_noticed(tmp_path):
    store = PrefixStore(tmp_path / "whole")
    fill(store, 1)
    store.close()
    size = next((tmp_path / "whole").glob("*.bin")).stat().st_size
    for place in range(0, size, 37):
        folder = tmp_path / str(place)
        shutil.copytree(tmp_path / "whole", folder)
        shard = next(folder.glob("*.bin"))
        content = bytearray(shard.read_bytes())
        content[place] ^= 0x80
        shard.write_bytes(content)
        assert PrefixStore(folder).read([key(0)]) == {}, place


def test_a_changed_index_row_gives_no_wrong_prefix(tmp_path):
    store = PrefixStore(tmp_path)
    fill(store, 3)
    store.close()
    database = sqlite3.connect(tmp_path / "index.sqlite")
    database.execute("UPDATE entries SET key = ? WHERE key = ?", (key(7), key(1)))
    database.commit()
    database.close()
    store = PrefixStore(tmp_path)
    assert set(store.lengths([key(1), key(2), key(7)])) == {key(2)}


def test_a_ruined_index_starts_anew(tmp_path, caplog):
    store = PrefixStore(tmp_path)
    fill(store, 3)
    store.close()
    index = tmp_path / "index.sqlite"
    index.write_bytes(b"no database at all" + index.read_bytes()[18:])
    store = PrefixStore(tmp_path)
    assert "starting anew" in caplog.text
    assert len(store) == 0
    fill(store, 3)
    check(store, range(3))
    assert store.counts.reused == 3


WRITER = f"""
import sys
sys.path.insert(0, {ROOT!r})
from slq_embed import PrefixStore
from tests.unit.test_prefix_store import fill
store = PrefixStore(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    fill(store, 3, start=number)
    number += 3
"""


def test_a_killed_writer_leaves_nothing_that_reads_back_wrong(tmp_path):
    total = 0
    for turn in range(3):
        run = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.2 + 0.05 * turn)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        store = PrefixStore(tmp_path)
        assert len(store) >= total
        total = len(store)
        assert total > 0
        check(store, range(total))
        assert store.counts.reused == total
        assert store.damaged == 0
        store.close()


CLAIMER = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from slq_embed import PrefixStore
from tests.unit.test_prefix_store import key
store = PrefixStore(sys.argv[1])
assert store.claim([key(1), key(2)]) == {{key(1), key(2)}}
print("claimed", flush=True)
time.sleep(600)
"""


def test_what_a_dead_process_claimed_is_free_again(tmp_path):
    store = PrefixStore(tmp_path)
    run = subprocess.Popen([sys.executable, "-c", CLAIMER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "claimed\n"
    assert store.claim([key(1), key(3)]) == {key(3)}
    threading.Timer(0.3, run.kill).start()
    started = time.monotonic()
    store.wait([key(1)])
    assert 0.2 < time.monotonic() - started < 30
    assert store.claim([key(1), key(2)]) == {key(1), key(2)}


def test_waiting_ends_when_the_other_has_written(tmp_path):
    one, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    assert one.claim([key(0)]) == {key(0)}
    assert other.claim([key(0)]) == set()
    threading.Timer(0.2, lambda: (fill(one, 1), one.release([key(0)]))).start()
    other.wait([key(0)])
    check(other, [0])
    assert other.counts.reused == 1


def test_a_store_has_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_disk, "SHARD_BYTES", 2000)
    store = PrefixStore(tmp_path)
    for number in range(6):
        fill(store, 1, start=number)
    assert len(list(tmp_path.glob("*.bin"))) > 2
    check(PrefixStore(tmp_path), range(6))


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


def test_layers_of_different_shapes_cannot_be_kept():
    mixed = PrefixRow((*row(1).layers, row(1, 3).layers[0]), 4, 1)
    with pytest.raises(ValueError, match='level="vision"'):
        PrefixStore().pack(mixed)


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_lower_precision_is_near(precision, error):
    store = PrefixStore(precision=precision)
    wanted = row(3)
    back = store.unpack(store.pack(wanted), torch.float32, torch.device("cpu"))
    difference = max(
        float((got.float() - exact).abs().max())
        for layers in zip(back.layers, wanted.layers, strict=True)
        for got, exact in zip(*layers, strict=True)
    )
    assert 0 < difference < error
