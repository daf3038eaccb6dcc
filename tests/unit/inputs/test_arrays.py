"""Arrays and tensors as images: the same pictures as plain Sentence Transformers sees in them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder, pretrained
from slq_embed.inputs import read_image
from slq_embed.inputs.rows import read_row

RGB = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("array", "image"),
    [
        (RGB, Image.fromarray(RGB)),
        (torch.from_numpy(RGB), Image.fromarray(RGB)),
        (torch.from_numpy(RGB).permute(2, 0, 1), Image.fromarray(RGB)),
        (RGB.transpose(2, 0, 1), Image.fromarray(RGB)),
        (RGB[..., 0], Image.fromarray(RGB[..., 0])),
        (RGB[..., :1], Image.fromarray(RGB[..., 0])),
        (torch.from_numpy(RGB)[None, ..., 0], Image.fromarray(RGB[..., 0])),
        (RGB[::2, ::-1], Image.fromarray(RGB[::2, ::-1])),
        (np.dstack([RGB, RGB[..., 0]]), Image.fromarray(np.dstack([RGB, RGB[..., 0]]))),
    ],
    ids=["hwc", "tensor", "chw-tensor", "chw", "hw", "hw1", "1hw", "strided", "rgba"],
)
def test_an_array_is_the_picture_that_it_holds(array, image):
    expected = read_image(image)
    row = read_row(array)
    for picture in (row.pictures[0], read_row({"image": array, "text": "t"}).pictures[0]):
        assert np.array_equal(picture.image, expected)
        assert picture.digest() == read_row(image).pictures[0].digest()
    assert row.size > 0, "batches are of like size"


def test_plain_sentence_transformers_sees_the_same():
    ours, plain = (kind(pretrained("slq-tiny"), device="cpu") for kind in (SLQEncoder, SentenceTransformer))
    narrow = RGB[:3]  # by the host's rule, 3 channels of 40 x 3 pixels
    for array in (RGB, RGB.transpose(2, 0, 1), narrow):
        for value in (array, torch.tensor(array), {"image": array}):
            assert np.abs(ours.encode(value) - plain.encode(value)).max() < 1e-5
    assert ours.encode([RGB, "a text"]).shape == (2, 192)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RGB / 255.0, r"of shape (30, 40, 3) in float64, but .* (array * 255)"),
        (torch.rand(3, 8, 8, dtype=torch.bfloat16), "in bfloat16"),
        (np.stack([RGB, RGB]), "of shape (2, 30, 40, 3) in uint8, but .* list(array)"),
        (np.zeros(192, np.uint8), "of shape (192,)"),
        (RGB[..., :2], "of shape (30, 40, 2)"),
        (RGB[:0], "0 pixels"),
    ],
    ids=["floats", "bfloat16", "several", "line", "two-channels", "nothing"],
)
def test_other_arrays_are_refused(array, message):
    row = read_row(array)
    assert row.size >= 0
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\ \.\*\ ", ".*")):
        _ = row.pictures[0].image
