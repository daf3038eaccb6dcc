from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from slq_embed.inputs.rows import read_row


def test_rows_are_texts_images_or_both(tmp_path):
    image = Image.new("RGB", (8, 6), "red")
    path = tmp_path / "a.png"
    image.save(path)
    assert read_row("a.png").image is None
    assert read_row(str(path)).image is None
    assert read_row(path).image.size == image.size
    assert read_row({"image": str(path)}).text is None
    both = read_row({"text": "t", "image": image})
    assert (both.text, both.image.size) == ("t", image.size)
    kinds = [part["type"] for part in both.messages("p")[1]["content"]]
    assert kinds == ["image", "text"]
    assert both.messages("p")[0]["role"] == "system"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"is a int\. Pass a str"),
        (None, "is a NoneType"),
        ({"label": 1}, "keys"),
        ({}, "keys"),
        ({"text": 5}, "'text' of an input is a int"),
        ({"text": None, "image": None}, "None only"),
        ({"image": 5}, "An image is a int"),
        ({"image": Path("gone.png")}, "no image file"),
    ],
)
def test_anything_else_gets_a_message_that_says_what_to_do(value, message):
    with pytest.raises(ValueError, match=message):
        _ = read_row(value).image
