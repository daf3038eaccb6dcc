"""Captioned pictures in the forms that `examples/train.py` reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from slq_embed.toy import captions, render, sample_scenes

TINY = ["--batch", 4, "--queries", 2]


def photos(folder: Path, count: int = 12, per_image: int = 2) -> Path:
    """A folder of captioned pictures; one more is missing."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, scene in enumerate(sample_scenes(count, "train")):
        render(scene).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "captions": captions(scene)[:per_image]}))
    (folder / "captions.jsonl").write_text("\n".join([*rows, json.dumps({"image": "gone.png", "captions": ["x"]})]))
    return folder


def shards(folder: Path, count: int = 12) -> list[Path]:
    """Two WebDataset shards; one image is damaged."""
    files = [folder / "0.tar", folder / "1.tar"]
    scenes = sample_scenes(count, "train")
    for file, part in zip(files, (range(count // 2), range(count // 2, count)), strict=True):
        with tarfile.open(file, "w") as archive:
            for number in part:
                image = io.BytesIO()
                render(scenes[number]).convert("RGB").save(image, "jpeg")
                content = {
                    "jpg": image.getvalue() if number else b"damaged",
                    "txt": captions(scenes[number])[0].encode(),
                }
                for ending, data in content.items():
                    entry = tarfile.TarInfo(f"{number:04}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return files
