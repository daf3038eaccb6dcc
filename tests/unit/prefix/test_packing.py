"""A prefix as a dict of tensors, and back."""

from __future__ import annotations

import pytest
import torch

from slq_embed.prefix.packing import (
    pack_row,
    pack_vision_row,
    unpack_row,
    unpack_vision_row,
)
from slq_embed.prefix.passes import PrefixRow
from slq_embed.store.entries import entry_length, entry_nbytes
from tests.unit.prefix.rows import row


def test_layers_of_different_shapes_cannot_be_kept():
    mixed = PrefixRow((*row(1).layers, row(1, 3).layers[0]), 4, 1)
    with pytest.raises(ValueError, match=r'Use PrefixStore\(level="vision"\), or no store'):
        pack_row(mixed, "exact")


def test_an_entry_shares_no_memory_with_its_row():
    original = row(3)
    entry = pack_row(original, "exact")
    original.layers[0][0].zero_()
    assert torch.equal(unpack_row(entry, torch.float32, torch.device("cpu")).layers[0][0], row(3).layers[0][0])
    assert entry_length(entry) == 8
    assert entry_nbytes(entry) == original.nbytes + 16


@pytest.mark.parametrize("precision", ["exact", "bfloat16", "int8"])
def test_an_entry_of_vision_features_shares_no_memory_with_its_batch(precision):
    batch = {"features": torch.ones(6, 4), "input_ids": torch.arange(6), "image_grid_thw": torch.ones(2, 3)}
    entry = pack_vision_row({name: part[:2] for name, part in batch.items()}, precision)
    for part in batch.values():
        part.zero_()
    back = unpack_vision_row(entry, torch.float32, torch.device("cpu"))
    assert {name: part.tolist() for name, part in back.items()} == {
        "features": [[1.0] * 4] * 2,
        "input_ids": [0, 1],
        "image_grid_thw": [[1.0] * 3] * 2,
    }
    assert entry_length(entry) == 2


@pytest.mark.parametrize("precision", ["exact", "bfloat16", "int8"])
def test_an_entry_can_be_written_whatever_the_layout(precision):
    """Some towers end in a transposition."""
    entry = pack_vision_row({"features": torch.ones(2, 4, 6).transpose(1, 2), "input_ids": torch.arange(6)}, precision)
    assert all(part.is_contiguous() for part in entry.values())


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_lower_precision_is_near(precision, error):
    expected = row(3)
    back = unpack_row(pack_row(expected, precision), torch.float32, torch.device("cpu"))
    difference = max(
        float((part.float() - exact).abs().max())
        for layers in zip(back.layers, expected.layers, strict=True)
        for part, exact in zip(*layers, strict=True)
    )
    assert 0 < difference < error
