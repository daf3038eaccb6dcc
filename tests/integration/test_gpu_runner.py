"""What `make gpu` does with its pieces: each once, within its time, and what a machine lacks is skipped by name."""

from __future__ import annotations

import importlib
import json
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.scripts import ROOT

GOOD = "import pathlib, sys; print('it went well'); pathlib.Path(sys.argv[-1]).write_text('{}')"
BAD = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('{}'); sys.exit('no memory')"
SLOW = """
import pathlib, subprocess, sys, time
pathlib.Path(sys.argv[-1]).write_text('{"first": 1}')
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""
FOLDER = (
    "import pathlib, sys; pathlib.Path(sys.argv[-3]).mkdir(); pathlib.Path(sys.argv[-3], 'run').touch(); sys.exit(1)"
)


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
        pieces.append(gpu.Piece(name, 3 if name == "slow" else 30, command, command, needs))
    modules = {"module": ("-m", "json.tool", "--help"), "tests": ("-m", "json.tool", "no.json")}
    pieces += [gpu.Piece(name, 30, command) for name, command in modules.items()]
    monkeypatch.setattr(gpu, "PIECES", tuple(pieces))
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)

    def call(*arguments: object, output: str = "out") -> list[str]:
        gpu.main([*map(str, arguments), "--output", str(tmp_path / output)])
        *lines, last = capsys.readouterr().out.splitlines()
        assert last.startswith(f"logs and results: {tmp_path / output}")
        return lines

    return call


@pytest.fixture
def files(tmp_path):
    """What the archive holds: texts by name."""

    def read(archive: str = "out/results.tar") -> dict[str, str]:
        with tarfile.open(tmp_path / archive) as members:
            return {member.name: members.extractfile(member).read().decode() for member in members if member.isfile()}

    return read


@pytest.fixture
def piece(run, monkeypatch, tmp_path):
    """Puts a piece with this code in the place of the others."""

    def replace(code: str, **options: object) -> None:
        (tmp_path / "piece.py").write_text(code)
        gpu = importlib.import_module("gpu")
        monkeypatch.setattr(gpu, "PIECES", (gpu.Piece("piece", 30, (str(tmp_path / "piece.py"),), **options),))

    return replace


def test_each_piece_runs_once_and_failures_run_again_at_the_end(run, files, tmp_path):
    bad, slow, other, good, module, tests = run()
    assert bad.startswith("bad: FAILED after")
    assert bad.endswith("no memory")
    assert slow.startswith("slow: stopped after 3 s")
    assert other == "other: skipped, there is no a_module_that_is_not_there"
    assert good.startswith("good: done in")
    assert good.endswith("it went well")
    assert module.startswith("module: done in")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.tar"]
    done = ["good.json", "module.json"]
    assert [name for name in files() if name.endswith(".json")] == ["bad.partial.json", *done, "slow.partial.json"]
    assert files()["slow.partial.json"] == '{"first": 1}', "what it had when it was stopped"
    assert json.loads(files()["module.json"])["exit_code"] == 0
    assert tests.startswith("tests: FAILED after")  # a module writes no results of its own: its exit code counts
    assert "no.json" in files()["tests.log"]
    *lines, other, bad, slow, tests = run("--only", "good", "module", "other", "bad", "tests", "slow")
    assert lines == [f"{name}: done before, see {name}.json" for name in ("good", "module")]
    assert [line.split(":")[0] for line in (other, bad, slow, tests)] == ["other", "bad", "slow", "tests"]
    assert run("--only", "good") == lines[:1]


def test_what_a_stopped_piece_has_started_does_not_run_on(run, files):
    run("--only", "slow")
    child = int(files()["slow.log"])
    gone, _ = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=1)
    assert gone or not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_what_is_ended_from_outside_keeps_its_results_as_partial(run, files, monkeypatch):
    popen = importlib.import_module("gpu").subprocess.Popen
    wait, seen = popen.wait, []

    def ended(process: Any, limit: float | None = None) -> int:
        if not seen and limit is not None:
            seen.append(limit)
            written, end = Path(process.args[-1]), time.monotonic() + 60
            while not (written.exists() and written.stat().st_size) and time.monotonic() < end:
                time.sleep(0.1)
            raise SystemExit("ended from outside")
        return wait(process, limit)

    monkeypatch.setattr(popen, "wait", ended)
    with pytest.raises(SystemExit, match="from outside"):
        run("--only", "slow")
    assert files()["slow.partial.json"] == '{"first": 1}'
    assert not {"slow.json", "slow.running.json"} & set(files())


def test_wheels_that_pip_refuses_are_left_out(run, piece, files, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "peft-99-cp27-none-any.whl").touch()
    piece("import sys; print(*sys.path, sep='\\n')")
    assert run()[0] == f"without {tmp_path / 'wheels'}, which pip refuses: the machine's own packages alone"
    assert not [line for line in files()["piece.log"].splitlines() if line.endswith("/wheels")]


def test_another_machine_goes_on_from_the_archive_in_the_checkout(run, files, tmp_path):
    run("--only", "bad", "good")
    (tmp_path / "out").rename(tmp_path / "kept")
    assert run("--only", "bad", "good", "module", output="new")[0] == "good: done before, see good.json"
    names = {"bad.log", "bad.partial.json", "good.log", "good.json", "module.log", "module.json"}
    assert set(files("new/results.tar")) == names


def test_a_piece_may_keep_a_folder_of_what_is_done(run, piece, files):
    piece(FOLDER, folder="--runs")
    assert run()[0].startswith("piece: FAILED")
    assert set(files()) == {"piece.log", "piece/run"}
    assert "FileExistsError" in run()[0], "the folder of the first time is there"


def test_carried_wheels_come_before_the_packages_of_the_machine(run, piece, files, tmp_path):
    """And are not compiled."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "peft-99-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peft/__init__.py", "__version__ = '99'")
        wheel.writestr("peft-99.dist-info/METADATA", "Metadata-Version: 2.1\nName: peft\nVersion: 99\n")
        wheel.writestr("peft-99.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("peft-99.dist-info/RECORD", "")
    code = "import importlib.metadata, importlib.util, os; print(importlib.metadata.version('peft'), "
    code += "*sorted(os.listdir(importlib.util.find_spec('peft').submodule_search_locations[0])))"
    piece(code, needs="peft")
    run()
    assert files()["piece.log"] == "99 __init__.py\n"


def test_what_does_not_fit_into_the_time_is_not_begun(run):
    lines = run("--minutes", 0.02)
    assert "other: skipped, there is no a_module_that_is_not_there" in lines
    assert all("not begun" in line and "run the same command again" in line for line in lines if "other" not in line)
    lines = run("--minutes", 0.045, "--only", "slow", "good")  # 2.7 s
    assert lines[0].startswith("slow: stopped after"), "it may take 3 s: 0.7 of them are left"
    assert lines[1].startswith("good: not begun")


def test_without_a_gpu_it_says_so(run, files, monkeypatch):
    monkeypatch.setattr(importlib.import_module("gpu").torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device: skipped\. --rehearse"):
        run()
    assert run("--rehearse", "--only", "good")[0].startswith("good: done")
    assert list(files("out/rehearsal.tar")) == ["good.json", "good.log"]


def test_a_rehearsal_leaves_out_what_needs_a_gpu(run):
    assert run("--rehearse", "--only", "module") == ["module: skipped, nothing of it runs on a CPU"]
