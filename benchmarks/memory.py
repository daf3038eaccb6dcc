"""The largest backbone whose queries train on a card: bytes by precision, counted, and checked by two measured steps.

    python benchmarks/memory.py [--batch 16] [--chunk 4] [--check] [--json FILE]

A step of `--batch` pairs of an image and a text: whole, or in chunks of so many inputs (CachedSymmetricInfoNCELoss). Counted are: the weights, as the precision holds them; the prefix of
the batch; what the backward pass of the queries needs; and with quantized weights the dense copy of the widest layer, since a
layer is unpacked where it is used. The tables and heads stay in bfloat16. Backbones: the true shapes of shapes.py, and the default
configurations of transformers. --check runs a step of two shapes with all layers in processes of their own, about three minutes
on one core, and prints how far the count is off.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from datetime import date
from typing import Any

import torch
import transformers
from common import QUERIES, build_inputs, in_own_process, machine, parser, peak_above_weights, quiet, to_device, write
from dry_run import build_backbone
from run_cost import RESERVE
from shapes import build_config, build_processor
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig

from slq_embed import SLQEncoder
from slq_embed.backbone.quantization import weight_bytes
from slq_embed.training.losses import symmetric_info_nce

TRUE_SHAPES = ("internvl3-1b", "qwen3-vl-2b", "qwen3-vl-4b", "internvl3-8b")
DEFAULTS = (
    "LlavaConfig",
    "FastVlmConfig",
    "Qwen3VLConfig",
    "Mistral3Config",
    "Cohere2VisionConfig",
    "Qwen2_5_VLConfig",
)
CARDS = (8e9, 16e9, 24e9, 80e9)
PRECISIONS = ("bfloat16", "int8", "int4")
TOKENS = {"image": 288, "text": 32}  # 256 of the image, and the chat template
PIXEL_BYTES = 8e6  # an image as the processor gives it, in float32
GROUP = 64  # 4-bit weights with a scale of 4 bytes, as NF4; torchao's groups of 128 take less


def weights(model: nn.Module, precision: str) -> int:
    """Bytes of a model on the meta device: linear layers without the head in a precision, all else in bfloat16."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    total = sum(2 * tensor.numel() for tensor in tensors.values())
    if precision == "bfloat16":
        return total
    head = model.get_output_embeddings()
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        rows, width = layer.weight.shape
        if precision == "int8":  # a scale and a zero point for each row
            total += rows * width + 5 * rows - 2 * rows * width
        elif width % GROUP == 0:
            total += rows * width // 2 + 4 * rows * width // GROUP - 2 * rows * width
    return total


def row_bytes(config: PretrainedConfig, tokens: int, queries: int, size: int = 2) -> float:
    """Bytes that an input needs until the backward pass, by a formula in the sizes of the language model.

    Args:
        config: Of the language model.
        tokens: Length of the input.
        queries: How many.
        size: Bytes of a number.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    norms = 2 if config.model_type.startswith("qwen3") else 0  # of queries and keys
    prefix = 2 * size * keys * width * tokens
    cache = 2 * size * keys * width * (tokens + queries)  # the prefix with the queries behind it
    repeated = (
        2 * size * heads * width * (tokens + queries)
    )  # keys and values for each head, kept for the backward pass
    saved = 8 * hidden + 3 * size * config.intermediate_size + 4 * size * heads * width + 2 * size * keys * width
    saved += norms * 2 * width * (heads + keys)
    return float(layers * (prefix + cache + repeated + queries * saved))


def unpacked(config: PretrainedConfig, precision: str, size: int = 2) -> int:
    """Bytes of the dense copy of the widest layer."""
    return 0 if precision == "bfloat16" else size * config.hidden_size * config.intermediate_size


def count(model: nn.Module, precision: str, batch: int, chunk: int) -> dict[str, float]:
    """The bytes of a step, by what they are; a whole step takes all of "step", and one in chunks "chunk" in its place."""
    config = model.config.get_text_config()
    rows = [row_bytes(config, tokens, QUERIES) for tokens in TOKENS.values()]
    return {
        "weights": weights(model, precision),
        "inputs": batch * PIXEL_BYTES,
        "step": batch * sum(rows),
        "chunk": chunk * max(rows),
        "unpacked": unpacked(config, precision),
        "reserve": RESERVE,
    }


def needed(row: dict[str, float], way: str) -> float:
    """All bytes of a step, whole ("step") or in chunks ("chunk")."""
    return sum(row[name] for name in ("weights", "inputs", "unpacked", "reserve", way))


def backbones() -> Iterator[tuple[str, Any]]:
    for name in (*TRUE_SHAPES, *DEFAULTS):
        shape = name in TRUE_SHAPES
        config = build_config(name, build_processor(name, 1, 1).tokenizer) if shape else getattr(transformers, name)()
        with torch.device("meta"):
            yield name, AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def measured_peak(shape: str, precision: str, batch: int) -> dict[str, int]:
    """A step with all layers, in this process: bytes of the weights, and what it needs above them."""
    config = build_config(shape, build_processor(shape, 1, 1).tokenizer)
    backbone = build_backbone(config, "cpu", torch.bfloat16)
    backbone.tie_weights()
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(backbone.base_model, Int8WeightOnlyConfig())
    size = (448, 448) if shape.startswith("internvl") else (512, 512)
    processor = build_processor(shape, size[0] * size[1], size[0] * size[1])
    model = SLQEncoder.from_backbone(backbone, processor, num_queries=QUERIES, seed=0, backbone_name="random")
    model.train()
    columns = [to_device(model.preprocess(column), model.device) for column in build_inputs(batch, size)]

    def step() -> None:
        first, second = (model(dict(features))["sentence_embedding"] for features in columns)
        symmetric_info_nce(first, second, torch.tensor(0.07)).backward()

    step_bytes = peak_above_weights(step, "cpu", times=1)
    lengths = [int(features["attention_mask"].shape[1]) for features in columns]
    return {"weights": weight_bytes(backbone), "step": step_bytes, "image": lengths[0], "text": lengths[1]}


def check(shape: str, precision: str, batch: int) -> dict[str, Any]:
    """What was measured, beside what is counted for the same batch."""
    # Else freed blocks of this size stay with the process, and look as if the step held them.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = in_own_process(__file__, "--step-of", shape, precision, batch)
    measured = dict(zip(("weights", "step", "image", "text"), map(int, found.split(",")), strict=True))
    return compare(shape, precision, batch, measured)


def compare(shape: str, precision: str, batch: int, measured: dict[str, int]) -> dict[str, Any]:
    config = build_config(shape, build_processor(shape, 1, 1).tokenizer)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    text = config.get_text_config()
    step = batch * sum(row_bytes(text, measured[column], QUERIES) for column in TOKENS) + unpacked(text, precision)
    counted = {"weights": weights(model, precision), "step": step}
    error = {name: counted[name] / measured[name] - 1 for name in counted}
    whole = sum(counted.values()) / (measured["weights"] + measured["step"]) - 1
    return {
        "precision": precision,
        "batch": batch,
        "measured": measured,
        "counted": counted,
        "error": error,
        "whole": whole,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each backbone (a whole step / one in chunks), and the largest one for each card."""
    lines = [f"| backbone | parameters | {' | '.join(f'{name}, GB' for name in PRECISIONS)} |", "| --- " * 5 + "|"]
    for name, row in sorted(found.items(), key=lambda item: item[1]["parameters"]):
        sizes = [" / ".join(f"{needed(row[kind], way) / 1e9:.1f}" for way in ("step", "chunk")) for kind in PRECISIONS]
        lines.append(f"| `{name}` | {row['parameters'] / 1e9:.1f} B | {' | '.join(sizes)} |")
    for way in ("step", "chunk"):
        lines += ["", f"| memory ({way}) | {' | '.join(PRECISIONS)} |", "| --- " * 4 + "|"]
        for card in CARDS:
            best = [largest(found, precision, card, way) for precision in PRECISIONS]
            lines.append(f"| {card / 1e9:.0f} GB | {' | '.join(best)} |")
    return "\n".join(lines)


def largest(found: dict[str, dict[str, Any]], precision: str, card: float, way: str) -> str:
    fits = [(row["parameters"], name) for name, row in found.items() if needed(row[precision], way) <= card]
    return f"`{max(fits)[1]}` ({max(fits)[0] / 1e9:.1f} B)" if fits else "none"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=16, help="pairs a step")
    options.add_argument("--chunk", type=int, default=4, help="inputs that a step differentiates at a time")
    options.add_argument("--check", action="store_true", help="measure two shapes as well")
    options.add_argument("--step-of", nargs=3, help=argparse.SUPPRESS)
    args = options.parse_args()
    quiet()
    if args.step_of:
        shape, precision, batch = args.step_of
        print(",".join(map(str, measured_peak(shape, precision, int(batch)).values())))
        return
    args.dtype, args.shape = "by column", "by line"
    assumed = {
        "batch": args.batch,
        "tokens": TOKENS,
        "queries": QUERIES,
        "pixel_bytes": PIXEL_BYTES,
        "reserve": RESERVE,
    }
    result = {**machine(args), "date": date.today().isoformat(), "assumed": assumed}
    result["backbones"] = {
        name: {"parameters": model.num_parameters()}
        | {kind: count(model, kind, args.batch, args.chunk) for kind in PRECISIONS}
        for name, model in backbones()
    }
    print(f"assumed: {result['assumed']}")
    print(table(result["backbones"]))
    if args.check:
        small = ("design", "bfloat16", 2), ("design", "int8", 2)
        checks = small if args.quick else (*small, ("internvl3-1b", "bfloat16", 2), ("internvl3-1b", "int8", 2))
        result["checks"] = {f"{shape} {kind}": check(shape, kind, batch) for shape, kind, batch in checks}
        for name, row in result["checks"].items():
            print(name, row)
    write(args.json, result)


if __name__ == "__main__":
    main()
