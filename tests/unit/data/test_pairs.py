from __future__ import annotations

import importlib
import io
import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

import slq_embed.data
from slq_embed.data import (
    DistinctImageBatchSampler,
    ImageTextPairs,
    concatenate_pairs,
    from_coco,
    from_dataset,
    from_folder,
    from_karpathy,
    from_records,
    retrieval_set,
)
from slq_embed.inputs import read_image


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


def test_of_many_bad_records_the_first_are_named(folder, caplog):
    """3,000 names would fill the screen, and the error that matters would be above it."""
    gone = [(f"gone{n}", folder / "gone.png", "x") for n in range(3000)]
    with caplog.at_level(logging.WARNING):
        pairs = from_records([*gone, ("a", folder / "a.png", "one")])
    assert len(pairs.skipped) == 3000
    assert pairs.report().startswith("3,000 skipped: gone0 (")
    assert pairs.report().endswith("; ... and 2,990 more")
    assert "gone9 (" in pairs.report()
    assert "gone10 (" not in caplog.text
    with pytest.raises(ValueError, match=r"No image-text pair is left: 3,000 skipped: gone0 .* and 2,990 more\.$"):
        from_records(gone)
    assert "more" not in ImageTextPairs(pairs.dataset, pairs.skipped[:10]).report()


def test_records_and_options_that_do_not_fit_say_what_is_needed(folder):
    for record in [("a.png", "one"), {"name": "a", "image": "a.png", "captions": "one"}, "abc"]:
        with pytest.raises(ValueError, match=r"A record is .*but a name, an image and its captions are needed"):
            from_records([record])
    with pytest.raises(ValueError, match="There are no records, but at least one image"):
        from_records([])
    lines(folder, *GOOD)
    with pytest.raises(TypeError, match=r"There is no option 'limt'\. The options are limit, strict, verify"):
        from_folder(folder, limt=3)
    with pytest.raises(TypeError, match="There is no option 'limt'"):  # now, and not when the stream is read
        from_dataset(from_folder(folder).dataset.to_iterable_dataset(), limt=3)


@pytest.mark.parametrize("bad", BAD)
def test_strict_raises_at_the_first_bad_record(folder, bad):
    lines(folder, *GOOD, bad)
    with pytest.raises(ValueError, match=bad["image"]):
        from_folder(folder, strict=True)


def test_no_good_record_is_an_error(folder):
    lines(folder, BAD[0])
    with pytest.raises(ValueError, match=r"No image-text pair is left: 1 skipped: cut\.png"):
        from_folder(folder)


def test_a_csv_file_may_begin_with_a_mark_and_a_caption_may_hold_a_line_separator(folder):
    """Excel writes the one. JSON allows the other, at which str.splitlines would split."""
    (folder / "captions.csv").write_text("image,text\na.png,one\n", "utf-8-sig")
    assert from_folder(folder).dataset["text"][:] == ["one"]
    line = json.dumps({"image": "a.png", "text": "one\u2028two"}, ensure_ascii=False)
    (folder / "captions.jsonl").write_text(line + "\n", "utf8")
    assert from_folder(folder).dataset["text"][:] == ["one\u2028two"]


def test_a_caption_with_a_comma_is_not_cut_at_the_comma(folder):
    (folder / "captions.csv").write_text(',image,text\n0,a.png,"a dog, running"\n')  # as pandas writes it
    assert from_folder(folder).dataset["text"][:] == ["a dog, running"]
    (folder / "captions.csv").write_text("image,text\na.png,a dog, running\n")
    with pytest.raises(
        ValueError, match=r"captions\.csv has a row of more values.*Put a caption with a comma into quotes"
    ):
        from_folder(folder)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"image": "a.png", "text": "one"}\n{"image": ', {}, "is not JSON in line 2"),
        ('["a.png", "one"]', {}, "has a list in line 1, but each line must be an object"),
        ('{"picture": "a.png"}', {}, "without 'image' or 'file_name'"),
        (
            '{"image": "a.png", "text": "one", "split": "train"}',
            {"split": "tset"},
            "no rows of the split 'tset'.*: train",
        ),
        ('{"image": "a.png", "text": "one"}', {"limit": 0}, "limit is 0, but at least 1"),
        ('{"image": "a.png", "text": 5}', {}, "caption 0 is a int, but a str is needed"),
        (
            '{"image": "a.png"}',
            {},
            r"captions\.jsonl has \['image'\], but one of \('captions', 'text', 'caption'\) is needed",
        ),
        ('{"image": "a.png"}\n{"image": "b.png", "caption": ""}', {}, r"2 skipped: a\.png \(no caption\); b\.png"),
    ],
)
def test_a_caption_file_that_does_not_fit_is_named(folder, content, options, message):
    (folder / "captions.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_folder(folder, **options)


def test_a_caption_file_that_is_not_utf_8_is_named(folder):
    (folder / "captions.csv").write_bytes("image,text\na.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions\.csv is not UTF-8 text .* Save it as UTF-8"):
        from_folder(folder)


@pytest.mark.parametrize(
    ("content", "coco", "karpathy"),
    [
        ("{", "is not JSON", "is not JSON"),
        ("[]", "is no COCO captions file", "is no Karpathy split file"),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}',
            "without a caption",
            "each image needs",
        ),
        ('{"images": [{"filename": "a", "sentences": [], "split": "val"}]}', "no COCO", "'test'. Its splits are: val"),
    ],
)
def test_an_annotation_file_of_another_kind_is_refused(folder, content, coco, karpathy):
    (folder / "file.json").write_text(content)
    with pytest.raises(ValueError, match=coco):
        from_coco(folder / "file.json", folder)
    with pytest.raises(ValueError, match=karpathy):
        from_karpathy(folder / "file.json", folder, split="test")


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


def test_rows_with_one_image_have_one_label(folder, monkeypatch):
    """Many datasets have a row for each caption. With labels of their own, captions of an image would be each other's negatives."""
    names = ["a.png", "b.png", "a.png", "c.png", "a.png"]
    said = Dataset.from_dict({"image": [str(folder / name) for name in names], "text": list("vwxyz")})
    files, labels = said.cast_column("image", ImageFeature()), [0, 1, 0, 2, 0]
    read = [{"image": (folder / name).read_bytes(), "text": "x"} for name in names]
    for rows in (said, files, Dataset.from_list(read), said.to_iterable_dataset(), files.with_format("torch")):
        assert [row["label"] for row in from_dataset(rows, verify=False).dataset] == labels
    opened = [Image.open(folder / name) for name in names]
    for images in (opened, [np.asarray(image) for image in opened], [folder / name for name in names]):
        pairs = from_records(zip(names, images, "vwxyz", strict=True))
        assert pairs.dataset["label"][:] == labels
        assert retrieval_set(pairs)[2] == labels
        assert from_dataset(pairs.dataset).dataset["label"][:] == labels
    lines(folder, *({"image": name, "text": "x"} for name in ("a.png", "b.png", "./a.png")))
    assert from_folder(folder).dataset["label"][:] == [0, 0, 1]
    monkeypatch.setattr("slq_embed.data.pairs._REMEMBERED", 1)
    assert [row["label"] for row in from_dataset(said.to_iterable_dataset()).dataset] == [0, 1, 2, 3, 4]


def test_embedded_images_are_not_taken_for_files_of_their_name(folder, monkeypatch):
    """datasets would store the path alone, where there is such a file: another one, such as 0.png of another set."""
    monkeypatch.chdir(folder)
    embedded = {"bytes": (folder / "b.png").read_bytes(), "path": "a.png"}
    rows = from_records([("x", embedded, "one")]).dataset
    assert np.array_equal(rows[0]["image"], read_image(folder / "b.png"))


def test_a_picture_is_stored_as_it_is_now(folder, tmp_path):
    """datasets would store the name of the file that it was opened from, and drop how a photo is to be turned."""
    drawn = Image.open(folder / "a.png")
    drawn.paste("lime", (0, 0, *drawn.size))
    gone = Image.open(shutil.copy(folder / "a.png", tmp_path / "gone.png"))
    gone.load()
    (tmp_path / "gone.png").unlink()
    turned, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.radial_gradient("L").crop((0, 0, 40, 20)).save(turned, "JPEG", exif=exif)
    pictures = [drawn, gone, Image.open(turned)]
    rows = from_records([(str(number), picture, "one") for number, picture in enumerate(pictures)]).dataset
    assert all(np.array_equal(row["image"], read_image(picture)) for row, picture in zip(rows, pictures, strict=True))
    stored = from_records([("a", Image.open(folder / "a.png"), "one")]).dataset.cast_column(
        "image", ImageFeature(decode=False)
    )
    assert stored[0]["image"] == {"bytes": None, "path": str(folder / "a.png")}


def test_paths_are_strings_for_datasets(folder, monkeypatch):
    """Version 3.6 knows no pathlib.Path."""
    given, encode = [], ImageFeature.encode_example
    monkeypatch.setattr(ImageFeature, "encode_example", lambda self, value: given.append(value) or encode(self, value))
    assert from_records([("a", folder / "a.png", "one")]).dataset[0]["image"].size == (16, 16)
    assert given[0] == str(folder / "a.png")


def test_a_picture_that_cannot_be_read_is_skipped_without_verify(folder):
    cut = Image.open(io.BytesIO((folder / "a.png").read_bytes()[:-30]))
    pairs = from_records([("cut", cut, "one"), ("a", folder / "a.png", "one")], verify=False)
    assert [row.name for row in pairs.skipped] == ["cut"]


@pytest.mark.parametrize(
    "other", [DatasetDict({"train": Dataset.from_dict({"image": [], "text": []})}), [{"text": "x"}]]
)
def test_what_is_no_dataset_is_named(other):
    with pytest.raises(ValueError, match=rf"dataset is a {type(other).__name__}, but a Dataset is needed.*from_pandas"):
        from_dataset(other)


def test_images_in_memory_may_be_more_than_arrow_takes_at_once(folder, monkeypatch):
    """It takes 2 GiB, and fails after all was read. Here, 1 byte is too much for one part."""
    sizes = []
    build = Dataset.from_list
    monkeypatch.setattr(
        Dataset, "from_list", lambda rows, features: (sizes.append(len(rows)), build(rows, features))[1]
    )
    records = [(name, (folder / name).read_bytes(), ["x", "y"]) for name in ("a.png", "b.png")]
    whole = from_records(records)
    monkeypatch.setattr("slq_embed.data.storage._PART_BYTES", 1)
    parts = from_records(records)
    assert sizes == [4, 1, 1, 1, 1]
    assert parts.dataset.features == whole.dataset.features
    assert parts.dataset[:] == whole.dataset[:]


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
    assert images == [{"bytes": None, "path": str(folder / name)} for name in ("a.png", "b.png")]  # undecoded
    assert texts == ["one", "two", "three"]
    assert image_of == [0, 0, 1]
    dataset = from_folder(folder).dataset
    assert retrieval_set(dataset)[1:] == (texts, image_of)
    for other, what in ((str(folder), "a str"), (dataset.remove_columns("label"), r"the columns \['image', 'text'\]")):
        with pytest.raises(ValueError, match=f"The pairs are {what}, but image-text pairs are needed.*from_folder"):
            retrieval_set(other)


def test_no_batch_has_two_captions_of_one_image():
    dataset = Dataset.from_dict({"text": [str(n) for n in range(40)], "label": [n // 5 for n in range(40)]})
    # The arguments that the trainer gives.
    settings = {"generator": torch.Generator(), "seed": 1, "valid_label_columns": ["label", "score"]}
    batches = list(DistinctImageBatchSampler(dataset, batch_size=4, drop_last=False, **settings))
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    assert all(len({row // 5 for row in batch}) == len(batch) for batch in batches)


def test_sets_are_put_one_after_the_other(folder):
    lines(folder, *GOOD, *BAD)
    first, other = from_folder(folder), from_folder(folder, limit=1)
    both = concatenate_pairs([first, other, first])
    assert both.dataset.column_names == first.dataset.column_names
    assert both.dataset.features == first.dataset.features
    assert both.dataset["text"][:] == [*first.dataset["text"], "one", "two", *first.dataset["text"]]
    assert both.dataset["label"][:] == [0, 0, 1, 2, 3, 3, 4, 4, 5, 6]
    assert both.skipped == [*first.skipped, *other.skipped, *first.skipped]
    images, texts, image_of = retrieval_set(both)
    assert (len(images), len(texts), max(image_of)) == (7, 10, 6)


def test_sets_without_labels_are_refused():
    with pytest.raises(ValueError, match="no set to concatenate"):
        concatenate_pairs([])
    unlabelled = ImageTextPairs(Dataset.from_dict({"image": ["a"], "text": ["b"]}))
    with pytest.raises(ValueError, match="Set 0 of 1 is streamed or has no labels"):
        concatenate_pairs([unlabelled])
    labelled = Dataset.from_dict({"image": ["a"], "text": ["b"], "label": [0]})
    with pytest.raises(ValueError, match="Set 1 of 2 is streamed or has no labels"):
        concatenate_pairs([ImageTextPairs(labelled), ImageTextPairs(labelled.to_iterable_dataset())])
    mined = ImageTextPairs(Dataset.from_dict({"anchor": [0], "label": [0]}).with_transform(lambda rows: rows))
    with pytest.raises(ValueError, match=r"Set 0 of 2 has a transform, as mine_negatives gives it.* mine then\."):
        concatenate_pairs([mined, mined])


def test_without_datasets_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets. Install it: pip install 'slq-embed\[train\]'"):
        importlib.reload(slq_embed.data)
