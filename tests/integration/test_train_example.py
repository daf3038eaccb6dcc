"""`examples/train.py`: a folder, streamed shards, several processes, and a run that was killed."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor
from torch.nn.parallel import replicate

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.data import from_folder
from slq_embed.toy import captions, render, sample_scenes
from tests.scripts import EXAMPLES

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


def test_a_folder_of_photos(run_example, tmp_path):
    options = ["--data", photos(tmp_path), "--holdout", 4, "--steps", 2, *TINY, "--eval-steps", 1, "--projection"]
    output = run_example("train", *options, "--output", tmp_path / "o")
    assert "1 skipped: gone.png" in output
    assert "4 images and 8 captions to measure on" in output
    for metric in ("text_to_image_recall@1", "image_to_text_recall@10", "mean_recall"):
        assert metric in output
    assert output.count("'eval_mean_recall'") == 2
    assert "'train_samples_per_second'" in output
    assert (tmp_path / "o" / "model" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed: pip install tensorboard")
def test_a_run_is_written_for_tensorboard(run_example, tmp_path):
    """Loss, recall during the training, seconds and pairs a second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--data", photos(tmp_path), "--holdout", 4, "--steps", 10, *TINY, "--eval-steps", 5]
    output = run_example("train", *options, "--report-to", "tensorboard", "--output", tmp_path / "o")
    (file,) = (tmp_path / "o").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    values = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert values["train/loss"][10] > 0
    assert set(values["eval/mean_recall"]) == {5, 10}
    after = float(re.search(r"mean_recall: .* -> +([\d.]+)%", output).group(1))
    assert values["eval/mean_recall"][10] == pytest.approx(after / 100, abs=1e-3)
    seconds, speed = values["train/train_runtime"][10], values["train/train_samples_per_second"][10]
    assert seconds * speed == pytest.approx(10 * 4, rel=0.05)


def test_a_folder_without_splits_and_another_to_measure_on(run_example, tmp_path):
    options = ["--data", photos(tmp_path / "a", 6), "--test", photos(tmp_path / "b", 4), "--steps", 1, *TINY]
    output = run_example("train", *options, "--output", tmp_path / "o")
    assert "12 captions to train on" in output
    assert "4 images and 8 captions to measure on" in output


def test_streamed_shards(run_example, tmp_path):
    options = ["--columns", "jpg", "txt", "--test", photos(tmp_path / "photos", 4), "--steps", 2, *TINY]
    output = run_example("train", "--stream", *shards(tmp_path), *options, "--output", tmp_path / "o")
    assert "1 skipped: row 0" in output
    assert "4 images and 8 captions to measure on" in output
    assert SLQEncoder(tmp_path / "o" / "model", device="cpu").queries.shape == (2, 192)


def test_a_stream_is_mixed_anew_in_each_epoch(run_example, tmp_path, monkeypatch):
    """The same in each process and run; the captions of an image come apart, and a bad row keeps its number in the files."""
    monkeypatch.syspath_prepend(EXAMPLES)
    stream = importlib.import_module("train").stream
    files = list(map(str, shards(tmp_path)))
    pairs, again = (stream(files, "jpg", "txt", buffer=100, seed=3) for _ in range(2))

    def labels(dataset):
        return [row["label"] for row in dataset]

    first = labels(pairs.dataset)
    assert sorted(first) == list(range(11))
    assert first != sorted(first)
    assert labels(again.dataset) == first
    assert [row.name for row in pairs.skipped] == ["row 0"]
    pairs.dataset.set_epoch(1)
    assert sorted(labels(pairs.dataset)) == sorted(first)
    assert labels(pairs.dataset) != first
    assert labels(stream(files, "jpg", "txt", buffer=1).dataset) == sorted(first)


def test_a_streamed_run_goes_on_with_the_rows_that_are_left(run_example, tmp_path):
    options = ["--stream", *shards(tmp_path), "--columns", "jpg", "txt", "--steps", 2, *TINY, "--save-steps", 1]
    run_example("train", *options, "--output", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1")
    assert "going on from" in run_example("train", *options, "--output", tmp_path / "cut")
    one, other = (SLQEncoder(tmp_path / name / "model", device="cpu").queries for name in ("whole", "cut"))
    assert (one - other).abs().max() < 1e-5


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


def test_what_is_missing_is_said_in_a_line(run_example, tmp_path):
    folder, output = photos(tmp_path / "photos", 4), ["--output", tmp_path / "o"]
    (tmp_path / "empty").mkdir()
    for options, message in {
        (): r"Which images\? Give a folder of captioned images with --data, or shards with --stream\.",
        ("--data", "nofolder"): r"There is no folder nofolder\. Give a folder of captioned images with --data",
        ("--data", folder): r"no rows of the split 'train'\. Its splits are: none\..* add --holdout 20\.$",
        ("--data", tmp_path / "empty"): "There is no caption file in .*empty",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run_example("train", *options, *output)


def test_a_run_with_other_settings_does_not_go_on(run_example, tmp_path):
    """Other queries do not fit the checkpoint; with another learning rate, a finished run would be taken for the new one."""
    options = ["--data", photos(tmp_path / "photos", 6), "--holdout", 2, *TINY, "--steps", 1, "--save-steps", 1]
    output = ["--output", tmp_path / "o"]
    run_example("train", *options, *output)
    for other, message in (
        (["--queries", 3], "--queries was 2, and is 3"),
        (["--learning-rate", 1e-3], r"--learning-rate was 0\.02, and is 0\.001"),
    ):
        with pytest.raises(SystemExit, match=rf"has a run with other settings: {message}\. Give another --output"):
            run_example("train", *options, *output, *other)
    assert "going on from" in run_example("train", *options, *output, "--steps", 2, "--chunk", 2)


@pytest.mark.parametrize("holdout", [12, 300, -1])
def test_more_images_to_hold_out_than_there_are(run_example, tmp_path, holdout):
    message = (
        rf"--holdout is {holdout}, but .* has 12 images that can be read\. Hold out at least one, and fewer than all"
    )
    with pytest.raises(SystemExit, match=message):
        run_example("train", "--data", photos(tmp_path), "--holdout", holdout, "--output", tmp_path / "o")


def too_few(folder: Path, batch: int) -> list[object]:
    """Options of one step on 8 photos with two captions each."""
    options = ["--data", photos(folder), "--holdout", 4, "--output", folder / "o"]
    return [*options, "--queries", 2, "--batch", batch, "--steps", 1]


def test_more_processes_than_the_data_fills_are_refused(run_example, tmp_path, monkeypatch):
    """Hosts drop what does not fill a batch in each process. They would train nothing, and end as if all were well."""
    monkeypatch.setattr(SentenceTransformerTrainingArguments, "world_size", 4)
    options = too_few(tmp_path, 20)
    message = r"A step takes 20 pairs, 5 in each of 4 processes, but there are 16 to train on\. .* lower --batch"
    with pytest.raises(SystemExit, match=message):
        run_example("train", *options)


def test_a_run_without_a_step_saves_no_model(run_example, tmp_path, monkeypatch):
    """Where the rows would do and the different images do not: 8 images fill no batch of 10."""
    example = importlib.import_module("train")
    build = example.build_trainer
    monkeypatch.setattr(example, "build_trainer", lambda *args, **more: build(*args, **more, dataloader_drop_last=True))
    options = too_few(tmp_path, 10)
    with pytest.raises(
        SystemExit, match=r"Nothing was trained: .* batch of 10 different images in each of 1 processes"
    ):
        run_example("train", *options)
    assert not (tmp_path / "o" / "model").exists()


def test_one_process_with_several_gpus_is_refused(run_example, tmp_path, monkeypatch):
    """The trainer would wrap the model in nn.DataParallel. A backbone that lies on several GPUs is not wrapped."""
    monkeypatch.syspath_prepend(EXAMPLES)
    build = importlib.import_module("train").build_trainer
    monkeypatch.setattr(SentenceTransformerTrainingArguments, "n_gpu", property(lambda args: args._n_gpu or 2))
    options = ["--data", photos(tmp_path), "--holdout", 4, "--output", tmp_path / "o", *TINY]
    with pytest.raises(SystemExit, match=r"One process has 2 GPUs, .* torchrun --nproc-per-node 2"):
        run_example("train", *options)
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.backbone.hf_device_map = {"model.visual": 0, "model.language_model": "disk"}
    assert not hasattr(model, "hf_device_map")
    model.backbone.hf_device_map = {"model.visual": 0, "model.language_model": 1}
    pairs = from_folder(tmp_path).dataset
    assert build(model, pairs, batch=4, chunk=4, output_dir=str(tmp_path / "o")).args.n_gpu == 1


def test_data_parallel_is_refused(encoder, monkeypatch):
    """Here without GPUs, so nothing is copied to them."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [tensors for _ in devices]
    )
    with pytest.raises(RuntimeError, match=r"SLQEncoder was wrapped in nn\.DataParallel.*torchrun"):
        replicate(encoder, [0, 1])


def test_a_missing_file_is_named(run_example, tmp_path):
    with pytest.raises(SystemExit, match=r"no file .*none\.tar\. Give WebDataset shards"):
        run_example("train", "--stream", tmp_path / "none.tar", "--output", tmp_path / "o")


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
