"""The dry run of `examples/train_recipe.py --dry-run`: a backbone of true widths, random weights, synthetic pairs.

    python benchmarks/dry_run.py benchmarks/results/*-dry-run-*.json

prints a table of dry runs whose results were written with --json; --again estimates anew from what they have counted.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import build_inputs, exit_with, machine, peak_above_weights, quiet, recorded, write
from datasets import Dataset, Features, Image, Value
from run_cost import CARDS, RESERVE, Card, Cost, count, estimate
from shapes import SHAPES, build_config, build_processor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from transformers.initialization import no_init_weights

INPUT = Features({"image": Image(), "text": Value("string")})


def cut_layers(config: Any, layers: int | None) -> Any:
    """A configuration with so many layers in the language model and in the vision tower; ``None`` for all."""
    config = copy.deepcopy(config)
    if layers is None:
        return config
    for part in (config.get_text_config(), config.vision_config):
        for name in ("num_hidden_layers", "depth"):
            if getattr(part, name, None) is not None:
                setattr(part, name, min(layers, getattr(part, name)))
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:layers]
        if getattr(part, "deepstack_visual_indexes", None):
            part.deepstack_visual_indexes = [n for n in part.deepstack_visual_indexes if n < layers] or [0]
    return config


def build_backbone(config: Any, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A backbone whose weights repeat one block of random numbers: to draw all of them would take minutes."""
    with no_init_weights(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    block = torch.randn(1 << 20, device=device, dtype=torch.float32).mul(0.02).to(dtype)
    for parameter in model.parameters():
        values = parameter.data.view(-1)
        for start in range(0, len(values), len(block)):
            part = values[start : start + len(block)]
            part.copy_(block[: len(part)])
    return model.eval()


def uncompressed(image: Any) -> dict[str, Any]:
    """An image as a row holds it, as BMP: noise as PNG took 45 ms to encode."""
    image.save(file := io.BytesIO(), "BMP")
    return {"bytes": file.getvalue(), "path": None}


def build_rows(pairs: int, size: tuple[int, int], words: tuple[int, int]) -> Dataset:
    """Synthetic pairs: an image, with a text where the data have one, and a text."""
    images, texts = build_inputs(pairs, size, words[1])
    beside = build_inputs(1 if not words[0] else pairs, (1, 1), words[0])[1] if words[0] else [None] * pairs
    rows = [
        {"anchor": {"image": uncompressed(image), "text": more}, "positive": {"image": None, "text": text}}
        for image, more, text in zip(images, beside, texts, strict=True)
    ]
    return Dataset.from_list(rows, Features({"anchor": INPUT, "positive": INPUT}))


class StepTimes(TrainerCallback):
    """Seconds of each step, preprocessing left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self._started)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace, build_trainer: Callable[..., Any], model: Any, rows: Dataset) -> dict[str, Any]:
    """Steps of the recipe's own trainer."""
    small = copy.copy(args)
    small.batch, small.chunk = len(rows) // args.dry_steps, min(args.chunk, max(1, len(rows) // args.dry_steps // 2))
    small.steps, small.workers = args.dry_steps, 0
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        small.output = Path(folder)
        settings = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "bf16": False}
        trainer = build_trainer(small, model, rows, **settings, use_cpu=model.device.type == "cpu")
        trainer.add_callback(times)
        trainer.remove_callback(PrinterCallback)
        peak = peak_above_weights(trainer.train, model.device.type, times=1)
    later = times.seconds[1:] or times.seconds  # the first step of a process is slower
    return {
        "seconds_a_step": statistics.median(later),
        "all_seconds": times.seconds,
        "batch": small.batch,
        "chunk": small.chunk,
        "peak_bytes_above_weights": peak,
    }


def cards(args: argparse.Namespace) -> Iterator[Card]:
    for text in args.card or []:
        try:
            name, gigabytes, teraflops = text.split(",")
            yield Card(name, float(gigabytes) * 1e9, float(teraflops) * 1e12)
        except ValueError:
            raise SystemExit(f"--card is {text!r}, but NAME,GB,TFLOPS is needed, such as 'L40S,48,362'.") from None
    if not args.card:
        yield from CARDS


def dry_run(
    args: argparse.Namespace, data: Any, name: str, build_model: Callable[..., Any], build_trainer: Callable[..., Any]
) -> None:
    """Measure a few steps, count a run, and print both."""
    quiet()
    chosen = list(cards(args))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = args.layers or (2 if device == "cpu" else None)
    if layers == 1:
        raise SystemExit(
            "--layers is 1, but at least 2 are needed: the last layer of a prefix costs less than the others."
        )
    batch = args.dry_batch or (4 if device == "cpu" else 64)
    if args.backbone in SHAPES:
        processor = build_processor(args.backbone, 32 * 32, args.max_pixels or 448 * 448)
        config, pixels = build_config(args.backbone, processor.tokenizer), {"max_pixels": None}
    else:
        processor, config, pixels = AutoProcessor.from_pretrained(name), AutoConfig.from_pretrained(name), {}
    args = argparse.Namespace(**{**vars(args), **pixels})
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    backbone = build_backbone(cut_layers(config, layers), device, torch.bfloat16)
    model = build_model(args, data, backbone, processor, backbone_name="random weights")
    sample = build_rows(2, data.image_size, data.words)
    depth = config.get_text_config().num_hidden_layers
    steps = math.ceil(data.pairs / args.batch) * args.epochs
    result: dict[str, Any] = {
        **machine(argparse.Namespace(device=device, dtype="bfloat16", shape=args.backbone, rounds=args.dry_steps)),
        "date": date.today().isoformat(),
        "data": args.data,
        "run": {
            "pairs": data.pairs,
            "epochs": args.epochs,
            "batch": args.batch,
            "steps": steps,
            "chunk": args.chunk,
            "queries": args.queries,
        },
        "layers": {"measured": backbone.config.get_text_config().num_hidden_layers, "of": depth},
        "parameters": whole.num_parameters(),
        "trained_numbers": len(model.queries) * model.queries.shape[1] + 1,
        "assumed": {"utilisation": args.utilisation, "reserve_bytes": RESERVE, "image_size": data.image_size},
        "errors": {},
    }
    with recorded(result["errors"], "counting"):
        costs = [count(model, whole.base_model, sample[column]) for column in ("anchor", "positive")]
        result["counted"] = dict(zip(("image", "text"), map(asdict, costs), strict=True))
        result["estimated"] = estimates(result, chosen)
    write(args.json, result)
    if args.dry_steps:
        rows = build_rows(batch * args.dry_steps, data.image_size, data.words)
        result["measured"] = measure(args, build_trainer, model, rows)
        if result["layers"]["measured"] == depth:
            seconds = result["measured"]["seconds_a_step"] / result["measured"]["batch"] * args.batch
            result["measured"]["hours_at_this_speed"] = seconds * steps / 3600
    print(describe(result))
    write(args.json, result)
    if args.json is not None:
        print(f"written to {args.json}")
    exit_with(result["errors"])


def estimates(result: dict[str, Any], chosen: list[Card]) -> dict[str, Any]:
    """Estimates for cards, from what a dry run has counted."""
    costs, run = [Cost(**cost) for cost in result["counted"].values()], result["run"]
    used = result["assumed"]["utilisation"]
    return {
        card.name: {
            "card": asdict(card),
            **asdict(estimate(costs, result["parameters"], card, run["batch"], run["queries"], run["steps"], used)),
        }
        for card in chosen
    }


def describe(result: dict[str, Any]) -> str:
    """The result in lines; each says whether it is measured, counted or estimated."""
    run = result["run"]
    of, layers = result["layers"]["of"], result["layers"]["measured"]
    lines = [
        f"{result['data']} on {result['shape']}, {result['parameters'] / 1e9:.2f} B parameters: {run['pairs']:,} pairs x "
        f"{run['epochs']} epochs in batches of {run['batch']:,} = {run['steps']:,} steps; {run['queries']} queries, "
        f"{result['trained_numbers']:,} trained numbers",
        f"random weights, {layers} of {of} layers, {result['dtype']}, {result['machine']}, {result['versions']}",
    ]
    if "measured" in result:
        seen = result["measured"]
        lines.append(
            f"measured: {seen['seconds_a_step']:.2f} s a step of {seen['batch']} pairs in chunks of {seen['chunk']} with "
            f"{layers} layers, peak {seen['peak_bytes_above_weights'] / 1e9:.2f} GB above the weights"
        )
        if "hours_at_this_speed" in seen:
            lines.append(f"estimated: here, {seen['hours_at_this_speed']:.1f} hours to finish at the measured speed")
    for name, cost in result.get("counted", {}).items():
        lines.append(
            f"counted: {name} of {cost['tokens']} tokens, {cost['prefix_flops'] / 1e12:.3f} TFLOP for the prefix, "
            f"{(2 * cost['query_flops'] + cost['backward_flops']) / 1e12:.3f} for queries and back, "
            f"{cost['prefix_bytes'] / 1e6:.1f} MB of keys and values, {cost['chunk_bytes'] / 1e6:.0f} MB in a chunk"
        )
    for name, guess in result.get("estimated", {}).items():
        card = guess["card"]
        fits = guess["largest_chunk"]
        head = f"estimated: {name} ({card['nbytes'] / 1e9:.0f} GB): {guess['weight_bytes'] / 1e9:.1f} GB of weights, "
        head += f"{guess['input_bytes'] / 1e9:.1f} GB of inputs, "
        if not fits:
            lines.append(f"{head}does not fit")
            continue
        advice = f" (--chunk {fits})" if fits < run["chunk"] else ""
        lines.append(
            f"{head}largest chunk {fits}{advice}, {guess['kept']:.0%} of the prefixes kept for the second pass; "
            f"{guess['hours']:.1f} hours to finish at an assumed {result['assumed']['utilisation']:.0%} of "
            f"{card['peak'] / 1e12:.0f} TFLOPS"
        )
    return "\n".join(lines)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of dry runs with the same cards; everything in it is estimated."""
    names = list(results[0]["estimated"])
    results = sorted(results, key=lambda result: (result["data"], result["parameters"]))
    head = ["data", "backbone", "batch", "steps", "weights, GB"]
    head += [text for name in names for text in (f"{name}: largest chunk", "prefixes kept", "hours")]
    lines = [head, ["---"] * len(head)]
    for result in results:
        run = result["run"]
        line = [result["data"], f"`{result['shape']}`", f"{run['batch']:,}", f"{run['steps']:,}"]
        line.append(f"{2 * result['parameters'] / 1e9:.1f}")
        for guess in map(result["estimated"].get, names):
            fits, hours = guess["largest_chunk"], f"{guess['hours']:.{0 if guess['hours'] >= 10 else 1}f}"
            line += [str(fits), f"{guess['kept']:.0%}", hours] if fits else ["does not fit", "", ""]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, nargs="+", help="files of --dry-run --json")
    options.add_argument("--again", action="store_true", help="estimate anew, for the same cards, and write the files")
    args = options.parse_args(argv)
    results = [json.loads(path.read_text("utf8")) for path in args.results]
    for path, result in zip(args.results, results, strict=True):
        if args.again:
            result["estimated"] = estimates(result, [Card(**guess["card"]) for guess in result["estimated"].values()])
            path.write_text(json.dumps(result, indent=1) + "\n", "utf8")
    made = sorted({f"{row['date']} with {', '.join(map(' '.join, row['versions'].items()))}" for row in results})
    used = sorted({f"{row['assumed']['utilisation']:.0%}" for row in results})
    print(table(results))
    print(f"Estimated {'; '.join(made)}, at an assumed {' or '.join(used)} of each card's peak.")


if __name__ == "__main__":
    main()
