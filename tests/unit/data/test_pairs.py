from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from slq_embed.data import DistinctImageBatchSampler, from_coco, from_dataset, from_folder, from_karpathy, retrieval_set


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    return tmp_path


def lines(folder, *rows):
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


GOOD = [{"image": "a.png", "captions": ["one", "two"]}, {"image": "b.png", "captions": ["three"]}]
BAD = [
    {"image": "cut.png", "captions": ["x"]},
    {"image": "gone.png", "captions": ["x"]},
    {"image": "c.png", "captions": ["", "  ", "kept"]},
]


def test_a_folder_with_jsonl_gives_one_row_a_caption(folder):
    lines(folder, *GOOD)
    pairs = from_folder(folder)
    assert pairs.dataset["text"][:] == ["one", "two", "three"]
    assert pairs.dataset["label"][:] == [0, 0, 1]
    assert pairs.dataset[2]["image"].size == (16, 16)
    assert pairs.report() == "nothing was skipped"


def test_bad_records_are_skipped_counted_and_named(folder, caplog):
    lines(folder, *GOOD, *BAD)
    with caplog.at_level(logging.WARNING):
        pairs = from_folder(folder)
    assert pairs.dataset["text"][:] == ["one", "two", "three", "kept"]
    assert [record.name for record in pairs.skipped] == ["cut.png", "gone.png", "c.png", "c.png"]
    assert pairs.report().startswith("4 skipped: cut.png (")
    assert "caption 0 is empty" in caplog.text
    assert "gone.png" in caplog.text


@pytest.mark.parametrize("bad", BAD)
def test_strict_raises_at_the_first_bad_record(folder, bad):
    lines(folder, *GOOD, bad)
    with pytest.raises(ValueError, match=bad["image"]):
        from_folder(folder, strict=True)


def test_no_good_record_is_an_error(folder):
    lines(folder, BAD[0])
    with pytest.raises(ValueError, match=r"No image-text pair is left: 1 skipped: cut\.png"):
        from_folder(folder)


def test_csv_and_splits(folder):
    (folder / "captions.csv").write_text("file_name,text,split\na.png,one,train\na.png,two,train\nb.png,three,test\n")
    assert from_folder(folder).dataset["label"][:] == [0, 0, 1]
    assert from_folder(folder, split="test").dataset["text"][:] == ["three"]
    assert from_folder(folder, limit=1).dataset["text"][:] == ["one", "two"]
    with pytest.raises(FileNotFoundError, match=r"no caption file.*captions\.jsonl"):
        from_folder(folder / "none")


def test_coco_captions(folder):
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}, {"id": 11, "file_name": "c.png"}],
        "annotations": [
            {"image_id": 9, "caption": "three"},
            {"image_id": 7, "caption": "one"},
            {"image_id": 7, "caption": "two"},
        ],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    pairs = from_coco(folder / "coco.json", folder)
    assert pairs.dataset["text"][:] == ["one", "two", "three"]
    assert pairs.report() == "1 skipped: c.png (no caption)"


def test_karpathy_splits(folder):
    (folder / "sub").mkdir()
    (folder / "a.png").rename(folder / "sub" / "a.png")
    rows = [
        {"filename": "a.png", "filepath": "sub", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "three"}]},
    ]
    (folder / "karpathy.json").write_text(json.dumps({"images": rows}))
    assert from_karpathy(folder / "karpathy.json", folder).dataset["text"][:] == ["one", "two", "three"]
    assert from_karpathy(folder / "karpathy.json", folder, split="test").dataset["text"][:] == ["three"]


@pytest.fixture
def any_dataset(folder):
    rows = {
        "photo": [str(folder / n) for n in ("a.png", "cut.png", "b.png")],
        "said": [["one", "two"], ["x"], ["three"]],
    }
    return Dataset.from_dict(rows).cast_column("photo", ImageFeature())


def test_any_dataset_with_an_image_and_a_text_column(any_dataset):
    pairs = from_dataset(any_dataset, "photo", "said")
    assert pairs.dataset["text"][:] == ["one", "two", "three"]
    assert [record.name for record in pairs.skipped] == ["row 1"]
    with pytest.raises(ValueError, match="'caption' is needed"):
        from_dataset(any_dataset, "photo", "caption")


def test_a_streamed_dataset_stays_streamed(any_dataset):
    pairs = from_dataset(any_dataset.to_iterable_dataset(), "photo", "said")
    for _ in range(2):
        rows = list(pairs.dataset)
        assert [(row["text"], row["label"]) for row in rows] == [("one", 0), ("two", 0), ("three", 1)]
        assert rows[0]["image"].size == (16, 16)
        assert [record.name for record in pairs.skipped] == ["row 1"]
    with pytest.raises(ValueError, match="without streaming"):
        retrieval_set(pairs)


def test_images_are_decoded_when_read(folder):
    lines(folder, *GOOD)
    pairs = from_folder(folder, verify=False)
    stored = pairs.dataset.cast_column("image", ImageFeature(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str(folder / "a.png")}


def test_a_retrieval_set_has_each_image_once(folder):
    lines(folder, *GOOD)
    images, texts, image_of = retrieval_set(from_folder(folder))
    assert len(images) == 2
    assert texts == ["one", "two", "three"]
    assert image_of == [0, 0, 1]


def test_no_batch_has_two_captions_of_one_image():
    dataset = Dataset.from_dict({"text": [str(n) for n in range(40)], "label": [n // 5 for n in range(40)]})
    # The arguments that the trainer gives.
    settings = {"generator": torch.Generator(), "seed": 1, "valid_label_columns": ["label", "score"]}
    batches = list(DistinctImageBatchSampler(dataset, batch_size=4, drop_last=False, **settings))
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    assert all(len({row // 5 for row in batch}) == len(batch) for batch in batches)
