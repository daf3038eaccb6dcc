"""What `make gpu` does with its pieces: each once, within its time, and what a machine lacks is skipped by name."""

from __future__ import annotations

import importlib
import json

import pytest

from tests.scripts import ROOT

GOOD = "import pathlib, sys; print('it went well'); pathlib.Path(sys.argv[-1]).write_text('{}')"
BAD = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('{}'); sys.exit('no memory')"
SLOW = "import time; time.sleep(60)"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs pieces of these names, as on a GPU; returns a line for each."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    pieces = []
    for name, code, needs in [
        ("bad", BAD, None),
        ("slow", SLOW, None),
        ("other", GOOD, "a_module_that_is_not_there"),
        ("good", GOOD, None),
    ]:
        (tmp_path / f"{name}.py").write_text(code)
        command = (str(tmp_path / f"{name}.py"),)
        pieces.append(gpu.Piece(name, 2 if name == "slow" else 30, command, command, needs))
    modules = {"module": ("-m", "json.tool", "--help"), "tests": ("-m", "json.tool", "no.json")}
    pieces += [gpu.Piece(name, 30, command) for name, command in modules.items()]
    monkeypatch.setattr(gpu, "PIECES", tuple(pieces))
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "none")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)

    def call(*arguments: object) -> list[str]:
        gpu.main([*map(str, arguments), "--output", str(tmp_path / "out")])
        return capsys.readouterr().out.splitlines()

    return call


def test_each_piece_runs_once_and_failures_run_again_at_the_end(run, tmp_path):
    bad, slow, other, good, module, tests = run()
    assert bad.startswith("bad: FAILED after")
    assert bad.endswith("no memory")
    assert slow.startswith("slow: stopped after 2 s")
    assert other == "other: skipped, there is no a_module_that_is_not_there"
    assert good.startswith("good: done in")
    assert good.endswith("it went well")
    assert module.startswith("module: done in")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["good.json", "module.json"]
    assert json.loads((tmp_path / "out" / "module.json").read_text())["exit_code"] == 0
    assert tests.startswith("tests: FAILED after")  # a module writes no results of its own: its exit code counts
    assert "no.json" in (tmp_path / "out" / "tests.log").read_text()
    *done, other, bad, slow, tests = run()
    assert done == [f"{name}: done before, see {tmp_path / 'out' / name}.json" for name in ("good", "module")]
    assert [line.split(":")[0] for line in (other, bad, slow, tests)] == ["other", "bad", "slow", "tests"]
    assert run("--only", "good") == done[:1]


def test_what_does_not_fit_into_the_time_is_not_begun(run):
    lines = run("--minutes", 0.02)
    assert "other: skipped, there is no a_module_that_is_not_there" in lines
    assert all("not begun" in line or "stopped" in line or "FAILED" in line for line in lines if "other" not in line)
    assert any("run the same command again" in line for line in lines)


def test_without_a_gpu_it_says_so(run, monkeypatch):
    monkeypatch.setattr(importlib.import_module("gpu").torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device: skipped\. --rehearse"):
        run()
    assert run("--rehearse", "--only", "good")[0].startswith("good: done")


def test_a_rehearsal_leaves_out_what_needs_a_gpu(run):
    assert run("--rehearse", "--only", "module") == ["module: skipped, nothing of it runs on a CPU"]
