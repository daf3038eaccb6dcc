"""A file of embeddings: what a killed run, a full disk or a copy that was cut off leaves is never taken for embeddings."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import slq_embed.encoding.to_file as to_file

INPUTS = ["a", "b", "c"]


class _Killed(BaseException):
    """No code goes on after a kill."""


@pytest.mark.parametrize("removed", ["e.npy", "e.progress.npy", "e.progress.json"])
def test_a_run_that_was_killed_while_it_began_anew_begins_again(encoder, tmp_path, monkeypatch, removed):
    """It had made new files beside a record of the run before, which said that all rows are there."""
    expected = encoder.encode_to_file(INPUTS, tmp_path / "e.npy").embeddings.copy()
    open_memmap, write_text = to_file.open_memmap, Path.write_text

    def write_half(path, text, *args):
        write_text(path, text[:9], *args)
        raise _Killed

    for opened in range(3):
        (tmp_path / removed).unlink(missing_ok=opened > 0)
        calls = iter(range(opened))

        def open_some(*args, calls=calls, **options):
            if next(calls, None) is None:
                raise _Killed
            return open_memmap(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(to_file, "open_memmap", open_some)
            patch.setattr(Path, "write_text", write_half)
            with pytest.raises(_Killed):
                encoder.encode_to_file(INPUTS, tmp_path / "e.npy")
        result = encoder.encode_to_file(INPUTS, tmp_path / "e.npy")
        assert result.encoded == 3
        assert np.abs(result.embeddings - expected).max() < 1e-6


@pytest.mark.parametrize("inputs", [[], range(0)], ids=["list", "other"])
def test_nothing_is_a_file_without_rows(encoder, tmp_path, inputs):
    assert encoder.encode_to_file(inputs, tmp_path / "e.npy").embeddings.shape == (0, 32)


@pytest.mark.parametrize("name", ["e.npy", "e.progress.npy", "e.progress.json"])
@pytest.mark.parametrize("part", [0.0, 0.6])
def test_a_file_that_was_cut_off_is_refused(encoder, tmp_path, name, part):
    """NumPy would fill up the embeddings with zeros."""
    encoder.encode_to_file(INPUTS, tmp_path / "e.npy")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"e\.npy was begun, but a file is damaged .* or remove it together with"):
        encoder.encode_to_file(INPUTS, tmp_path / "e.npy")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_a_full_disk_is_an_error_before_anything_is_encoded(encoder, tmp_path, monkeypatch):
    """A mapped page that finds no room would end the process by a signal."""

    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(encoder, "forward", None)
        with pytest.raises(OSError, match="No space left"):
            encoder.encode_to_file(INPUTS, tmp_path / "e.npy")
    assert encoder.encode_to_file(INPUTS, tmp_path / "e.npy").encoded == 3


def test_the_result_is_found_from_another_working_folder(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = encoder.encode_to_file(INPUTS, "e.npy")
    monkeypatch.chdir(tmp_path.parent)
    assert len(result.embeddings) == 3
