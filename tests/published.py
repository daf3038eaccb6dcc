"""Small data sets in the schemas of the published ones, for loaders and for the example that measures on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from datasets import Sequence as ListOf
from PIL import Image as PILImage


def picture(number: int) -> PILImage.Image:
    return PILImage.new("RGB", (32, 32), (37 * number % 256, 91 * number % 256, 53 * number % 256))


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf8")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], features: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), Features(features)).to_parquet(path)


def captions_parquet(folder: Path, captions: Sequence[Sequence[str]]) -> None:
    """As ``royokong/coco_test`` and ``royokong/flickr30k_test``."""
    rows = [{"image": picture(n), "text": list(texts)} for n, texts in enumerate(captions)]
    write_parquet(
        folder / "data" / "test-00000-of-00001.parquet", rows, {"image": Image(), "text": ListOf(Value("string"))}
    )


def karpathy(folder: Path, captions: Sequence[Sequence[str]], name: str = "dataset_coco.json") -> None:
    """As the Karpathy split of COCO, whose images name a folder of their own."""
    filepath = {"filepath": "val2014"} if "coco" in name else {}
    rows = [
        {
            **filepath,
            "filename": f"{n:012}.jpg",
            "imgid": n,
            "split": "test",
            "sentids": list(range(len(texts))),
            "sentences": [
                {"raw": text, "tokens": text.split(), "imgid": n, "sentid": i} for i, text in enumerate(texts)
            ],
        }
        for n, texts in enumerate(captions)
    ]
    other = {**rows[0], "filename": "other.jpg", "split": "train"}  # not there: only the test split is read
    write_json(folder / name, {"images": [other, *rows], "dataset": "coco"})
    for n in range(len(captions)):
        write_picture(folder / ("val2014" if filepath else "flickr30k-images") / f"{n:012}.jpg", n)


def karr_bench(folder: Path, count: int = 4, saved: bool = False, **columns: list[str]) -> None:
    """As ``coco_knowledge_bench_test``, with the split ``train``."""
    rows = [
        {"image": picture(n), "text": f"An animal with {n} lives"} | {name: value[n] for name, value in columns.items()}
        for n in range(count)
    ]
    features = {"image": Image(), "text": Value("string"), **dict.fromkeys(columns, Value("string"))}
    if saved:
        Dataset.from_list(rows, Features(features)).save_to_disk(str(folder))
    else:
        write_parquet(folder / "train-00000-of-00001.parquet", rows, features)


def cirr_files(folder: Path, split: str = "val", count: int = 3) -> None:
    """As the branch ``cirr_dataset`` with the images of NLVR2 below ``img_raw``: six images a subset."""
    part = "dev" if split == "val" else split
    names = [f"{part}-{n // 6}-{n % 6}-img0" for n in range(6 * count)]
    write_json(folder / "image_splits" / f"split.rc2.{split}.json", {name: f"./{part}/{name}.png" for name in names})
    rows = []
    for n in range(count):
        members = names[6 * n : 6 * n + 6]
        row = {"pairid": 12063 + n, "reference": members[0], "caption": f"has {n} dogs"}
        if split != "test1":
            row |= {"target_hard": members[2], "target_soft": {members[2]: 1.0, members[3]: 0.5}}
        row["img_set"] = {"id": n, "members": members, "reference_rank": 0, "target_rank": 2}
        rows.append(row)
    write_json(folder / "captions" / f"cap.rc2.{split}.json", rows)
    for n, name in enumerate(names):
        write_picture(folder / "img_raw" / part / f"{name}.png", n)


def cirr_parquet(folder: Path, count: int = 3) -> None:
    """As ``royokong/cirr_val`` and ``royokong/cirr_imgs``."""
    names = [f"dev-{n // 6}-{n % 6}-img0" for n in range(6 * count)]
    text = Value("string")
    rows = [
        {
            "candidate": picture(6 * n),
            "candidate_id": names[6 * n],
            "caption": f"has {n} dogs",
            "target": picture(6 * n + 2),
            "target_id": names[6 * n + 2],
            "group": names[6 * n : 6 * n + 6],
            "split": "val",
        }
        for n in range(count)
    ]
    features = dict.fromkeys(("candidate_id", "caption", "target_id", "split"), text) | {"group": ListOf(text)}
    features |= {"candidate": Image(), "target": Image()}
    write_parquet(folder / "cirr_val" / "data" / "val-00000-of-00001.parquet", rows, features)
    gallery = [{"id": name, "img": picture(n), "category": None, "split": "val"} for n, name in enumerate(names)]
    features = {"id": text, "img": Image(), "category": text, "split": text}
    write_parquet(folder / "cirr_imgs" / "data" / "val-00000-of-00001.parquet", gallery, features)


CATEGORIES = ("dress", "shirt", "toptee")


def fashion_iq_files(folder: Path, count: int = 2) -> None:
    """As the repository of FashionIQ, with the images in ``images``: four a category."""
    for c, category in enumerate(CATEGORIES):
        names = [f"B00{c}{n}" for n in range(4)]
        rows = [
            {"candidate": names[n], "target": names[n + 1], "captions": ["is red.", f"has {n} sleeves"]}
            for n in range(count)
        ]
        write_json(folder / "captions" / f"cap.{category}.val.json", rows)
        write_json(folder / "image_splits" / f"split.{category}.val.json", names)
        for n, name in enumerate(names):
            write_picture(folder / "images" / f"{name}.jpg", 4 * c + n)


def fashion_iq_parquet(folder: Path, count: int = 2) -> None:
    """As ``royokong/fashioniq_val`` and ``royokong/fashioniq_val_imgs``."""
    text = Value("string")
    rows, gallery = [], []
    for c, category in enumerate(CATEGORIES):
        names = [f"B00{c}{n}" for n in range(4)]
        for n in range(count):
            rows.append(
                {
                    "candidate": picture(4 * c + n),
                    "candidate_id": names[n],
                    "caption": ["is red.", f"has {n} sleeves"],
                    "target": picture(4 * c + n + 1),
                    "target_id": names[n + 1],
                    "category": category,
                    "split": "val",
                }
            )
        for n, name in enumerate(names):
            gallery.append({"id": name, "img": picture(4 * c + n), "category": category, "split": "val"})
    features = dict.fromkeys(("candidate_id", "target_id", "category", "split"), text)
    features |= {"candidate": Image(), "target": Image(), "caption": ListOf(text)}
    write_parquet(folder / "fashioniq_val" / "data" / "val-00000-of-00001.parquet", rows, features)
    features = {"id": text, "img": Image(), "category": text, "split": text}
    write_parquet(folder / "fashioniq_val_imgs" / "data" / "val-00000-of-00001.parquet", gallery, features)


def mmeb_eval(folder: Path, tasks: Sequence[str], count: int = 3) -> None:
    """As ``TIGER-Lab/MMEB-eval``: one task with texts as candidates, the next one with images, and so on."""
    listed = ListOf(Value("string"))
    features = {
        "qry_text": Value("string"),
        "qry_img_path": Value("string"),
        "tgt_text": listed,
        "tgt_img_path": listed,
    }
    for t, task in enumerate(tasks):
        rows = []
        for n in range(count):
            others = [(n + step) % count for step in range(count)]  # the right one first
            if t % 2 == 0:
                query = ("<|image_1|>\nRepresent the given image for classification\n", f"{task}/{n}.jpg")
                targets = [(f"class {other}", "") for other in others]
            else:
                query = (f"Find me an image that fits: {n}\n", "")
                targets = [("<|image_1|>\nRepresent the given image\n", f"{task}/{other}.jpg") for other in others]
            rows.append(dict(zip(features, (*query, *map(list, zip(*targets, strict=True))), strict=True)))
            write_picture(folder / "images" / task / f"{n}.jpg", 10 * t + n)
        write_parquet(folder / task / "test-00000-of-00001.parquet", rows, features)


def mmeb_train(folder: Path, task: str, count: int = 3, negatives: bool = False) -> None:
    """As ``TIGER-Lab/MMEB-train``, with the images unpacked; the last row's image is missing."""
    rows = []
    for n in range(count):
        row = {"qry": f"<|image_1|>\nWhat is it? {n}\n", "qry_image_path": f"images/{task}/Train/{n}.jpg"}
        row |= {"pos_text": f"thing {n}", "pos_image_path": ""}
        if negatives:
            row |= {"neg_text": f"thing {n + 1}", "neg_image_path": ""}
        rows.append(row)
        if n < count - 1:
            write_picture(folder / "images" / task / "Train" / f"{n}.jpg", n)
    for split in ("original", "diverse_instruction"):
        write_parquet(folder / task / f"{split}-00000-of-00001.parquet", rows, dict.fromkeys(rows[0], Value("string")))
