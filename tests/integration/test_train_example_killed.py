"""`examples/train.py`: runs that were killed, and runs of several processes."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from slq_embed import PrefixStore, SLQEncoder
from tests.captioned import TINY, photos, shards
from tests.scripts import EXAMPLES

TINY_TEXT = [str(option) for option in TINY]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ONE = (sys.executable, "-W", "ignore")
TORCHRUN = (*ONE, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = (*ONE, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
ACCELERATE += ("--mixed_precision=no", "--dynamo_backend=no")  # what it would say that it assumes


def command(launcher: tuple[str, ...], *options: object) -> list[str]:
    return [*launcher, str(EXAMPLES / "train.py"), *TINY_TEXT, *map(str, options)]


def launch(launcher: tuple[str, ...], *options: object) -> str:
    """What the example prints, run to its end."""
    process = subprocess.run(
        command(launcher, *options), capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def queries(output: Path) -> Tensor:
    return SLQEncoder(output / "model", device="cpu").queries.detach()


def assert_close(output: Path, other: Path) -> None:
    difference = (queries(output) - queries(other)).abs().max()
    assert difference < 1e-5, difference


@pytest.fixture
def whole_run(run_example, tmp_path) -> tuple[list[object], Path]:
    """The options and the folder of a run with two checkpoints."""
    options = ["--data", photos(tmp_path / "photos", 6), "--holdout", 2, "--steps", 2, *TINY, "--save-steps", 1]
    run_example("train", *options, "--output", tmp_path / "whole")
    return options, tmp_path / "whole"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


WRITTEN = {  # in the order in which the trainer writes
    "nothing yet": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "a part of the model": lambda folder: [
        path.unlink() for path in folder.iterdir() if path.is_file() and path.name != "adapter_model.safetensors"
    ],
    "half the optimizer": lambda folder: [
        cut(folder / "optimizer.pt"),
        *(path.unlink() for path in [*folder.glob("rng*"), folder / "scheduler.pt", folder / "trainer_state.json"]),
    ],
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half the state": lambda folder: cut(folder / "trainer_state.json"),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_run_that_was_killed_while_it_saved_goes_on_from_the_checkpoint_before(
    run_example, tmp_path, whole_run, written
):
    """The half one is named, and whole when the run has come there."""
    options, whole = whole_run
    output = shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(output / "model")
    WRITTEN[written](output / "checkpoint-2")
    printed = run_example("train", *options, "--output", output)
    assert f"{output / 'checkpoint-2'} is left out, because it was not written to its end" in printed
    assert f"going on from {output / 'checkpoint-1'};" in printed
    assert_close(output, whole)
    names = [sorted(path.name for path in (folder / "checkpoint-2").iterdir()) for folder in (whole, output)]
    assert names[0] == names[1]
    printed = run_example("train", *options, "--output", output)
    assert "left out" not in printed
    assert f"going on from {output / 'checkpoint-2'};" in printed


@pytest.mark.parametrize("steps", [2, 1])
def test_a_run_that_has_all_its_steps_takes_none_more(run_example, tmp_path, whole_run, steps):
    """Killed before its model was saved, it saves that of the last checkpoint; also where fewer steps are asked for than it has."""
    options, whole = whole_run
    output = shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(output / "model")
    for _ in range(3):
        printed = run_example("train", *options, "--output", output, "--steps", steps)
    assert f"going on from {output / 'checkpoint-2'};" in printed
    assert f"all {steps} steps are done" in printed
    assert torch.equal(queries(output), queries(whole))
    assert (
        SLQEncoder(output / "model", device="cpu").temperature == SLQEncoder(whole / "model", device="cpu").temperature
    )
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_was_killed_at_its_first_checkpoint_begins_anew(run_example, tmp_path, whole_run):
    """With other settings, too: there is nothing that they could spoil."""
    options, whole = whole_run
    output = tmp_path / "killed"
    shutil.copytree(whole / "checkpoint-1", output / "checkpoint-1")
    (output / "checkpoint-1" / "trainer_state.json").unlink()
    (output / "run.json").write_text('{"seed": 5}')
    printed = run_example("train", *options, "--output", output)
    assert f"{output / 'checkpoint-1'} is left out" in printed
    assert "going on from" not in printed
    assert_close(output, whole)


def test_a_checkpoint_of_several_processes_has_the_random_states_of_all(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    last_checkpoint = importlib.import_module("train").last_checkpoint

    def write(step: int, *processes: object) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        for process in processes:
            torch.save({}, folder / f"rng_state{process}.pth")
        (folder / "trainer_state.json").write_text("{}")
        return folder

    assert last_checkpoint(tmp_path / "nowhere", 2) == (None, [])
    (tmp_path / "checkpoint-best").mkdir()
    nine, ten = write(9, "_0", "_1"), write(10, "_0")
    assert last_checkpoint(tmp_path, 2) == (nine, [ten])
    assert last_checkpoint(tmp_path) == (ten, [])  # one process needs no other's
    write(10, "_1")
    assert last_checkpoint(tmp_path, 2) == (ten, [])
    assert last_checkpoint(tmp_path, 4) == (ten, [])  # the run had two
    cut(ten / "rng_state_1.pth")
    assert last_checkpoint(tmp_path, 2) == (nine, [ten])
    eleven = write(11, "")
    assert last_checkpoint(tmp_path, 2) == (eleven, [])  # one process wrote it


@pytest.fixture
def full_batches(monkeypatch) -> None:
    """One process in this test takes full batches only, as several do."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train")
    build = example.build_trainer
    monkeypatch.setattr(example, "build_trainer", lambda *args, **more: build(*args, **more, dataloader_drop_last=True))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
@pytest.mark.usefixtures("full_batches")
def test_two_processes_train_as_one_does(run_example, tmp_path, launcher):
    """An epoch of 10 pairs is two batches of 4; the last 2 pairs, which do not fill one, are left out in both."""
    folder = photos(tmp_path / "photos", 14, per_image=1)
    options = ["--data", folder, "--holdout", 4, "--steps", 5]
    launch(launcher, *options, "--output", tmp_path / "two")
    run_example("train", *TINY, *options, "--output", tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("full_batches")
def test_two_processes_train_on_a_stream_as_one_does(run_example, tmp_path):
    """Each takes its own rows of the stream. 11 pairs are two batches of 4; the last step is in the second pass."""
    options = ["--stream", *shards(tmp_path), "--columns", "jpg", "txt", "--steps", 3]
    assert "1 skipped: row 0" in launch(TORCHRUN, *options, "--output", tmp_path / "two")
    run_example("train", *TINY, *options, "--output", tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_share_one_store(tmp_path):
    """The last batch is uneven: 5 images of 2 captions are 3 batches of 4 for 2 processes."""
    folder = photos(tmp_path / "photos", 9)
    options = ["--data", folder, "--holdout", 4, "--steps", 6]
    printed = launch(TORCHRUN, *options, "--prefixes", tmp_path / "prefixes", "--output", tmp_path / "o")
    assert printed.count("saved to") == 1
    assert SentenceTransformer(str(tmp_path / "o" / "model"), device="cpu").encode("a").shape == (192,)
    assert len(PrefixStore(tmp_path / "prefixes")) == 5 + 10 + 4 + 8  # what is trained on, and what is measured on


def ranks(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if str(EXAMPLES / "train.py") in child.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE, TORCHRUN], ids=["one process", "one of two"])
def test_a_killed_run_goes_on(tmp_path, launcher):
    """It ends with the same queries as a run that was not killed. Where one of two is killed, the other one ends, too."""
    options = ["--data", photos(tmp_path / "photos"), "--holdout", 4, "--steps", 40, "--save-steps", 5]
    killed = tmp_path / "killed"
    run = subprocess.Popen(
        command(launcher, *options, "--output", killed),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while run.poll() is None and not (killed / "checkpoint-5" / "trainer_state.json").exists():
        time.sleep(0.05)
    if launcher is ONE:
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended before it was killed"
    else:
        first, second = ranks(run)
        second.send_signal(signal.SIGKILL)
        assert run.wait(120) == 1
        assert not first.is_running()
    assert not (killed / "model").exists()
    assert "going on from" in launch(launcher, *options, "--output", killed)
    assert "going on from" not in launch(launcher, *options, "--output", tmp_path / "whole")
    assert_close(killed, tmp_path / "whole")
