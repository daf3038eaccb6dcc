"""Every Python block of the README runs as written."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from slq_embed.toy import captions, render, sample_scenes

README = (Path(__file__).parents[2] / "README.md").read_text("utf8")
BLOCKS = re.findall(r"(<!-- snippet: [^>]*-->\n)?```python\n(.*?)```", README, flags=re.S)


def test_there_are_blocks():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number, tmp_path, monkeypatch):
    note, code = BLOCKS[number]
    if "needs the hub" in note:
        compile(code, "README.md", "exec")  # test_a_hub_name_is_really_loaded runs its call on a checkpoint
        return
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for name, scene in enumerate(sample_scenes(70, "train")):
        render(scene).save(photos / f"{name}.png")
        rows.append(json.dumps({"image": f"{name}.png", "captions": captions(scene)[:2]}))
    (photos / "captions.jsonl").write_text("\n".join(rows))
    code = code.replace("max_steps=100", "max_steps=2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})


def test_the_commands_exist():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text("utf8")
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert f"\n{target}:" in makefile
