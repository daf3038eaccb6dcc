"""The benchmarks run, and their claims hold at the size of `--quick`."""

from __future__ import annotations

import importlib
import json
from datetime import date

import pytest

from slq_embed import pretrained
from tests.published import write_picture
from tests.scripts import ROOT, run_script


@pytest.mark.slow
def test_training_costs_little_more_than_encoding(tmp_path):
    """A step costs little more than encoding its pairs, and a sixth of that with stored prefixes.

    The bounds are wide: there are three rounds of a small batch. Gradients through the input cost 1.4 x and more.
    """
    run_script("benchmarks/training.py", "--quick", "--json", tmp_path / "result.json", folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    more = ("head", "deep_queries", "query_adapter")
    ours = {f"{part}{stored}" for part in ("prefix", *more) for stored in ("", "_stored")}
    methods = {"encode", *ours, "all_positions", "lora", "full_finetuning"}
    assert set(result["seconds_per_step"]) == set(result["peak_bytes_above_weights"]) == methods
    seconds = result["seconds_per_step"]
    assert seconds["prefix"] <= 1.3 * seconds["encode"]
    assert seconds["prefix_stored"] <= seconds["prefix"] / 6
    for part in more:
        assert seconds[part] <= 1.3 * seconds["prefix"]
        assert seconds[f"{part}_stored"] <= 1.5 * seconds["prefix_stored"]


@pytest.mark.slow
def test_the_other_benchmarks_write_their_json(tmp_path):
    run_script("benchmarks/encoding.py", "--quick", "--json", tmp_path / "encoding.json", folder=tmp_path)
    encoding = json.loads((tmp_path / "encoding.json").read_text())
    assert {"stock_paths", "stock_pil", "slq_images", "bare_images"} <= set(encoding["seconds"])
    assert encoding["largest_difference"] < 1e-5
    options = ["--quick", "--json", tmp_path / "scaling.json", "--parts", "batches", "stores", "sets"]
    run_script("benchmarks/scaling.py", *options, folder=tmp_path)
    scaling = json.loads((tmp_path / "scaling.json").read_text())
    assert scaling["stores"]["keys_values exact disk"]["change"] < 1e-5
    assert scaling["sets"]["4 at once"] < scaling["sets"]["4 in turn"]
    run_script("benchmarks/self_check.py", "--quick", "--json", tmp_path / "check.json", folder=tmp_path)
    check = json.loads((tmp_path / "check.json").read_text())
    assert check["schedule"] == "prefix"
    assert 1 < check["seconds"]["check"] / check["seconds"]["encode"] < 40


@pytest.mark.slow
def test_a_stream_trains_in_constant_memory(tmp_path):
    """A stream of three times the bytes takes no more. A buffer that holds all of it does, so growth would be seen."""
    run_script("benchmarks/streaming.py", "--quick", "--json", tmp_path / "result.json", folder=tmp_path)
    short, long, kept = json.loads((tmp_path / "result.json").read_text())["runs"]
    more = long["bytes"] - short["bytes"]
    assert more > 300e6
    assert long["peak_bytes"] - short["peak_bytes"] < 0.1 * more
    assert kept["peak_bytes"] - long["peak_bytes"] > 0.5 * more


@pytest.mark.slow
def test_the_embedded_models_keep_their_promises(tmp_path):
    run_script("benchmarks/embedded_default.py", "--json", tmp_path / "result.json", folder=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scenes_described_exactly"] >= 0.75
    for wording in ("literal", "implicit"):
        assert result[wording]["slq-tiny"] >= 0.88
        assert result[wording]["mean_of_all_tokens"] < 0.3
    assert result["literal"]["slq-tiny-head"] >= 0.97
    assert result["implicit"]["slq-tiny-head"] >= 0.91


@pytest.mark.slow
def test_quality_compares_methods_and_goes_on(tmp_path):
    options = ["--quick", "--steps", 2, "--methods", "slq", "slq_adapters", "lora", "--output", tmp_path / "runs"]
    run_script("benchmarks/quality.py", *options, "--json", tmp_path / "first.json", folder=tmp_path)
    table = json.loads((tmp_path / "first.json").read_text())
    for method in ("slq", "slq_adapters", "lora"):
        keys = {"literal", "implicit", "answers_kept", "trained_numbers", "seconds", "peak_bytes"}
        assert keys <= table[method].keys()
    assert table["slq"]["same_bits"]
    assert table["slq_adapters"]["same_bits"]
    assert not table["lora"]["same_bits"]
    assert len(table["runs"]) == 3
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "quick").iterdir()}
    run_script("benchmarks/quality.py", *options, folder=tmp_path)  # every run is read, none is made again
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "quick").iterdir()}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Folders in the schema of the photo world, and a backbone that reads them."""
    rows = {
        "flickr8k": [
            {"split": split, "captions": [f"a circle {n}"] * 5} for n, split in enumerate(["train", "val"] * 4)
        ],
        "noto_emoji": [{"kind": "emoji", "name": f"ring {n}", "keywords": ["a big ring", "coin"]} for n in range(4)],
    }
    for name, records in rows.items():
        for number, record in enumerate(records):
            record["image"] = f"images/{number}.png"
            write_picture(tmp_path / "data" / name / record["image"], number)
        (tmp_path / "data" / name / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setenv("SLQ_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SLQ_PHOTO_MLLM", pretrained("mllm-tiny"))


@pytest.mark.slow
def test_quality_reads_photos_and_emoji(photos, tmp_path):
    options = ["--world", "photos", "--steps", 2, "--batch", 4, "--seeds", 0, "--output", tmp_path / "runs"]
    options += ["--methods", "zero_shot", "slq", "full_finetuning", "--prefixes", tmp_path / "prefixes"]
    run_script("benchmarks/quality.py", *options, "--json", tmp_path / "photos.json", folder=tmp_path)
    table = json.loads((tmp_path / "photos.json").read_text())
    assert table["slq"]["same_bits"]
    assert table["slq"]["perplexity"] == table["slq"]["perplexity_before"]
    assert table["full_finetuning"]["perplexity"] != table["full_finetuning"]["perplexity_before"]
    assert {"photos", "photos@1", "image_to_text_photos@10", "knowledge"} <= table["zero_shot"].keys()
    assert list((tmp_path / "prefixes").glob("0-2-4.json"))  # how long computing the prefixes took


@pytest.mark.slow
def test_ablations_go_on(tmp_path):
    options = ["--steps", 1, "--batch", 8, "--seeds", 0, "--groups", "pooling", "prompt", "--output", tmp_path / "runs"]
    run_script("benchmarks/ablations.py", *options, "--json", tmp_path / "first.json", folder=tmp_path)
    groups = json.loads((tmp_path / "first.json").read_text())["groups"]
    assert [len(rows) for rows in groups.values()] == [6, 3]
    literal = [row["seeds"]["literal"][0] for row in groups["pooling"]]
    assert len(set(literal)) > 1  # the pooling was replaced
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "toy").iterdir()}
    assert set(written) == {"pooling-0.json", "prompt-0.json"}
    run_script("benchmarks/ablations.py", *options, folder=tmp_path)  # every group is read, none is trained again
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "toy").iterdir()}


@pytest.mark.slow
def test_objectives_train_on_mined_and_scored_rows(tmp_path):
    names = ["the paper's loss", "three hard negatives", "two captions, both positives", "distillation of lists"]
    options = ["--steps", 2, "--batch", 8, "--seeds", 0, "--only", *names, "--output", tmp_path / "runs"]
    run_script("benchmarks/objectives.py", *options, "--json", tmp_path / "result.json", folder=tmp_path)
    rows = json.loads((tmp_path / "result.json").read_text())["objectives"]
    assert set(rows) == set(names)
    assert len({tuple(row["literal"]) for row in rows.values()}) == len(names)  # each trained something else


@pytest.mark.slow
def test_quantization_changes_little_and_memory_is_counted(tmp_path):
    pytest.importorskip("torchao.prototype.quantization.int4")
    run_script("benchmarks/quantization.py", "--quick", "--json", tmp_path / "quantization.json", folder=tmp_path)
    toy = json.loads((tmp_path / "quantization.json").read_text())["toy"]
    assert toy["int8"]["images"]["least"] > 0.999
    assert toy["int4 packed"]["weight_bytes"] < toy["int8"]["weight_bytes"] < toy["bfloat16"]["weight_bytes"]
    run_script("benchmarks/memory.py", "--quick", "--check", "--json", tmp_path / "memory.json", folder=tmp_path)
    for row in json.loads((tmp_path / "memory.json").read_text())["checks"].values():
        assert abs(row["error"]["weights"]) < 1e-3
        assert abs(row["whole"]) < 0.4


def test_the_page_on_large_corpora_shows_what_the_simulation_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("corpus").main([])
    assert capsys.readouterr().out in (ROOT / "docs/guides/large-corpora.md").read_text("utf8")


def test_what_a_script_writes_has_date_and_versions(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("corpus").main(["--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert date.fromisoformat(result["date"])
    assert set(result["versions"]) == {"torch", "transformers", "sentence_transformers"}
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert "args.json.write" not in script.read_text("utf8"), f"{script.name} does not write by common.write"
