"""What takes a list takes no single input apart."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.inputs.rows import is_one_input
from slq_embed.serving import embed, embed_images

CHAT = [{"role": "system", "content": "Look."}, {"role": "user", "content": "a red circle"}]
PICTURE = Image.new("RGB", (8, 8))
ONE = {
    "a str": "abc",
    "a path": Path("abc.png"),
    "a picture": PICTURE,
    "a dict": {"text": "abc", "image": PICTURE},
    "a chat": CHAT,
    "an array": np.asarray(PICTURE),
}
NONE = {"bytes": b"an image file", "a file": io.BytesIO(b"an image file"), "a number": 5, "nothing": None}
WAYS = {
    "encode_stream": lambda model, value, folder: model.encode_stream(value),
    "encode_to_file": lambda model, value, folder: model.encode_to_file(value, folder / "e.npy"),
    "forget": lambda model, value, folder: model.forget(value),
    "embed": lambda model, value, folder: embed(model, value),
    "embed_images": lambda model, value, folder: embed_images(model, value),
}


@pytest.fixture(scope="module")
def model():
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.prefix_store = PrefixStore()
    return model


@pytest.mark.parametrize("value", [*ONE.values(), *NONE.values()], ids=[*ONE, *NONE])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_input_is_not_taken_apart(model, way, value, tmp_path):
    with pytest.raises(ValueError, match=r"(inputs|sources) is a .*, but a list is needed. Pass a list.*: \[value\]"):
        way(model, value, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_values_are_one_input_everywhere(model):
    for value in ONE.values():
        assert is_one_input(value)
        assert model.is_singular_input(value)
    for values in (list(ONE.values()), ["a"], ("a", "b"), [CHAT, CHAT], np.array(["a", "b"]), []):
        assert not is_one_input(values)
        assert not model.is_singular_input(values)


def test_anything_that_is_gone_through_is_a_list(model):
    class Rows:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return ("a", "b")[index]

    expected = model.encode(["a", "b"], normalize_embeddings=True)
    for values in (("a", "b"), np.array(["a", "b"]), Rows(), (text for text in "ab"), io.StringIO("a\nb")):
        texts = (text.strip() for text in values) if isinstance(values, io.StringIO) else values
        assert np.abs(embed(model, texts) - expected).max() < 1e-6
    (batch,) = model.encode_stream(io.StringIO("a\nb"))
    assert sorted(batch.indices) == [0, 1]
