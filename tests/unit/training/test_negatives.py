"""Which candidates become negatives, computed by hand: each text ends with the angle of its embedding, in degrees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from slq_embed.data import ImageTextPairs
from slq_embed.training import mine_negatives, negatives

pytest.importorskip("faiss")

MODEL: Any = SimpleNamespace(get_embedding_dimension=lambda: 2)


@pytest.fixture(autouse=True)
def angles(monkeypatch):
    """A model whose embeddings are known; "bad" cannot be read."""

    def encode(model: Any, dataset: Dataset, column: str, rows: Any, task: str, **settings: Any) -> Any:
        texts = [dataset[int(row)][column] for row in rows]
        radians = np.radians([np.nan if text == "bad" else float(text.split()[-1]) for text in texts])
        reasons = {number: f"{column}: unreadable" for number, text in enumerate(texts) if text == "bad"}
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32), reasons

    monkeypatch.setattr(negatives, "_encode", encode)
    monkeypatch.setattr(negatives, "require_inputs", lambda dataset, columns: None)  # here "image" holds texts
    monkeypatch.setattr(negatives, "_ANCHORS_A_SEARCH", 2)  # several searches, several additions
    monkeypatch.setattr(negatives, "_ROWS_A_READ", 3)


def pairs(*rows: tuple[Any, ...]) -> Dataset:
    names = ["text", "image", "label"][: len(rows[0])]
    return Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


ROWS = [("q 0", "d 10", 0), ("q 1", "d 20", 0), ("q 30", "d 40", 1), ("q 60", "d 70", 2), ("q 90", "d 85", 3)]


def mined(rows: Any, **options: Any) -> dict[str, list[str]]:
    options = {"num_negatives": 1, "duplicate_score": None, **options}
    return {
        row["anchor"]: [value for name, value in row.items() if name.startswith("negative_")]
        for row in mine_negatives(MODEL, pairs(*rows), **options).dataset
    }


def test_the_nearest_candidates_of_other_labels_come_first():
    found = mine_negatives(MODEL, pairs(*ROWS), num_negatives=2, duplicate_score=None)
    assert found.dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "label"]
    assert found.dataset[0] == {
        "anchor": "q 0",
        "positive": "d 10",
        "negative_1": "d 40",  # d 20 is nearer, but a sibling
        "negative_2": "d 70",
        "label": 0,
    }
    assert found.dataset[2]["negative_1"] == "d 20"
    assert found.dataset[2]["negative_2"] == "d 10"
    assert found.dataset["label"] == [0, 0, 1, 2, 3]
    assert found.report() == "nothing was skipped"


def test_an_anchor_is_no_negative_of_its_own():
    """A text may stand in both columns, as in pairs of paraphrases, and nothing is nearer to it."""
    assert mined([("d 0", "d 30"), ("d 60", "d 0"), ("d 90", "d 80")])["d 0"] == ["d 80"]


def test_ranks_are_those_without_the_anchors_own():
    assert mined(ROWS, range_min=1)["q 0"] == ["d 70"]
    assert mined(ROWS, range_min=1, range_max=3, num_negatives=2)["q 0"] == ["d 70", "d 85"]


def test_a_margin_is_taken_from_the_lowest_positive():
    """cos 20 = 0.940, cos 40 = 0.766, cos 70 = 0.342: q 0 has the positives d 10 and d 20."""
    assert mined(ROWS, absolute_margin=0.17)["q 0"] == ["d 40"]
    assert mined(ROWS, absolute_margin=0.18)["q 0"] == ["d 70"]
    assert mined(ROWS, relative_margin=0.18)["q 0"] == ["d 40"]  # 0.940 * 0.82 = 0.771
    assert mined(ROWS, relative_margin=0.19)["q 0"] == ["d 70"]  # 0.940 * 0.81 = 0.761


def test_a_margin_below_a_negative_score_is_lower_still():
    rows = [
        ("q 0", "d 120"),
        ("q 300", "d 118"),
        ("q 301", "d 140"),
    ]  # cos 120 = -0.5, cos 118 = -0.47, cos 140 = -0.77
    assert mined(rows, relative_margin=0.1)["q 0"] == ["d 140"]


def test_near_duplicates_of_any_positive_are_no_negatives():
    rows = [*ROWS, ("q 200", "d 22", 4), ("q 210", "d 210", 5)]  # cos(22 - 20) = 0.9994, cos(40 - 20) = 0.940
    assert mined(rows)["q 0"] == ["d 22"]
    assert mined(rows, duplicate_score=0.95)["q 0"] == ["d 40"]
    assert mined(rows, duplicate_score=0.93)["q 0"] == ["d 70"]


def test_equal_anchors_share_their_positives_with_labels_and_without():
    rows = [("q 0", "d 10", 0), ("q 0", "d 20", 1), ("q 50", "d 21", 1), ("q 60", "d 70", 2)]
    assert mined(rows)["q 0"] == ["d 70"], "d 21 is a sibling of the second row"
    found = mine_negatives(MODEL, pairs(*(row[:2] for row in rows)), num_negatives=1, duplicate_score=None).dataset
    assert found["negative_1"][:2] == ["d 21", "d 21"]
    assert found["label"] == [0, 0, 1, 2], "rows with one anchor get one label"


def test_rows_with_too_few_negatives_and_rows_that_cannot_be_read_are_named(caplog):
    rows = [*ROWS, ("q 5", "bad", 6), ("bad", "d 15", 7), ("q 14", "d 16", 0), ("q 90", "bad", 3)]
    found = mine_negatives(MODEL, pairs(*rows), num_negatives=2, range_max=2, duplicate_score=0.99)
    # cos(15 - 16) > 0.99: of the two nearest, the rows of label 0 lose one.
    short = "1 of 2 negatives found"
    assert [(row.name, row.reason, row.index) for row in found.skipped] == [
        ("row 0", short, 0),
        ("row 1", short, 1),
        ("row 5", "image: unreadable", 5),
        ("row 6", "text: unreadable", 6),
        ("row 7", short, 7),
        ("row 8", "image: unreadable", 8),
    ]
    assert list(found.dataset["anchor"]) == ["q 30", "q 60", "q 90"], "q 90 has a positive that can be read"
    assert all(None not in row.values() and "bad" not in row.values() for row in found.dataset)
    assert "6 of 9 rows are left out; the first is row 0 (1 of 2 negatives found)" in caplog.text


def test_a_learning_index_is_taken_once_there_is_enough_to_learn_from(monkeypatch):
    import slq_embed.index.faiss_index as faiss_index

    monkeypatch.setattr(faiss_index, "least_to_learn_from", lambda index: 4)
    rows = [(f"q {angle}", f"d {angle + 1}", angle) for angle in range(0, 360, 9)]
    assert mined(rows, factory="IVF2,Flat", search_parameters="nprobe=2") == mined(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "0 negatives are wanted from ranks 0 to 0"),
        ({"range_min": -1}, "from ranks -1 to 9"),
        ({"num_negatives": 3, "range_min": 2, "range_max": 4}, "3 negatives are wanted from ranks 2 to 4"),
        ({"positive": "photo"}, r"has the columns \['text', 'image', 'label'\], but 'photo' is needed"),
        ({"absolute_margin": 2.0}, r"No row has 1 negatives: the first is row 0 \(0 of 1 negatives found\). Raise"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mined(ROWS, **options)


def test_streamed_and_empty_datasets_are_refused():
    streamed = IterableDataset.from_generator(lambda: iter([{"text": "q 0", "image": "d 0"}]))
    for source in (streamed, ImageTextPairs(streamed)):
        with pytest.raises(ValueError, match="are a IterableDataset, but negatives are chosen from all rows"):
            mine_negatives(MODEL, source)
    with pytest.raises(ValueError, match="The dataset has no rows"):
        mine_negatives(MODEL, pairs(*ROWS).select([]))


def test_nothing_that_can_be_read_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"row 0 \(image: unreadable\)"):
        mined([("q 0", "bad", 0), ("q 1", "bad", 1)])


def test_an_unknown_index_type_is_refused_before_anything_is_encoded(monkeypatch):
    monkeypatch.setattr(negatives, "_encode", lambda *args, **settings: pytest.fail("encoded"))
    with pytest.raises(ValueError, match="FAISS makes no index of the type 'Tree'"):
        mined(ROWS, factory="Tree")
