"""`examples/train.py`: a folder, streamed shards, and what it refuses."""

from __future__ import annotations

import importlib
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformerTrainingArguments
from torch.nn.parallel import replicate

from slq_embed import SLQEncoder, pretrained
from slq_embed.data import from_folder
from tests.captioned import TINY, photos, shards
from tests.scripts import EXAMPLES


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


def test_what_is_missing_is_said_in_a_line(run_example, tmp_path):
    folder, output = photos(tmp_path / "photos", 4), ["--output", tmp_path / "o"]
    (tmp_path / "empty").mkdir()
    for options, message in {
        (): r"Which images\? Give a folder of captioned images with --data, or shards with --stream\.",
        ("--data", "nofolder"): r"There is no folder nofolder\. Give a folder of captioned images with --data",
        ("--data", folder): r"no rows of the split 'train'\. Its splits are: none\..* add --holdout 20\.$",
        ("--data", tmp_path / "empty"): "There is no caption file in .*empty",
        ("--data", folder, "--test", folder): r"--test is another folder .* a part of --data, give --holdout alone\.",
        ("--data", folder, "--test", tmp_path, "--holdout", 2): r"--test is another folder",
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
