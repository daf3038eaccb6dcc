"""Prefixes to keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from slq_embed import PrefixStore
from slq_embed.prefix.packing import pack_row, unpack_row
from slq_embed.prefix.passes import PrefixRow

BUDGET = 10**12


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def row(number: int, length: int | None = None) -> PrefixRow:
    generator = torch.Generator().manual_seed(number)
    shape = (2, 5 + number if length is None else length, 4)
    layers = tuple((torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(3))
    return PrefixRow(layers, shape[1] - 1, 3)


def fill(store: PrefixStore, numbers: Iterable[int]) -> int:
    """Write prefixes as a source does; returns how many did not fit."""
    return store._entries.write({key(n): pack_row(row(n), store.precision) for n in numbers}, store.budget)


def kept(store: PrefixStore, numbers: Iterable[int]) -> set[int]:
    """Numbers of the prefixes that read back; they are those that were written."""
    entries = {n: store._entries.read([key(n)]) for n in numbers}
    for n, entry in entries.items():
        if entry:
            back, expected = unpack_row(entry[key(n)], torch.float32, torch.device("cpu")), row(n)
            assert (back.last_position, back.axes) == (expected.last_position, expected.axes)
            for layer, expected_layer in zip(back.layers, expected.layers, strict=True):
                assert torch.equal(layer[0], expected_layer[0])
                assert torch.equal(layer[1], expected_layer[1])
    return {n for n, entry in entries.items() if entry}


def file_of(folder: Path, number: int) -> Path:
    return folder / key(number)[:1].hex() / f"{key(number).hex()}.safetensors"


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change a bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))
