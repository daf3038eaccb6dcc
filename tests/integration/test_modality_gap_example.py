"""`examples/modality_gap.py` draws what it prints."""

from __future__ import annotations

import json
import re

import numpy as np
from PIL import Image

from slq_embed.toy import captions, render, sample_scenes


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels.astype(int) - colour).sum(axis=2) < 40).sum())


def test_a_picture_before_and_after_training(run_example, tmp_path):
    """Both panels show the mean image and the mean text; training brings pairs together and spreads them."""
    output = run_example("modality_gap", "--png", tmp_path / "out" / "gap.png")
    values = {
        name: list(map(float, re.findall(rf"{name} (-?[\d.]+)", output))) for name in ("alignment", "image_uniformity")
    }
    assert values["alignment"][1] < values["alignment"][0]
    assert values["image_uniformity"][1] < values["image_uniformity"][0]
    assert "40 pairs; picture: " in output
    with Image.open(tmp_path / "out" / "gap.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    for half in np.array_split(pixels[96:556], 2, axis=1):
        assert near(half, (0, 114, 178)) > 50
        assert near(half, (230, 120, 0)) > 50


def test_a_folder_of_photos_gives_each_image_one_text(run_example, tmp_path):
    rows = []
    for number, scene in enumerate(sample_scenes(5, "train")):
        render(scene).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "captions": captions(scene)[:2]}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    options = ["--data", tmp_path, "--before", "slq-tiny", "--png", tmp_path / "gap.png"]
    output = run_example("modality_gap", *options)
    assert "5 pairs; picture: " in output
    before, after = (line.partition(": ")[2] for line in output.splitlines()[:2])
    assert before == after
