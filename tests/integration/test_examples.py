"""The examples run, on the embedded default and on photos where they are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from slq_embed.data import from_folder, retrieval_set
from slq_embed.toy import captions, render, sample_scenes

ROOT = Path(__file__).parents[2]
PHOTOS = Path(os.environ.get("SLQ_DATA", ROOT.parent / "shared" / "data"))


def run(script: str, *arguments: object, folder: Path = ROOT) -> str:
    command = [sys.executable, "-W", "ignore", str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "SLQ_SMOKE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_demo(tmp_path):
    said = run("examples/demo.py", "--output", tmp_path / "out")
    sheet = Path(said.strip().splitlines()[-1].removeprefix("Contact sheet: "))
    assert sheet == (tmp_path / "out" / "contact_sheet.png").resolve()
    with Image.open(sheet) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100
    assert "implicit_text_to_image_recall@1" in said
    assert "from stock modules" in said
    assert SentenceTransformer(str(tmp_path / "out" / "slq-demo"), device="cpu").encode("a").shape == (192,)


def test_training_on_a_folder_of_photos(tmp_path):
    rows = []
    for number, scene in enumerate(sample_scenes(12, "train")):
        render(scene).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "captions": captions(scene)[:2]}))
    (tmp_path / "captions.jsonl").write_text("\n".join([*rows, json.dumps({"image": "gone.png", "captions": ["x"]})]))
    options = [
        "--data",
        tmp_path,
        "--holdout",
        4,
        "--steps",
        2,
        "--batch",
        4,
        "--queries",
        2,
        "--output",
        tmp_path / "o",
    ]
    said = run("examples/train_flickr8k.py", *options)
    assert "1 skipped: gone.png" in said
    assert "4 images and 8 captions to measure on" in said
    for metric in ("text_to_image_recall@1", "image_to_text_recall@10", "mean_recall"):
        assert metric in said
    assert (tmp_path / "o" / "model" / "adapter_model.safetensors").is_file()


def test_forgetting(tmp_path):
    said = run("examples/forget.py", "--output", tmp_path / "out")
    assert "14 prefixes removed" in said
    assert "   0 prefixes computed for it; the index holds 57 pictures" in said
    assert said.endswith("embeddings differ by 0.0e+00; equal: True\n")


def test_a_sweep(tmp_path):
    said = run("examples/sweep.py", folder=tmp_path).splitlines()
    head = next(number for number, line in enumerate(said) if line.split()[-1] == "mean_recall")
    assert len(said[head:]) == 1 + 5 + 1
    assert sum(line.endswith(" *") for line in said) == 1
    assert "5 query sets in" in said[-1]


def test_one_backbone_retrieves_reranks_and_answers_in_every_framework(tmp_path):
    pytest.importorskip("langchain_chroma")
    said = run("examples/multimodal_rag.py", folder=tmp_path)
    answers = [line for line in said.splitlines() if "the best shows" in line]
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert "red circle" in answers[0]
    for name in ("slq", "langchain", "llama-index"):
        assert f"{name}: 8 pictures for 'a red circle'" in said


@pytest.mark.skipif(not (PHOTOS / "flickr8k").is_dir(), reason=f"no Flickr8k at {PHOTOS}: set SLQ_DATA")
def test_flickr8k_is_read():
    pairs = from_folder(PHOTOS / "flickr8k", split="val", limit=40)
    images, texts, image_of = retrieval_set(pairs)
    assert (len(images), len(texts), max(image_of)) == (40, 200, 39)
    assert images[0].size == (224, 224)


@pytest.mark.slow
def test_the_embedded_models_can_be_made_again(tmp_path):
    said = run("examples/pretrain_mllm_tiny.py", "--output", tmp_path / "mllm", "--vision-steps", 2, "--steps", 2)
    assert "described exactly" in said
    options = ["--backbone", tmp_path / "mllm", "--steps", 2, "--output", tmp_path / "slq"]
    assert "validation implicit: R@1" in run("examples/train_slq_tiny.py", *options, folder=tmp_path)
    assert SentenceTransformer(str(tmp_path / "slq"), device="cpu").encode("a").shape == (192,)


@pytest.mark.slow
def test_the_benchmark_writes_its_json(tmp_path):
    run("benchmarks/training.py", "--quick", "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    methods = {"encode", "prefix", "prefix_stored", "all_positions", "lora", "full_finetuning"}
    assert set(result["seconds_per_step"]) == set(result["peak_bytes_above_weights"]) == methods
    assert all(value > 0 for value in result["seconds_per_step"].values())


@pytest.mark.slow
def test_the_other_benchmarks_write_their_json(tmp_path):
    run("benchmarks/encoding.py", "--quick", "--json", tmp_path / "encoding.json")
    encoding = json.loads((tmp_path / "encoding.json").read_text())
    assert {"stock_paths", "stock_pil", "slq_images", "bare_images"} <= set(encoding["seconds"])
    assert encoding["largest_difference"] < 1e-5
    run("benchmarks/scaling.py", "--quick", "--json", tmp_path / "scaling.json", "--parts", "batches", "stores", "sets")
    scaling = json.loads((tmp_path / "scaling.json").read_text())
    assert scaling["stores"]["keys_values exact disk"]["change"] < 1e-5
    assert scaling["sets"]["4 at once"] < scaling["sets"]["4 in turn"]


@pytest.mark.slow
def test_the_embedded_models_keep_their_promises(tmp_path):
    run("benchmarks/embedded_default.py", "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scenes_described_exactly"] >= 0.75
    for wording in ("literal", "implicit"):
        assert result[wording]["slq_tiny"] >= 0.88
        assert result[wording]["mean_of_all_tokens"] < 0.15
