"""The README's blocks run as they stand, one after the other, and find what they ask for."""

from __future__ import annotations

import re
from pathlib import Path

from slq_embed.toy import Scene, Thing, render, sample_scenes

README = Path(__file__).parents[1] / "README.md"


def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    shown = [Scene("single", Thing("red", "circle"), detail="big"), *sample_scenes(6, "test")]
    for number, scene in enumerate(shown):
        render(scene).save(f"photos/{number}.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert len(printed) == 5
    assert printed[0].endswith(" 0.png")
    assert printed[3:] == ["0.png", "0.png"]
