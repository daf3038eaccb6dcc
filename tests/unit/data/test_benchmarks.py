"""Loaders of published benchmarks, on small files in the published schemas."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Value

from slq_embed.data import (
    caption_sets,
    cirr,
    fashion_iq,
    karr_bench,
    load_cirr,
    load_coco,
    load_fashion_iq,
    load_flickr30k,
    load_karr_bench,
    load_mmeb_eval,
    load_mmeb_train,
    mmeb,
)
from slq_embed.evaluation import (
    CIRREvaluator,
    FashionIQEvaluator,
    ImageTextRetrievalEvaluator,
    KARRBenchEvaluator,
    MMEBEvaluator,
)
from slq_embed.inputs import read_image
from tests import published

CAPTIONS = [[f"image {n}, caption {i}" for i in range(6 if n == 1 else 5)] for n in range(4)]


def colour(image):
    return np.asarray(read_image(image)).reshape(-1, 3).mean(axis=0).round().tolist()


def shows(image, number, tolerance=3):
    """Whether an image that was read is the picture of that number."""
    return np.allclose(colour(image), colour(published.picture(number)), atol=tolerance)


@pytest.mark.parametrize("form", ["parquet", "karpathy"])
def test_coco_keeps_five_captions_an_image(tmp_path, monkeypatch, form):
    """The published 25,010 captions are counted before that."""
    (published.captions_parquet if form == "parquet" else published.karpathy)(tmp_path, CAPTIONS)
    monkeypatch.setattr(
        caption_sets, "_COCO", caption_sets._Published("COCO", 4, 21, "x", ("dataset_coco.json",), (".",))
    )
    data = load_coco(tmp_path)
    assert (len(data.images), len(data.texts)) == (4, 20)
    assert data.texts == [text for row in CAPTIONS for text in row[:5]]
    assert data.image_of == [n for n in range(4) for _ in range(5)]
    assert all(isinstance(image, dict | Path) for image in data.images), "images stay undecoded"
    assert all(shows(image, n) for n, image in enumerate(data.images))
    assert ImageTextRetrievalEvaluator(**vars(data)).get_config_dict() == {"images": 4, "texts": 20}
    part = load_coco(tmp_path, limit=2)
    assert (part.images, part.texts, part.image_of) == (data.images[:2], data.texts[:10], data.image_of[:10])


@pytest.mark.parametrize(
    ("load", "name"), [(load_coco, "dataset_coco.json"), (load_flickr30k, "dataset_flickr30k.json")]
)
def test_caption_sets_compare_the_published_counts(tmp_path, load, name):
    counts = "5,000" if load is load_coco else "1,000"
    with pytest.raises(FileNotFoundError, match=f"neither a parquet file.* nor a Karpathy file.*_test.*{name}"):
        load(tmp_path)
    published.karpathy(tmp_path, CAPTIONS, name)
    with pytest.raises(ValueError, match=f"There are 4 images of .* but {counts} are published.*Pass limit"):
        load(tmp_path)
    assert len(load(tmp_path, limit=5000).images) == 4
    with pytest.raises(ValueError, match="limit is 0, but at least 1 is needed"):
        load(tmp_path, limit=0)


def test_the_number_of_coco_captions_is_compared(tmp_path, monkeypatch):
    published.captions_parquet(tmp_path, CAPTIONS)
    monkeypatch.setattr(caption_sets, "_COCO", caption_sets._Published("COCO", 4, 22, "x", ("dataset_coco.json",), ()))
    with pytest.raises(ValueError, match="There are 21 captions of COCO, but 22 are published"):
        load_coco(tmp_path)


def test_known_counts():
    """The published ones, as data-formats and the data sets' pages have them."""
    assert (caption_sets._COCO.images, caption_sets._COCO.captions) == (5000, 25010)
    assert (caption_sets._FLICKR30K.images, caption_sets._FLICKR30K.captions) == (1000, 5000)
    assert karr_bench._PAIRS == 2915
    assert cirr._COUNTS["val"] == (4181, 2297)
    assert sum(images for _, images in fashion_iq._COUNTS.values()) == 15536
    assert mmeb._ROWS == 1000


def test_other_columns_missing_images_and_empty_captions_are_named(tmp_path):
    folder = tmp_path / "parquet"
    published.captions_parquet(folder, [["a", " "]])
    with pytest.raises(ValueError, match=r"Image 0 of .*parquet has an empty caption, or none"):
        load_coco(folder, limit=9)
    table = pa.table({"picture": ["x"]})
    pq.write_table(table, folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"has the columns picture, but image is needed\. See the dataset royokong/coco"
    ):
        load_coco(folder)
    pq.write_table(pa.table({"image": ["x"]}), folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="has no column of captions, but one of text, caption, captions is needed"):
        load_coco(folder)
    published.karpathy(tmp_path, CAPTIONS)
    (tmp_path / "val2014" / f"{2:012}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images are missing, such as .*02\.jpg.*the images of COCO"):
        load_coco(tmp_path, limit=9)
    assert len(load_coco(tmp_path, limit=2).images) == 2
    (tmp_path / "dataset_coco.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON in UTF-8"):
        load_coco(tmp_path)
    (tmp_path / "dataset_coco.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, but a dict is needed"):
        load_coco(tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"split": "test"}]}')
    with pytest.raises(ValueError, match="has split, but 'sentences' is needed"):
        load_coco(tmp_path)


@pytest.mark.parametrize("saved", [False, True])
def test_karr_bench(tmp_path, monkeypatch, saved):
    published.karr_bench(tmp_path / "plain", saved=saved)
    with pytest.raises(ValueError, match="There are 4 pairs of KARR-Bench, but 2,915 are published"):
        load_karr_bench(tmp_path / "plain")
    monkeypatch.setattr(karr_bench, "_PAIRS", 4)
    data = load_karr_bench(tmp_path / "plain")
    assert data.categories is None
    assert data.texts[2] == "An animal with 2 lives"
    assert all(shows(image, n) for n, image in enumerate(data.images))
    published.karr_bench(tmp_path / "more", saved=saved, category=["functional", "logic", "logic", "logic"])
    data = load_karr_bench(tmp_path / "more", limit=3)
    assert KARRBenchEvaluator(**vars(data)).get_config_dict() == {"pairs": 3, "categories": 2}
    with pytest.raises(FileNotFoundError, match="no public release of it is known"):
        load_karr_bench(tmp_path / "none")


def test_karr_bench_among_other_splits_with_images_as_files(tmp_path):
    rows = Dataset.from_dict({"image": ["0.png", "1.png"], "text": ["a loyal animal", " "]})
    DatasetDict({"train": rows, "other": rows}).save_to_disk(str(tmp_path))
    published.write_picture(tmp_path / "0.png", 0)
    data = load_karr_bench(tmp_path, limit=1)
    assert data.images == [tmp_path / "0.png"]
    with pytest.raises(ValueError, match=r"Row 1 of .* has the text ' ', but one query an image is needed"):
        load_karr_bench(tmp_path, limit=2)
    with pytest.raises(ValueError, match="has the splits train, other, but 'test' is needed"):
        load_karr_bench(tmp_path, split="test")


def test_images_may_be_plain_bytes(tmp_path):
    """As a parquet file that another program wrote has them."""
    published.write_picture(tmp_path / "0.png", 3)
    table = pa.table({"image": [(tmp_path / "0.png").read_bytes()], "text": [["a"]]})
    pq.write_table(table, tmp_path / "test.parquet")
    (image,) = load_coco(tmp_path, limit=1).images
    assert shows(image, 3)


@pytest.mark.parametrize("form", ["files", "parquet"])
def test_cirr(tmp_path, monkeypatch, form):
    (published.cirr_files if form == "files" else published.cirr_parquet)(tmp_path)
    with pytest.raises(ValueError, match="There are 3 queries of CIRR val, but 4,181 are published"):
        load_cirr(tmp_path)
    monkeypatch.setitem(cirr._COUNTS, "val", (3, 18))
    data = load_cirr(tmp_path)
    assert (data.references, data.targets) == ([0, 6, 12], [2, 8, 14])
    assert data.subsets == [list(range(6 * n, 6 * n + 6)) for n in range(3)]
    assert data.texts == ["has 0 dogs", "has 1 dogs", "has 2 dogs"]
    assert data.names[6] == "dev-1-0-img0"
    assert data.pair_ids == ([12063, 12064, 12065] if form == "files" else None)
    assert all(shows(image, n, 1) for n, image in enumerate(data.images))
    assert CIRREvaluator(**vars(data)).get_config_dict() == {"images": 18, "queries": 3}
    part = load_cirr(tmp_path, limit=1)
    assert (len(part.images), part.references, part.targets, len(part.texts)) == (6, [0], [2], 1)
    with pytest.raises(FileNotFoundError, match=r"cap\.rc2\.test1\.json nor .* published as Cuberick-Orion/CIRR"):
        load_cirr(tmp_path, "test1")


def test_the_test_split_of_cirr_has_no_targets_but_makes_submissions(tmp_path):
    published.cirr_files(tmp_path, "test1")
    data = load_cirr(tmp_path, "test1", limit=3)
    assert data.targets is None
    assert (data.pair_ids, len(data.names)) == ([12063, 12064, 12065], 18)


def test_cirr_names_what_is_missing(tmp_path):
    published.cirr_files(tmp_path)
    (tmp_path / "img_raw" / "dev" / "dev-2-5-img0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 18 images are missing, such as .*dev-2-5-img0\.png"):
        load_cirr(tmp_path, limit=9)
    (tmp_path / "img_raw").rename(tmp_path / "elsewhere")
    assert len(load_cirr(tmp_path, limit=2, images=tmp_path / "elsewhere").images) == 12
    file = tmp_path / "captions" / "cap.rc2.val.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{**rows[0], "reference": "dev-9"}]))
    with pytest.raises(ValueError, match="names the image 'dev-9', which the split does not have"):
        load_cirr(tmp_path, limit=2, images=tmp_path / "elsewhere")
    del rows[0]["pairid"]
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"cap\.rc2\.val\.json, entry 0 has reference, .*but 'pairid' is needed"):
        load_cirr(tmp_path)
    (tmp_path / "image_splits" / "split.rc2.val.json").unlink()
    file.write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*split\.rc2\.val\.json. It is published as Cub"):
        load_cirr(tmp_path)


@pytest.mark.parametrize("form", ["files", "parquet"])
def test_fashion_iq(tmp_path, monkeypatch, form):
    (published.fashion_iq_files if form == "files" else published.fashion_iq_parquet)(tmp_path)
    with pytest.raises(ValueError, match="There are 2 queries of FashionIQ dress, but 2,017 are published"):
        load_fashion_iq(tmp_path)
    monkeypatch.setattr(fashion_iq, "_COUNTS", dict.fromkeys(published.CATEGORIES, (2, 4)))
    data = load_fashion_iq(tmp_path)
    assert data.image_categories == [category for category in published.CATEGORIES for _ in range(4)]
    assert data.references == [0, 1, 4, 5, 8, 9]
    assert data.targets == [1, 2, 5, 6, 9, 10]
    assert data.captions[1] == ["is red.", "has 1 sleeves"]
    assert all(shows(image, n) for n, image in enumerate(data.images))
    assert FashionIQEvaluator(**vars(data)).get_config_dict() == {"images": 12, "queries": 6}
    part = load_fashion_iq(tmp_path, limit=1)
    assert (len(part.images), part.references, part.targets) == (6, [0, 2, 4], [1, 3, 5])


def test_fashion_iq_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="FashionIQ is published as XiaoxiaoGuo/fashion-iq"):
        load_fashion_iq(tmp_path)
    published.fashion_iq_files(tmp_path)
    (tmp_path / "images" / "B0012.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing.*B0012\.jpg.*royokong/fashioniq_val_imgs"):
        load_fashion_iq(tmp_path, limit=2)
    file = tmp_path / "captions" / "cap.shirt.val.json"
    file.write_text(json.dumps([{"candidate": "B0010", "target": "B0011", "captions": ["one"]}]))
    with pytest.raises(ValueError, match=r"cap\.shirt\.val\.json, entry 0 has the captions \['one'\]"):
        load_fashion_iq(tmp_path, limit=1)
    file.write_text(json.dumps([{"candidate": "B0010", "target": "gone", "captions": ["one", "two"]}]))
    with pytest.raises(ValueError, match="FashionIQ shirt names the image 'gone', which the split does not have"):
        load_fashion_iq(tmp_path, limit=1)


def test_mmeb_eval_reads_texts_and_images(tmp_path, monkeypatch):
    tasks = ["ImageNet-1K", "MSCOCO_t2i"]
    published.mmeb_eval(tmp_path, tasks)
    with pytest.raises(ValueError, match="There are 3 rows of ImageNet-1K, but 1,000 are published"):
        load_mmeb_eval(tmp_path, tasks)
    monkeypatch.setattr(mmeb, "_ROWS", 3)
    data = load_mmeb_eval(tmp_path, tasks)
    classes, pictures = data["ImageNet-1K"], data["MSCOCO_t2i"]
    image = tmp_path / "images" / "ImageNet-1K" / "1.jpg"
    assert classes.queries[1] == {"image": image, "text": "Represent the given image for classification"}
    assert classes.candidates == [{"text": f"class {n}"} for n in range(3)]
    assert [row.tolist() for row in classes.own] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert pictures.queries[2] == {"text": "Find me an image that fits: 2"}
    expected = {"image": tmp_path / "images" / "MSCOCO_t2i" / "0.jpg", "text": "Represent the given image"}
    assert pictures.candidates[0] == expected
    assert len(pictures.candidates) == 3
    assert MMEBEvaluator(data).get_config_dict() == {"tasks": 2, "queries": 6}
    assert [len(task.queries) for task in load_mmeb_eval(tmp_path, tasks, limit=2).values()] == [2, 2]


def test_mmeb_eval_names_what_is_missing(tmp_path):
    published.mmeb_eval(tmp_path, ["GQA"])
    with pytest.raises(FileNotFoundError, match=r"35 of 36 tasks are missing.* published as TIGER-Lab/MMEB-eval"):
        load_mmeb_eval(tmp_path)
    with pytest.raises(ValueError, match="MMEB has no task GQA2"):
        load_mmeb_eval(tmp_path, ["GQA2"])
    (tmp_path / "images" / "GQA" / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing.*images\.zip of TIGER-Lab/MMEB-eval"):
        load_mmeb_eval(tmp_path, ["GQA"], limit=9)
    file = tmp_path / "GQA" / "test-00000-of-00001.parquet"
    row = {"qry_text": ["<|image_1|>"], "qry_img_path": [""], "tgt_text": [["a"]], "tgt_img_path": [[""]]}
    pq.write_table(pa.table(row), file)
    with pytest.raises(ValueError, match="row 0, has neither a text nor an image"):
        load_mmeb_eval(tmp_path, ["GQA"], limit=1)
    pq.write_table(pa.table({**row, "tgt_img_path": [["", ""]]}), file)
    with pytest.raises(ValueError, match=r"Row 0 of .*GQA has other numbers of texts and images"):
        load_mmeb_eval(tmp_path, ["GQA"], limit=1)
    pq.write_table(pa.table({**row, "qry_inst": ["Answer."]}), file)
    with pytest.raises(ValueError, match=r"holds rows of MMEB v2.* MMEB v1 is TIGER-Lab/MMEB-eval"):
        load_mmeb_eval(tmp_path, ["GQA"], limit=1)


def test_mmeb_train_lists_rows_whose_image_is_missing(tmp_path, caplog):
    published.mmeb_train(tmp_path, "OK-VQA")
    with caplog.at_level(logging.WARNING):
        pairs = load_mmeb_train(tmp_path, "OK-VQA")
    assert pairs.report() == "1 skipped: row 2 (there is no image images/OK-VQA/Train/2.jpg)"
    assert pairs.report() in caplog.text
    assert pairs.dataset.column_names == ["anchor", "positive"]
    row = pairs.dataset[1]
    assert row["positive"] == {"image": None, "text": "thing 1"}
    assert row["anchor"]["text"] == "What is it? 1"
    assert shows(row["anchor"]["image"], 1)
    assert len(load_mmeb_train(tmp_path, "OK-VQA", "diverse_instruction", limit=1).dataset) == 1
    published.mmeb_train(tmp_path, "WebQA", negatives=True)
    assert load_mmeb_train(tmp_path, "WebQA").dataset[0]["negative"] == {"image": None, "text": "thing 1"}
    with pytest.raises(FileNotFoundError, match="It is published as TIGER-Lab/MMEB-train"):
        load_mmeb_train(tmp_path, "DocVQA")
    row = {"qry": "<|image_1|>", "qry_image_path": "", "pos_text": "a", "pos_image_path": ""}
    published.write_parquet(
        tmp_path / "CIRR" / "original-0.parquet", [row, {**row, "qry": "b"}], dict.fromkeys(row, Value("string"))
    )
    assert load_mmeb_train(tmp_path, "CIRR").report() == "1 skipped: row 0 (neither a text nor an image)"
    (tmp_path / "images").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"No row of .*OK-VQA is left: 3 skipped"):
        load_mmeb_train(tmp_path, "OK-VQA")
