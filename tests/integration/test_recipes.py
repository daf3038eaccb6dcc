"""`examples/train_recipe.py`: from the published files to a trained model, and the dry run that says before what it takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from slq_embed import SLQEncoder
from slq_embed.toy import captions, render, sample_scenes
from tests import published
from tests.scripts import EXAMPLES, ROOT


@pytest.fixture
def script(monkeypatch):
    """A module of the examples or benchmarks."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def coco(folder: Path, count: int = 10) -> None:
    """As the Karpathy split of COCO: six images to train on, two of them restval, two to validate and two to test."""
    splits = ["train", "train", "train", "train", "restval", "restval", "val", "val", "test", "test"]
    rows = []
    for number, (scene, split) in enumerate(zip(sample_scenes(count, "train"), splits, strict=True)):
        filepath = "train2014" if split == "train" else "val2014"
        name = f"COCO_{filepath}_{number:012}.jpg"
        (folder / filepath).mkdir(parents=True, exist_ok=True)
        render(scene).save(folder / filepath / name)
        sentences = [{"raw": text, "tokens": text.split(), "imgid": number} for text in captions(scene)]
        rows.append({"filepath": filepath, "filename": name, "imgid": number, "split": split, "sentences": sentences})
    published.write_json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})


TINY = ["--backbone", "mllm-tiny", "--queries", 2, "--batch", 4, "--chunk", 2, "--learning-rate", 0.02]


def test_coco_from_files_to_a_saved_model_that_goes_on_where_it_was(run_example, tmp_path):
    coco(tmp_path / "coco")
    (tmp_path / "coco" / "val2014" / "COCO_val2014_000000000005.jpg").write_bytes(b"damaged")
    options = ["--data", "coco", *TINY, "--path", tmp_path / "coco", "--output", tmp_path / "out", "--limit", 6]
    output = run_example("train_recipe", *options, "--steps", 2, "--save-steps", 1)
    assert "25 pairs to train on; 1 skipped: COCO_val2014_000000000005.jpg" in output
    assert "385 numbers to train; batch 4, chunk 2, epochs 5, learning_rate 0.02, queries 2, temperature 0.07" in output
    assert any(line.split()[0] == "text_to_image_recall@1" for line in output.splitlines() if line.strip())
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 <= metrics["mean_recall"] <= 1
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    written = (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    output = run_example("train_recipe", *options, "--steps", 3, "--save-steps", 1)
    assert f"going on from {tmp_path / 'out' / 'checkpoint-2'}" in output
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    again = (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    assert again == written, "the second step was taken once"
    saved = SLQEncoder(tmp_path / "out" / "model", device="cpu")
    assert saved.temperature != pytest.approx(0.07, abs=1e-6)
    assert saved.encode("a red circle").shape == (192,)


def test_captions_of_one_image_are_siblings_and_restval_is_trained_on(script, tmp_path):
    coco(tmp_path)
    rows, skipped = script("train_recipe").read_coco(tmp_path, None, None)
    assert not skipped
    names = [Path(row["image"]["path"]).name for row in rows]
    assert len(rows) == 30
    assert all("_00000000000" in name and int(name[-7:-4]) < 6 for name in names)
    assert rows["label"] == [number for number in range(6) for _ in range(5)]
    limited, _ = script("train_recipe").read_coco(tmp_path, None, 5)
    assert max(limited["label"]) == 4
    of_train_alone, _ = script("train_recipe").read_coco(tmp_path, None, 4)
    assert max(of_train_alone["label"]) == 3


def test_mmeb_trains_on_its_twenty_sets(run_example, script, tmp_path):
    recipe = script("train_recipe")
    for name in (*recipe.MMEB_SETS, "FashionIQ"):  # one of the six more that are published
        published.mmeb_train(tmp_path / "mmeb", name, count=3, negatives=name == "CIRR")
    options = ["--data", "mmeb", *TINY, "--path", tmp_path / "mmeb", "--output", tmp_path / "out", "--steps", 2]
    output = run_example("train_recipe", *options)
    assert "40 pairs to train on; 20 skipped: A-OKVQA, row 2 (there is no image images/A-OKVQA/Train/2.jpg)" in output
    assert output.count("there is no image") == 5
    assert "not measured: give the folder of MMEB-eval" in output
    model = SLQEncoder(tmp_path / "out" / "model", device="cpu")
    assert model.slq_config.instructions["composed"] == "{text}"


def test_a_store_is_planned_for_all_sets(script, tmp_path, monkeypatch):
    recipe = script("train_recipe")
    monkeypatch.setattr(recipe, "MMEB_SETS", ("ImageNet_1K", "CIRR"))
    monkeypatch.setattr(recipe, "plan_prefixes", lambda model, rows, *more, **options: exit(f"plan of {len(rows)}"))
    for name in recipe.MMEB_SETS:
        published.mmeb_train(tmp_path, name, count=3, negatives=name == "CIRR")
    options = ["--data", "mmeb", *map(str, TINY), "--path", str(tmp_path), "--prefixes", str(tmp_path / "kept")]
    with pytest.raises(SystemExit, match="plan of 4"):
        recipe.main([*options, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("name", "option", "value", "needed"),
    [
        ("train", "--steps", "-1", "-1, but at least 1 is needed"),
        ("train_recipe", "--batch", "0", "0, but at least 1 is needed"),
        ("train_recipe", "--utilisation", "0", "0.0, but a share above 0 and up to 1 is needed"),
    ],
)
def test_a_number_that_an_option_cannot_have_is_named(script, capsys, name, option, value, needed):
    with pytest.raises(SystemExit):
        script(name).parse([*(["--data", "coco", "--backbone", "x"] if name == "train_recipe" else []), option, value])
    assert f"argument {option}: {needed}" in capsys.readouterr().err


def test_equal_targets_of_mmeb_are_no_negatives(script, tmp_path, monkeypatch):
    recipe = script("train_recipe")
    monkeypatch.setattr(recipe, "MMEB_SETS", ("ImageNet_1K",))
    text = dict.fromkeys(("qry", "qry_image_path", "pos_text", "pos_image_path"), published.Value("string"))
    rows = [dict(zip(text, (f"what? {n}", "", f"class {n % 2}", ""), strict=True)) for n in range(4)]
    published.write_parquet(tmp_path / "ImageNet_1K" / "original-00000-of-00001.parquet", rows, text)
    assert recipe.read_mmeb(tmp_path, None, None)[0]["ImageNet_1K"]["label"] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("coco", r"neither a parquet file .* royokong/coco_test .* \(Karpathy split\) with train2014 and val2014"),
        ("flickr30k", r"neither a parquet file .* royokong/flickr30k_test .* with the images of Flickr30K"),
        ("mmeb", r"20 of the 20 sets of MMEB-train are missing .* TIGER-Lab/MMEB-train, with its images_zip"),
    ],
)
def test_what_is_missing_is_said_in_one_message(run_example, tmp_path, data, message):
    with pytest.raises(SystemExit, match=message):
        run_example("train_recipe", "--data", data, *TINY, "--path", tmp_path)


def test_images_that_are_elsewhere_are_asked_for_before_anything_is_read(script, tmp_path):
    coco(tmp_path)
    for folder in ("train2014", "val2014"):
        (tmp_path / folder).rename(tmp_path / f"moved_{folder}")
    with pytest.raises(FileNotFoundError, match=r"None of the first images of .*, such as train2014/COCO_train2014_0"):
        script("train_recipe").read_coco(tmp_path, None, None)


def test_the_tables_have_the_papers_settings(script):
    recipe = script("train_recipe")

    def settings(data, backbone, *more):
        args = recipe.parse(["--data", data, "--backbone", backbone, *more])
        recipe.resolve(args)
        return args.queries, args.batch, args.epochs, args.learning_rate, args.warmup_steps, args.temperature

    assert settings("coco", "qwen3-vl-2b") == (20, 1024, 5, 5e-4, 100, 0.07)
    assert settings("mmeb", "qwen3-vl-4b") == (20, 1024, 1, 5e-4, 100, 0.07)
    assert settings("flickr30k", "internvl3-1b") == (20, 1024, 5, 1e-5, 100, 0.07)
    assert settings("coco", "internvl3-8b", "--epochs", "1") == (20, 512, 1, 1e-5, 100, 0.07)
    assert set(recipe.BACKBONES) <= set(script("shapes").SHAPES)


def test_the_batch_is_shared_out_and_the_temperature_has_a_rate_of_its_own(script, encoder, tmp_path, monkeypatch):
    recipe = script("train_recipe")
    args = recipe.parse(["--data", "coco", "--backbone", "qwen3-vl-2b", "--output", str(tmp_path)])
    data, _ = recipe.resolve(args)
    monkeypatch.setattr(SentenceTransformerTrainingArguments, "world_size", 4)
    rows = script("dry_run").build_rows(2, (32, 32), data.words)
    trainer = recipe.trainer_of(args, encoder, rows, use_cpu=True)
    assert trainer.args.per_device_train_batch_size == 256
    assert trainer.loss.gather_across_devices
    assert trainer.loss.mini_batch_size == 32
    groups = trainer.create_optimizer().param_groups
    rates = {sum(weight.numel() for weight in group["params"]): group["lr"] for group in groups if group["params"]}
    assert rates == {4 * 32: 5e-4, 1: pytest.approx(5e-4 / 0.07)}


KINDS = ("qwen3_vl", "internvl")


def deeper(folder: Path, text: int, vision: int):
    """The configuration of a checkpoint with more layers."""
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = text
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:1] * text
    name = "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers"
    setattr(config.vision_config, name, vision)
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    return config


def counted(script, folder: Path, config, layers: int | None, inputs: list):
    """The cost by a model with few layers of a configuration, or with all."""
    dry_run = script("dry_run")
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config).base_model
    backbone = dry_run.build_backbone(dry_run.cut_layers(config, layers), "cpu", torch.float32)
    model = SLQEncoder.from_backbone(
        backbone, AutoProcessor.from_pretrained(folder), num_queries=4, backbone_name="x", device="cpu"
    )
    return script("run_cost").count(model, whole, inputs), model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["image", "text"])
def test_two_layers_tell_what_torchs_counter_counts_with_all(script, checkpoint, images, kind, column):
    """FLOPs exactly; bytes of a chunk within a fifth."""
    inputs = [images[0], images[0].rotate(90)] if column == "image" else ["a red circle", "a blue square"]
    config = deeper(checkpoint(kind), text=6, vision=5)
    few, _ = counted(script, checkpoint(kind), config, 2, inputs)
    every, model = counted(script, checkpoint(kind), config, None, inputs)
    features = model.preprocess(inputs, keyed=False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prefix = model.transformer.prefix(features)
    assert 2 * few.prefix_flops == counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.transformer.query_states(prefix).sum().backward()
    assert 2 * (few.query_flops + few.backward_flops) == counter.get_total_flops()
    assert few.prefix_bytes == every.prefix_bytes
    assert few.tokens == prefix.attention_mask.shape[1]
    assert few.chunk_bytes == pytest.approx(every.chunk_bytes, rel=0.2)
    held = [*model.backbone.parameters(), *model.backbone.buffers(), *model.parameters()]
    held += script("common").tensors_of(features)
    with script("run_cost").LiveBytes(held) as memory:
        model.transformer.query_states(model.transformer.prefix(features)).sum().backward()
    row = every.chunk_bytes + every.prefix_bytes * (every.tokens + 4) / every.tokens
    assert 0.7 * row <= memory.peak / 2 <= row


def test_the_flops_of_a_text_are_those_of_the_formula(script, checkpoint):
    """Two FLOPs a weight and token, attention 4 x tokens^2 x width, and of the last layer the projections of states."""
    config = deeper(checkpoint(), text=6, vision=2)
    cost, model = counted(script, checkpoint(), config, 2, ["a red circle"])
    layer = model.backbone.base_model.language_model.layers[0]
    weights = {name: weight.numel() for name, weight in layer.named_parameters() if weight.ndim == 2}
    heads, width, tokens = 4, 8, cost.tokens
    whole = 2 * tokens * sum(weights.values()) + 4 * tokens * tokens * heads * width
    last = (
        2
        * tokens
        * sum(count for name, count in weights.items() if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"))
    )
    assert cost.prefix_flops == 5 * whole + last


def test_attention_with_fewer_heads_of_keys_is_counted_everywhere(script):
    """Torch 2.11 refuses to count the kernels of a GPU for it, and counts nothing for that of a CPU."""
    query, key = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    _, counted = script("run_cost").flops_of(lambda: attend(query, key, key, enable_gqa=True))
    assert {str(name) for name in counted["Global"]} == {"aten.bmm"}
    assert sum(counted["Global"].values()) == 4 * 4 * 6 * 6 * 8


def test_live_bytes_are_those_of_the_tensors_that_are_held(script):
    there = torch.zeros(1000)
    with script("run_cost").LiveBytes([there]) as memory:
        view = there[:10]
        assert memory.live == 0
        first = torch.ones(250)
        again = first.view(10, 25)
        assert (memory.live, memory.peak) == (1000, 1000)
        second = first + 1
        del first
        assert (memory.live, memory.peak) == (2000, 2000)
        del again
        assert memory.live == 1000
        torch.cat([second, second])
    assert (memory.live, memory.peak) == (1000, 3000)
    assert len(view) == 10


def test_an_estimate_by_hand(script):
    """8 GB of weights, 1 GB of inputs, 1.5 GB set aside: 9.5 GB are free, and half of them keep half of the prefixes."""
    cost = script("run_cost")
    column = cost.Cost(10, 2.5e8, 3e12, 1e12, 2e12, 2.375e9, 0)
    guess = cost.estimate([column], 4_000_000_000, cost.Card("x", 20e9, 1e14), batch=4, queries=10, steps=900, used=0.5)
    assert guess == cost.Estimate(8e9, 1e9, 1, 0.5, 4 * 8.5e12, 900 * 4 * 8.5e12 / 5e13 / 3600)
    small = cost.estimate([column], 4_000_000_000, cost.Card("x", 10e9, 1e14), batch=4, queries=10, steps=1, used=0.5)
    assert (small.largest_chunk, small.kept) == (0, 0)
    wide = cost.estimate([column], 4_000_000_000, cost.Card("x", 80e9, 1e14), batch=4, queries=10, steps=1, used=0.5)
    assert (wide.largest_chunk, wide.kept) == (4, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["coco", "mmeb"])
def test_a_dry_run_says_what_is_measured_and_what_is_estimated(run_example, checkpoint, tmp_path, kind, data):
    options = ["--data", data, "--backbone", checkpoint(kind), "--dry-run", "--dry-batch", 2, "--dry-steps", 2]
    options += ["--queries", 3, "--json", tmp_path / "out.json", "--card", "small,5,1", "--card", "tiny,0.001,1"]
    lines = run_example("train_recipe", *options).splitlines()
    assert sum(line.startswith("measured: ") for line in lines) == 1
    assert sum(line.startswith("counted: ") for line in lines) == 2
    estimated = [line for line in lines if line.startswith("estimated: ")]
    assert len(estimated) == 3
    result = json.loads((tmp_path / "out.json").read_text())
    pairs, epochs = (566_747, 5) if data == "coco" else (662_000, 1)
    assert result["run"]["steps"] == epochs * -(-pairs // 1024)
    assert result["trained_numbers"] == 3 * 32 + 1
    assert len(result["measured"]["all_seconds"]) == 2
    assert result["measured"]["seconds_a_step"] > 0
    assert result["estimated"]["tiny"]["largest_chunk"] == 0
    speed = result["measured"]["seconds_a_step"] / 2
    hours = speed * 1024 * result["run"]["steps"] / 3600
    assert result["measured"]["hours_at_this_speed"] == pytest.approx(hours), "these two layers are all that there are"
    assert f"{hours:.1f} hours to finish at the measured speed" in estimated[0]
    assert "at an assumed 40% of 1 TFLOPS" in estimated[1]
    assert "does not fit" in estimated[2]


def test_a_count_that_fails_does_not_cost_the_measured_steps(script, checkpoint, tmp_path, monkeypatch):
    def fails(*arguments):
        raise AssertionError("query/key/value shapes are incompatible")

    monkeypatch.setattr(script("dry_run"), "count", fails)
    options = ["--data", "coco", "--backbone", checkpoint(), "--dry-run", "--dry-batch", 2, "--dry-steps", 1]
    with pytest.raises(SystemExit, match="failed: counting"):
        script("train_recipe").main([*map(str, options), "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["measured"]["seconds_a_step"] > 0
    assert "shapes are incompatible" in result["errors"]["counting"]


def test_the_noise_of_a_dry_run_is_not_compressed(script):
    """As PNG it took 45 ms an image to encode, which is 90 s for two steps of 1,024."""
    (row,) = script("dry_run").build_rows(1, (40, 30), (0, 10)).with_format("arrow").to_dict()["anchor"]
    assert row["image"]["bytes"].startswith(b"BM")
    assert len(row["image"]["bytes"]) == 3 * 40 * 30 + 54
    image = script("dry_run").build_rows(1, (40, 30), (0, 10))[0]["anchor"]["image"]
    assert image.tobytes() == script("common").build_inputs(1, (40, 30))[0][0].tobytes()


def test_options_that_do_not_fit_are_refused(run_example, checkpoint):
    options = ["--data", "coco", "--backbone", checkpoint(), "--dry-run", "--dry-steps", 0]
    with pytest.raises(SystemExit, match=r"--card is 'H200', but NAME,GB,TFLOPS is needed"):
        run_example("train_recipe", *options, "--card", "H200")
    with pytest.raises(SystemExit, match="--layers is 1, but at least 2"):
        run_example("train_recipe", *options, "--layers", 1)
    with pytest.raises(SystemExit, match=r"--path is missing: the folder with dataset_coco\.json"):
        run_example("train_recipe", *options[:4])


def test_the_page_shows_the_table_of_the_kept_results(script, capsys):
    """Printed by the command that the page names; weights and steps are those of the tables of the recipe."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*-dry-run-*.json"))
    script("dry_run").main([str(file) for file in files])
    *table, made = capsys.readouterr().out.strip().splitlines()
    page = (ROOT / "docs" / "guides" / "recipes.md").read_text("utf8")
    assert "\n".join(table) in page
    assert made in page
    recipe = script("train_recipe")
    results = [json.loads(file.read_text()) for file in files]
    again = [script("dry_run").estimates(row, list(script("run_cost").CARDS)) for row in results]
    assert [row["estimated"] for row in results] == again, "estimated by other formulas: use --again"
    assert {(row["data"], row["shape"]) for row in results} == {(d, b) for d in recipe.DATA for b in recipe.BACKBONES}
    for row in results:
        args = recipe.parse(["--data", row["data"], "--backbone", row["shape"]])
        data, _ = recipe.resolve(args)
        now = {"pairs": data.pairs, "epochs": data.epochs, "batch": args.batch, "queries": args.queries}
        assert {name: row["run"][name] for name in now} == now, "made with other settings: run it again"


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["qwen3-vl-2b", "internvl3-1b"])
def test_a_dry_run_at_true_width(run_example, tmp_path, backbone):
    options = ["--data", "coco", "--backbone", backbone, "--dry-run", "--dry-batch", 2, "--dry-steps", 1]
    output = run_example("train_recipe", *options, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    known = {"qwen3-vl-2b": (2.13e9, 20 * 2048 + 1), "internvl3-1b": (0.94e9, 20 * 896 + 1)}[backbone]
    assert (result["parameters"], result["trained_numbers"]) == (pytest.approx(known[0], rel=0.01), known[1])
    assert result["layers"]["measured"] == 2
    assert "hours to finish" in output
