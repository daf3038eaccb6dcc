"""A store in a folder: what survives damage, killed processes, other processes, and what forgetting leaves."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import slq_embed.store.folder as entries_in_a_folder
from slq_embed import PrefixStore
from tests.forks import forked, needs_fork
from tests.unit.prefix.rows import file_of, fill, flip, kept, key, row


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened."""
    paths: list[Path] = []
    monkeypatch.setattr(
        entries_in_a_folder, "safe_open", lambda path, *rest: paths.append(path) or safe_open(path, *rest)
    )
    return paths


def test_a_folder_is_used_again(tmp_path):
    first = PrefixStore(tmp_path)
    fill(first, range(3))
    first.close()
    again = PrefixStore(tmp_path)
    assert kept(again, range(3)) == {0, 1, 2}
    assert again.counts.reused == 3
    fill(again, [3, 4])
    assert len(PrefixStore(tmp_path)) == 5


def test_a_folder_is_found_from_another_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = PrefixStore("store")
    fill(store, range(2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store._entries.claim([key(2)]) == {key(2)}
    fill(store, [2])
    assert kept(store, range(3)) == {0, 1, 2}
    assert not list(Path().iterdir())


def test_two_open_stores_see_each_other(tmp_path):
    one, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    fill(one, range(2))
    assert kept(other, range(2)) == {0, 1}
    fill(other, [2, 3])
    assert set(one._entries.lengths([key(n) for n in range(4)])) == {key(n) for n in range(4)}
    other.forget([key(0)])
    fill(other, [4])
    assert kept(one, range(5)) == {1, 2, 3, 4}
    assert (len(one), one.nbytes) == (4, other.nbytes)


def test_each_use_opens_and_checks_an_entry_once(tmp_path, opened):
    store = PrefixStore(tmp_path)
    fill(store, range(3))
    for use in (1, 2):
        store._entries.lengths([key(n) for n in range(3)])
        assert kept(store, range(3)) == {0, 1, 2}
        assert len(opened) == 3 * use
    kept(store, range(3))
    assert len(opened) == 9
    kept(store, [7])
    assert len(opened) == 9


def test_few_entries_stay_open(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(entries_in_a_folder, "CHECKED_LIMIT", 2)
    store = PrefixStore(tmp_path)
    fill(store, range(5))
    store._entries.lengths([key(n) for n in range(5)])
    assert len(store._entries._checked) == 2
    assert kept(store, range(5)) == {0, 1, 2, 3, 4}
    assert len(opened) == 8


def test_what_is_forgotten_between_lookup_and_reading_is_not_read(tmp_path):
    """The entry that is open shows the zeros that forgetting has written."""
    one, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    fill(one, range(3))
    one._entries.lengths([key(n) for n in range(3)])
    other.forget([key(0), key(1)])
    fill(other, [1])
    assert kept(one, range(3)) == {1, 2}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "swap"])
def test_damage_is_noticed_and_mended(tmp_path, damage):
    store = PrefixStore(tmp_path)
    fill(store, range(5))
    path = file_of(tmp_path, 2)
    content = path.read_bytes()
    if damage == "flip":
        flip(path, len(content) // 2)
    elif damage in ("truncate", "empty"):
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    elif damage == "remove":
        path.unlink()
    else:  # a whole entry, but of another key
        path.write_bytes(file_of(tmp_path, 3).read_bytes())
    assert set(store._entries.lengths([key(n) for n in range(5)])) == {key(n) for n in (0, 1, 3, 4)}
    assert store.counts.damaged == (damage != "remove")
    assert len(store) == 4
    assert kept(store, range(5)) == {0, 1, 3, 4}
    fill(store, range(5))
    assert kept(PrefixStore(tmp_path), range(5)) == {0, 1, 2, 3, 4}


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    store = PrefixStore(tmp_path)
    fill(store, [0])
    path = file_of(tmp_path, 0)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    harmless = 0
    for position in [*range(header), *range(header, len(content), 37)]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        flip(path, position, bit=position % 8)
        harmless += bool(kept(store, [0]))  # what reads back is what was written
    assert harmless <= header // 20, "some spaces of the header may become other white space"
    assert store.counts.damaged > header


def test_a_damaged_entry_is_overwritten_too(tmp_path):
    store = PrefixStore(tmp_path / "store")
    fill(store, [1])
    os.link(file_of(store.folder, 1), tmp_path / "link")
    flip(tmp_path / "link", 500)
    assert kept(store, [1]) == set()
    assert not any((tmp_path / "link").read_bytes())


def test_forgotten_bytes_are_gone_from_the_disk(tmp_path):
    store = PrefixStore(tmp_path / "store")
    fill(store, range(3))
    secret = row(1).layers[0][0].numpy().tobytes()
    os.link(file_of(store.folder, 1), tmp_path / "link")  # the same bytes under a name that stays
    assert secret in (tmp_path / "link").read_bytes()
    assert store.forget([key(1)]) == 1
    size = (tmp_path / "link").stat().st_size
    assert (tmp_path / "link").read_bytes() == bytes(size) != b""
    files = [file for file in store.folder.rglob("*") if file.is_file()]
    assert not any(secret in file.read_bytes() for file in files)
    assert not list(store.folder.rglob("*.part"))


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = PrefixStore(tmp_path)

    def fail(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            fill(store, [0])
    assert len(store) == 0
    assert not list(tmp_path.rglob("*.part"))
    fill(store, [0])
    assert kept(store, [0]) == {0}


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch, caplog):
    """What other programs write counts in no budget."""
    store, write = PrefixStore(tmp_path), Path.write_bytes

    def write_half(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(store, [0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        entries = store._entries
        assert entries.claim([key(1), key(2)]) == {key(1), key(2)}
        fill(store, [1, 2])
        entries.release([key(1), key(2)])
        assert entries.full
    assert caplog.text.count("No space is left in") == 1
    assert not list(tmp_path.rglob("*.part"))
    assert kept(store, range(3)) == {0}
    store.forget([key(0)])
    fill(store, [1])
    assert kept(store, range(3)) == {1}


def test_another_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied")

    entries = PrefixStore(tmp_path)._entries
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(PermissionError):
        entries.claim([key(1)])


def _write_half(folder, half_written):
    """Stop between writing and renaming."""
    Path.replace = lambda *args: (half_written.set(), time.sleep(600))  # type: ignore[assignment]
    fill(PrefixStore(folder), [1])


def _erase_half(folder, half_written):
    """Stop between renaming and overwriting."""
    entries_in_a_folder._overwrite_and_remove = lambda *args: (half_written.set(), time.sleep(600))
    PrefixStore(folder).forget([key(1)])


@needs_fork
@pytest.mark.parametrize("work", [_write_half, _erase_half])
def test_what_a_killed_process_left_is_overwritten_by_the_next_forget(tmp_path, work):
    store = PrefixStore(tmp_path / "store")
    fill(store, [0, 2] if work is _write_half else [0, 1, 2])
    half_written = multiprocessing.get_context("fork").Event()
    with forked(work, store.folder, half_written) as process:
        assert half_written.wait(60)
        (unfinished,) = store.folder.rglob("*.part")
        os.link(unfinished, tmp_path / "link")
        secret = row(1).layers[0][0].numpy().tobytes()
        assert secret in unfinished.read_bytes()
        assert kept(store, range(3)) == {0, 2}
        store.forget([])
        assert secret in unfinished.read_bytes(), "its process lives, and may yet finish"
        process.kill()
        process.join()
        assert kept(store, range(3)) == {0, 2}
        store.forget([])
    assert not any((tmp_path / "link").read_bytes())
    assert not unfinished.exists()
    assert kept(PrefixStore(store.folder), range(3)) == {0, 2}


def _write_on(folder):
    store, number = PrefixStore(folder, budget="1GB"), 0
    while True:
        fill(store, range(number, number + 3))
        number += 3


@needs_fork
def test_a_killed_writer_leaves_nothing_that_reads_back_wrong(tmp_path):
    store, total = PrefixStore(tmp_path), 0
    for turn in range(6):
        with forked(_write_on, tmp_path) as process:
            while len(store) < total + 5:
                assert process.is_alive()
                time.sleep(0.003 * turn + 0.001)
            process.kill()
        before, total = total, len(store)
        assert total > before
        assert kept(store, range(total)) == set(range(total))
    assert store.counts.damaged == 0


def test_a_store_can_be_pickled(tmp_path):
    store = PrefixStore(tmp_path, level="vision", precision="int8", budget=10**9)
    fill(store, range(2))
    store._entries.claim([key(5)])
    store._entries.lengths([key(0)])
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.folder, copy.level, copy.precision, copy.budget) == (tmp_path, "vision", "int8", 10**9)
    assert copy._entries.claim([key(5), key(6)]) == {key(6)}
    assert len(copy._entries.read([key(0), key(1)])) == copy.counts.reused == 2
    memory = PrefixStore()
    fill(memory, range(2))
    assert kept(pickle.loads(pickle.dumps(memory)), range(3)) == {0, 1}
