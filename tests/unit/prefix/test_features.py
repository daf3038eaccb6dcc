"""Features of images and videos: one object beside the rows of a batch, cut where a pass is laid out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from slq_embed.prefix.features import MediaFeatures, lay_out, make_room, select_rows

PIXELS, SIZES = torch.arange(6), torch.tensor([[1], [2]])
MEDIA = MediaFeatures(
    {"pixel_values": PIXELS, "image_sizes": SIZES}, {"pixel_values": [4, 0, 2], "image_sizes": [1, 0, 1]}
)
BATCH = {
    "input_ids": torch.tensor([[1, 2], [0, 3], [4, 5]]),
    "attention_mask": torch.tensor([[1, 1], [0, 1], [1, 1]]),
    "media": MEDIA,
    "media_row": torch.arange(3),
}


@pytest.mark.parametrize(
    ("rows", "pixels", "pieces"),
    [
        ([0, 1, 2], [0, 1, 2, 3, 4, 5], [4, 0, 2]),
        ([2, 0], [4, 5, 0, 1, 2, 3], [2, 4]),
        ([1, 2, 2], [4, 5, 4, 5], [0, 2, 2]),
    ],
)
def test_rows_have_their_own_pieces_in_their_order(rows, pixels, pieces):
    laid_out = lay_out(select_rows(BATCH, rows))
    assert laid_out["pixel_values"].tolist() == pixels
    assert laid_out["media_pieces"]["pixel_values"] == pieces
    assert not {"media", "media_row"} & laid_out.keys()


def test_rows_without_any_have_no_such_features():
    assert lay_out(select_rows(BATCH, [1])).keys() == {"input_ids", "attention_mask", "media_pieces"}
    assert lay_out(select_rows(BATCH, [1]))["input_ids"].tolist() == [[3]]


def test_rows_that_are_stored_stand_between_the_others():
    joined = make_room(BATCH, [3, None, None, 1, None], pad_token=0)
    assert joined["media_row"].tolist() == [-1, 0, 1, -1, 2]
    assert lay_out(select_rows(joined, [0, 1]))["pixel_values"].tolist() == [0, 1, 2, 3]
    assert lay_out(select_rows(joined, [4, 3]))["media_pieces"]["image_sizes"] == [1, 0]


def test_pieces_that_belong_to_no_row_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values has 6 pieces, but the rows of the batch have \[4, 0, 1\]"):
        MediaFeatures({"pixel_values": PIXELS}, {"pixel_values": [4, 0, 1]})


def test_a_data_loader_pins_them(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self + 10)
    pinned = pin_memory({"media": MEDIA})
    assert pinned["media"].values["pixel_values"].tolist() == list(range(10, 16))
    assert pinned["media"].pieces == MEDIA.pieces
