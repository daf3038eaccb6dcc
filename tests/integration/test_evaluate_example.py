"""`examples/evaluate.py` from the published files to the table, for every benchmark."""

from __future__ import annotations

import json

import pytest

from slq_embed import SLQEncoder
from slq_embed.evaluation import MMEB_TASKS
from tests import published

TEXTS = [[f"a red circle {n} {i}" for i in range(5)] for n in range(6)]
MAKE = {
    "coco": lambda folder: published.captions_parquet(folder, TEXTS),
    "flickr30k": lambda folder: published.karpathy(folder, TEXTS, "dataset_flickr30k.json"),
    "karr": lambda folder: published.karr_bench(folder, category=["functional"] * 4),
    "cirr": published.cirr_files,
    "fashioniq": published.fashion_iq_parquet,
    "mmeb": lambda folder: published.mmeb_eval(folder, MMEB_TASKS, count=2),
}
EXPECTED = {
    "coco": ("coco: 6 images, 30 texts", "text_to_image_recall@5", "SLQ  SLQ 8B  VLM2Vec-7B"),
    "flickr30k": ("flickr30k: 6 images, 30 texts", "image_to_text_recall@5", "CLIP ViT-L"),
    "karr": ("karr: 4 pairs, 1 categories", "functional_text_to_image_recall@1", "here"),
    "cirr": ("cirr: 18 images, 3 queries", "recall@5", "63.5"),
    "fashioniq": ("fashioniq: 9 images, 6 queries", "mean_recall@50", "43.1"),
    "mmeb": ("mmeb: 36 tasks, 72 queries", "mean", "67.5"),
}


@pytest.mark.parametrize("which", MAKE)
def test_a_benchmark_from_files_to_a_table_and_json(run_example, tmp_path, which):
    MAKE[which](tmp_path / "data")
    options = ["--benchmark", which, "--data", tmp_path / "data", "--limit", 100, "--json", tmp_path / "out.json"]
    output = run_example("evaluate", *options)
    for part in EXPECTED[which]:
        assert part in output
    assert "a part of the data only (--limit 100)" in output
    assert ("instructions={'composed': '{text}'}" in output) == (which == "mmeb")
    result = json.loads((tmp_path / "out.json").read_text())
    metrics = result["metrics"]
    assert EXPECTED[which][1] in metrics
    assert all(0 <= value <= 1 for value in metrics.values())
    for metric in result["paper_percent"]:
        assert metric in metrics, "a figure of the paper without a metric beside it"
    for metric, value in metrics.items():
        assert any(line.split()[:2] == [metric, f"{100 * value:.1f}"] for line in output.splitlines())
    assert list((tmp_path / "evaluation" / f"{which}-slq-tiny{'-val' * (which == 'cirr')}-100").glob("*.npy"))


def test_the_submissions_of_cirr_and_a_run_that_goes_on(run_example, tmp_path, monkeypatch):
    """The second run encodes nothing, and writes the same files."""
    published.cirr_files(tmp_path / "data", "test1")
    options = ["--benchmark", "cirr", "--data", tmp_path / "data", "--limit", 9, "--split", "test1"]
    options += ["--embeddings", tmp_path / "kept"]
    encoded = []
    encode = SLQEncoder.encode_to_file
    monkeypatch.setattr(
        SLQEncoder, "encode_to_file", lambda *a, **kw: (result := encode(*a, **kw), encoded.append(result.encoded))[0]
    )
    output = run_example("evaluate", *options)
    files = {name: tmp_path / "kept" / f"submission_{name}.json" for name in ("recall", "recall_subset")}
    assert all(str(file) in output for file in files.values())
    first = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert first["recall"]["metric"] == "recall"
    assert len(first["recall"]["12063"]) == 17
    assert len(first["recall_subset"]["12065"]) == 3
    assert encoded == [18, 3]
    run_example("evaluate", *options)
    assert encoded == [18, 3, 0, 0]
    assert {name: json.loads(file.read_text()) for name, file in files.items()} == first


def test_what_is_missing_is_said_in_one_line(run_example, tmp_path):
    with pytest.raises(SystemExit, match="neither a parquet file of the split 'test' nor a Karpathy file"):
        run_example("evaluate", "--benchmark", "coco", "--data", tmp_path)


def test_a_part_of_mmeb_is_not_put_beside_the_mean_of_all_tasks(run_example, tmp_path):
    published.mmeb_eval(tmp_path, ["GQA", "NIGHTS"])
    output = run_example("evaluate", "--benchmark", "mmeb", "--data", tmp_path, "--tasks", "GQA,NIGHTS", "--limit", 2)
    assert "mmeb: 2 tasks, 4 queries" in output
    assert "67.5" not in output
