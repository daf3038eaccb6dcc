"""What a quantized backbone changes: embeddings, recall, bytes and time.

    python benchmarks/quantization.py [--steps 12] [--scenes 100] [--parts toy larger] [--json FILE]

On the embedded toy backbone: cosine to the float32 embeddings; text-to-image recall at 1 with the queries of `slq-tiny`, which were
trained on the unquantized backbone, and with queries that take a few steps on the quantized one (the same batches for all). On
a larger shape with random weights, cosine, bytes and encoding time alone. Times on a CPU are CPU time. "tower kept" leaves the
vision tower as it is. The 4-bit weights of `int4` take a byte each; `int4 packed` takes half a byte and a kernel of the CPU; `nf4` is
of bitsandbytes. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchao
from common import build_inputs, machine, parser, quiet, write
from embedded_default import recalls
from shapes import build_folder
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import BitsAndBytesConfig, TorchAoConfig

from slq_embed import SLQEncoder, pretrained
from slq_embed.backbone.quantization import weight_bytes
from slq_embed.toy import captions, implicit, render, sample_scenes

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_slq_tiny import train_parts

TOWER = [r"(model\.)?visual", "lm_head"]
GROUP = 32
TRAINED = ("float32", "int8", "int4 packed", "nf4")


def int8(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(Int8WeightOnlyConfig(), **options)


def int4(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)), **options)


def packed(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP), **options)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "float32": lambda: {"dtype": torch.float32},
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "int8": lambda: {"dtype": torch.bfloat16, "quantization_config": int8()},
    "int8, tower kept": lambda: {"dtype": torch.bfloat16, "quantization_config": int8(modules_to_not_convert=TOWER)},
    "int4": lambda: {"dtype": torch.bfloat16, "quantization_config": int4()},
    "int4, tower kept": lambda: {"dtype": torch.bfloat16, "quantization_config": int4(modules_to_not_convert=TOWER)},
    "int4 packed": lambda: {"dtype": torch.bfloat16, "quantization_config": packed()},
}
if find_spec("bitsandbytes"):
    PRECISIONS["nf4"] = lambda: {"dtype": torch.bfloat16, "quantization_config": nf4()}


def load(folder: str | Path, precision: str, device: str, **options: Any) -> SLQEncoder:
    return SLQEncoder.from_backbone(folder, device=device, seed=0, **options, **PRECISIONS[precision]())


def cosines(first: Any, second: Any) -> dict[str, float]:
    rows = (first * second).sum(axis=1)
    return {"mean": float(rows.mean()), "least": float(rows.min())}


def toy(args: argparse.Namespace) -> dict[str, Any]:
    steps, count = args.steps, args.scenes
    scenes = sample_scenes(count, "test")
    images = [render(scene, 7) for scene in scenes]
    texts = {"literal": [captions(scene)[0] for scene in scenes], "implicit": [implicit(scene) for scene in scenes]}
    queries = SLQEncoder(pretrained("slq-tiny"), device="cpu").queries.detach()
    settings = {"queries": len(queries), "steps": steps, "batch": 32, "learning_rate": 4e-2, "seed": 0}
    results: dict[str, Any] = {}
    expected: list[Any] = []
    for name in PRECISIONS:
        model = load(pretrained("mllm-tiny"), name, args.device, num_queries=len(queries), init=queries)
        model.encode(images[:50])  # the first pass of a model is slower
        clock = clock_of(args.device)
        started = clock()
        found = [model.encode(images, batch_size=50), model.encode(texts["literal"], batch_size=50)]
        seconds = clock() - started
        expected = expected or found
        results[name] = {
            "weight_bytes": weight_bytes(model.backbone),
            "seconds": seconds,
            "images": cosines(found[0], expected[0]),
            "texts": cosines(found[1], expected[1]),
            "queries of the unquantized": recalls(model, images, texts),
        }
        if steps and name in TRAINED:
            (trained,) = train_parts(model.backbone, ["queries"], **settings)[1].values()
            results[name]["queries trained on it"] = recalls(trained, images, texts)
        print(name, results[name])
    return results


def seconds_of(model: SLQEncoder, inputs: list[Any], args: argparse.Namespace) -> list[float]:
    """Seconds of each round."""
    times, clock = [], clock_of(args.device)
    for _ in range(args.rounds):
        started = clock()
        model.encode(inputs)
        times.append(clock() - started)
    return times


def clock_of(device: str) -> Callable[[], float]:
    """CPU time, where a clock on a busy machine would also count what waits; beside a GPU, the clock."""
    return time.process_time if device == "cpu" else time.perf_counter


def larger(args: argparse.Namespace) -> dict[str, Any]:
    images, texts = build_inputs(args.batch, (256, 256))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_folder(Path(folder), args.shape, "float32", 256 * 256)
        models = {name: load(folder, name, args.device, num_queries=20) for name in PRECISIONS}
        found = {name: [model.encode(images), model.encode(texts)] for name, model in models.items()}
        seconds = {
            name: statistics.median(seconds_of(model, [*images, *texts], args)) for name, model in models.items()
        }
    for name, (first, second) in found.items():
        expected = found["float32"]
        results[name] = {"weight_bytes": weight_bytes(models[name].backbone), "seconds": seconds[name]}
        results[name] |= {"images": cosines(first, expected[0]), "texts": cosines(second, expected[1])}
        print(args.shape, name, results[name])
    return results


def table(toys: dict[str, Any]) -> str:
    """Markdown."""
    reference = toys["float32"]
    lines = [
        "| backbone | weights, MB | encoding time | cosine, images: mean / least | texts | queries of the unquantized: literal / "
        "implicit | queries trained on it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in toys.items():
        pair = {what: f"{row[what]['mean']:.5f} / {row[what]['least']:.5f}" for what in ("images", "texts")}
        recall = [
            f"{part['literal']:.1%} / {part['implicit']:.1%}" if (part := row.get(f"queries {what}")) else ""
            for what in ("of the unquantized", "trained on it")
        ]
        size, factor = row["weight_bytes"] / 1e6, row["seconds"] / reference["seconds"]
        lines.append(
            f"| {name} | {size:.1f} | {factor:.2f} | {pair['images']} | {pair['texts']} | {' | '.join(recall)} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=12, help="of batch 32, on three backbones; 0 for none")
    options.add_argument("--scenes", type=int, default=100)
    options.add_argument("--batch", type=int, default=4, help="images, and as many texts, for the larger shape")
    options.add_argument("--parts", nargs="+", default=["toy", "larger"], choices=["toy", "larger"])
    args = options.parse_args()
    quiet()
    args.rounds = args.rounds or 3
    if args.device != "cpu":
        del PRECISIONS["int4 packed"]  # its kernel is for CPUs
    if args.quick:
        args.steps, args.scenes, args.batch, args.rounds = 2, 20, 2, 1
    result = {**machine(args), "date": date.today().isoformat(), "torchao": torchao.__version__, "group": GROUP}
    result |= {"steps": args.steps, "scenes": args.scenes}
    if "toy" in args.parts:
        result["toy"] = toy(args)
    if "larger" in args.parts:
        result["larger"] = larger(args)
    for part in args.parts:
        print(part, table(result[part]), sep="\n")
    write(args.json, result)


if __name__ == "__main__":
    main()
