"""What takes a list takes no single input apart, and what is misspelt or of the wrong kind is named."""

from __future__ import annotations

import io
import queue
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.inputs.rows import is_one_input
from slq_embed.serving import UnreadableInputsError, embed, embed_images

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


def test_what_no_process_can_be_sent_is_refused_before_a_pool_waits_for_it(model):
    pool = {"input": queue.Queue(), "output": queue.Queue(), "processes": []}
    for where in ({}, {"pool": pool}):
        with pytest.raises(ValueError, match=r"An input is a generator.*Several inputs are a list"):
            model.encode((text for text in ("a", "b")), **where)
    content = io.BytesIO()
    Image.effect_noise((640, 640), 50).save(content, "JPEG")
    for where in ({"pool": pool}, {"device": ["cpu", "cpu"]}):
        cut_off, reader = Image.open(io.BytesIO(content.getvalue()[:9999])), io.BufferedReader(content)
        for wrong, reason in ((cut_off, "OSError: image file"), ({"image": reader}, "TypeError: cannot pickle")):
            with pytest.raises(ValueError, match=rf"^Input 1 cannot be sent to the processes of a pool \({reason}"):
                model.encode(["a", wrong], **where)
    assert pool["input"].empty()


def test_the_name_that_inputs_had_in_earlier_versions_of_the_host_is_taken(model):
    assert np.array_equal(model.encode(sentences=["a"]), model.encode(["a"]))


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


def test_a_column_of_a_shuffled_table_keeps_its_order(model, tmp_path):
    """The [0] of a pandas Series is the row with the label 0, wherever it stands."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a circle", "two stars", "a square"]}).iloc[[2, 0, 1]]
    expected = model.encode(list(table["text"]))
    assert np.abs(model.encode_to_file(table["text"], tmp_path / "e.npy").embeddings - expected).max() < 1e-6
    (batch,) = model.encode_stream(table["text"])
    assert np.abs(batch.embeddings.numpy() - expected[batch.indices]).max() < 1e-6
    for way in WAYS.values():
        with pytest.raises(ValueError, match="is a DataFrame, but a list is needed"):
            way(model, table, tmp_path)


@pytest.mark.parametrize(
    "way",
    [
        lambda model, **options: model.encode(["a"], **options),
        lambda model, **options: model.encode(["a"], query_sets={"own": model}, **options),
        lambda model, **options: model.encode_stream(["a"], **options),
        lambda model, **options: embed(model, ["a"], **options),
        lambda model, **options: embed_images(model, [PICTURE], **options),
    ],
    ids=["encode", "query_sets", "encode_stream", "embed", "embed_images"],
)
def test_a_misspelt_option_is_named(model, way):
    with pytest.raises((TypeError, ValueError), match="batchsize"):
        way(model, batchsize=3)


def test_query_sets_take_what_the_host_passes_on(model):
    expected = model.encode(["a"])
    for method in (model.encode_query, model.encode_document):
        assert np.abs(method(["a"], query_sets={"own": model})["own"] - expected).max() < 1e-6
    with pytest.raises(ValueError, match="precision is 'int8', but with query_sets only 'float32' is possible"):
        model.encode(["a"], query_sets={"own": model}, precision="int8")
    for method in (model.encode, lambda *args, **options: list(model.encode_stream(*args, **options))):
        with pytest.raises(ValueError, match="truncate_dim is 8, but each of the query_sets has its own"):
            method(["a"], query_sets={"own": model}, truncate_dim=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(["a"], query_sets={}), "query_sets is {}, but a dict of encoders by name"),
        (lambda model: model.encode(["a"], query_sets=[model]), r"query_sets is \[SLQEncoder"),
        (lambda model: model.encode(["a"], task="foo"), r"task is 'foo', but one of \('query', 'document'\)"),
        (lambda model: embed(model, ["a"], task="foo"), "task is 'foo'"),
        (
            lambda model: embed(SentenceTransformer(pretrained("slq-tiny")), ["a"]),
            "is a SentenceTransformer, but an SLQ",
        ),
        (lambda model: model.encode_to_file(iter("ab"), "e.npy"), r"is a str_\w*iterator, .* Pass list\(inputs\)"),
        (lambda model: setattr(model, "prefix_store", "prefixes"), "prefix_store is 'prefixes', but a PrefixStore"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_an_error_about_many_inputs_names_ten(model):
    with pytest.raises(UnreadableInputsError, match=r"^300 of 300 .*; \.\.\. and 290 more$") as caught:
        embed(model, [5.0] * 300)
    assert str(caught.value).count("An input is a float") == 10
    assert len(caught.value.skipped) == 300
