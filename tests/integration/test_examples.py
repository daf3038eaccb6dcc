"""The examples run, on the embedded default and on photos where they are at hand."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder
from slq_embed.data import from_folder, retrieval_set
from slq_embed.inputs import read_image
from tests.scripts import EXAMPLES, ROOT, run_script

PHOTOS = Path(os.environ.get("SLQ_DATA", ROOT.parent / "shared" / "data"))


def test_every_example_is_a_script_with_a_main():
    """Its ``main`` takes arguments, and runs where the file is run."""
    for path in sorted(EXAMPLES.glob("*.py")):
        code = path.read_text("utf8")
        assert "\ndef main(argv: list[str] | None = None) -> None:\n" in code, path.name
        assert code.endswith('\n\nif __name__ == "__main__":\n    main()\n'), path.name


def test_the_demo(run_example, tmp_path):
    output = run_example("demo", "--output", tmp_path / "out")
    sheet = Path(output.strip().splitlines()[-1].removeprefix("Contact sheet: "))
    assert sheet == (tmp_path / "out" / "contact_sheet.png").resolve()
    with Image.open(sheet) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100
    assert "implicit_text_to_image_recall@1" in output
    assert "from stock modules" in output
    assert SentenceTransformer(str(tmp_path / "out" / "slq-demo"), device="cpu").encode("a").shape == (192,)


def test_forgetting(run_example, tmp_path):
    output = run_example("forget", "--output", tmp_path / "out")
    assert "8 prefixes removed" in output
    assert "   0 prefixes computed for it; the index holds 28 pictures" in output
    assert output.endswith("embeddings differ by 0.0e+00; equal: True\n")


@pytest.mark.slow
def test_a_sweep(tmp_path):
    """In a process of its own, as a user runs it: it finds the example that it imports from."""
    lines = run_script("examples/sweep.py", folder=tmp_path).splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[-1] == "mean_recall")
    assert len(lines[head:]) == 1 + 5 + 1
    assert sum(line.endswith(" *") for line in lines) == 1
    assert "5 query sets in" in lines[-1]


def test_one_backbone_retrieves_reranks_and_answers_in_every_framework(run_example, tmp_path):
    pytest.importorskip("langchain_chroma")
    output = run_example("multimodal_rag")
    answers = [line for line in output.splitlines() if "the best shows" in line]
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert "red circle" in answers[0]
    for name in ("slq", "langchain", "llama-index"):
        assert f"{name}: 8 pictures for 'a red circle'" in output


@pytest.mark.skipif(not (PHOTOS / "flickr8k").is_dir(), reason=f"no Flickr8k at {PHOTOS}: set SLQ_DATA")
def test_flickr8k_is_read():
    pairs = from_folder(PHOTOS / "flickr8k", split="val", limit=40)
    images, texts, image_of = retrieval_set(pairs)
    assert (len(images), len(texts), max(image_of)) == (40, 200, 39)
    assert read_image(images[0]).size == (224, 224)


@pytest.mark.parametrize("size", [4, 64])
def test_toy_batches_have_the_size_that_was_asked_for(monkeypatch, size):
    monkeypatch.syspath_prepend(EXAMPLES)
    assert len(importlib.import_module("train_slq_tiny").near_twins(3, size, Random(0))) == 3 * size


@pytest.mark.slow
def test_the_embedded_models_can_be_made_again(tmp_path):
    options = ["--output", tmp_path / "mllm", "--vision-steps", 2, "--steps", 2]
    output = run_script("examples/pretrain_mllm_tiny.py", *options, folder=tmp_path)
    assert "described exactly" in output
    options = ["--backbone", tmp_path / "mllm", "--steps", 2, "--output", tmp_path]
    parts = ["--parts", "queries", "deep", "head", "adapter"]
    output = run_script("examples/train_slq_tiny.py", *options, *parts, folder=tmp_path)
    assert "head trained (40,129 numbers): R@1 validation literal" in output
    for name in ("slq-tiny", "slq-tiny-head"):
        assert not (tmp_path / name / "model.safetensors").exists()  # the backbone's file serves them
        assert SentenceTransformer(str(tmp_path / name), device="cpu").encode("a").shape == (192,)
    for name in ("slq-tiny-deep", "slq-tiny-adapter"):
        assert SLQEncoder(tmp_path / name, device="cpu").encode("a").shape == (192,)
