"""Every Python block of the README runs as written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text("utf8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the stores
@pytest.mark.parametrize("number", range(2))
def test_a_block_runs(number, gallery, tmp_path, monkeypatch, capsys):
    assert len(BLOCKS) == 2
    (tmp_path / "photos").mkdir()
    for n in range(2):
        shutil.copy(gallery.paths[4 * n], tmp_path / "photos" / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[number], {})
    first = capsys.readouterr().out.splitlines()[0]
    assert first == ("a big red circle", "{'path': 'photos/0.png'}")[number]
