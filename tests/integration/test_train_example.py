"""`examples/train.py`: a folder, streamed shards, several processes, and a run that was killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.toy import captions, render, sample_scenes
from tests.scripts import EXAMPLES

TINY = ["--batch", 4, "--queries", 2]


def photos(folder: Path, count: int = 12) -> Path:
    """A folder of captioned pictures; one more is missing."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, scene in enumerate(sample_scenes(count, "train")):
        render(scene).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "captions": captions(scene)[:2]}))
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


def test_a_missing_file_is_named(run_example, tmp_path):
    with pytest.raises(SystemExit, match=r"no file .*none\.tar\. Give WebDataset shards"):
        run_example("train", "--stream", tmp_path / "none.tar", "--output", tmp_path / "o")


def command(folder: Path, *options: object, processes: int = 1) -> list[str]:
    launcher = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(EXAMPLES / "train.py"), "--data", str(folder), *TINY_TEXT, *map(str, options)]


TINY_TEXT = [str(option) for option in TINY]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_two_processes_share_one_store(tmp_path):
    """The last batch is uneven: 5 images of 2 captions are 3 batches of 4 for 2 processes."""
    folder = photos(tmp_path / "photos", 9)
    options = ["--holdout", 4, "--steps", 6, "--prefixes", tmp_path / "prefixes", "--output", tmp_path / "o"]
    process = subprocess.run(
        command(folder, *options, processes=2), capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("saved to") == 1
    assert SentenceTransformer(str(tmp_path / "o" / "model"), device="cpu").encode("a").shape == (192,)
    assert len(PrefixStore(tmp_path / "prefixes")) == 5 + 10 + 4 + 8  # what is trained on, and what is measured on


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """It ends with the same queries as a run that was not killed."""
    folder = photos(tmp_path / "photos")
    options = ["--holdout", 4, "--steps", 40, "--save-steps", 5]
    killed = tmp_path / "killed"
    run = subprocess.Popen(
        command(folder, *options, "--output", killed),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while run.poll() is None and not (killed / "checkpoint-5" / "trainer_state.json").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it ended before it was killed"
    outputs = []
    for name in ("killed", "whole"):
        process = subprocess.run(
            command(folder, *options, "--output", tmp_path / name),
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        outputs.append(process.stdout)
    assert "going on from" in outputs[0]
    assert "going on from" not in outputs[1]
    one, other = (SLQEncoder(tmp_path / name / "model", device="cpu").queries for name in ("killed", "whole"))
    assert (one - other).abs().max() < 1e-5
