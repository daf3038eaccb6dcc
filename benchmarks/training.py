"""What a training step costs: queries, with a head and with an adapter; all positions with autograd, LoRA, full fine-tuning.

    python benchmarks/training.py [--quick] [--json FILE] [--device cuda --dtype bfloat16 --shape qwen3-vl-4b]

One backbone shape (by default Qwen3-VL, 61 M parameters; random weights: speed and memory do not depend on the values), one batch of
images (by default of 208 tokens) with texts of 24 words. Times are medians of rounds in which every method takes its turn, so that a
noisy machine slows all of them alike; preprocessing is left out of all of them. Memory is the peak above the loaded weights, each
method alone, and on a CPU in a process of its own; the largest batch is a straight line through the peaks of two batches. Results are
written as they come; a method that fails is among their `errors`. Five epochs with five captions an image are timed as they are for
our path; the other methods do the same work at every step, so theirs are 25 median steps.

`prefix` is a step of latent queries; `head` adds a projection head to them, `deep_queries` vectors in each layer, `query_adapter`
a LoRA that acts at the queries only. `..._stored` is the same step in a later epoch, whose prefixes are kept.

--quick, about two minutes on 2 CPU cores: 3 rounds of batch 8 for encoding and our methods, one step for each of the others,
memory at batch 2. It shows what a step costs: at most 1.15 x encoding, and a sixth of that with stored prefixes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from common import (
    QUERIES,
    build_inputs,
    exit_with,
    in_own_process,
    machine,
    medians,
    model_inputs,
    parser,
    peak_above_weights,
    quiet,
    recorded,
    release,
    rounds_of,
    timed,
    to_device,
    write,
)
from shapes import build_backbone, build_processor
from torch import Tensor

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.training.losses import symmetric_info_nce

PARTS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "head": {"projection": True},
    "deep_queries": {"deep_queries": True},
    "query_adapter": {"query_adapter": True},
}
OURS = ("encode", *PARTS, *(f"{part}_stored" for part in PARTS))
OTHERS = ("all_positions", "lora", "full_finetuning")
METHODS = (*OURS, *OTHERS)
EPOCHS, CAPTIONS = 5, 5


def build_encoder(args: argparse.Namespace, method: str = "prefix", backbone: Any = None) -> SLQEncoder:
    backbone = build_backbone(args.shape, args.device, args.dtype) if backbone is None else backbone
    pixels = args.image_size[0] * args.image_size[1]
    processor = build_processor(args.shape, pixels, pixels)
    parts = PARTS.get(method.removesuffix("_stored"), {})
    return SLQEncoder.from_backbone(backbone, processor, num_queries=QUERIES, seed=0, backbone_name="random", **parts)


def build_step(method: str, args: argparse.Namespace, backbone: Any = None) -> Callable[[], None]:
    """A function that takes one step of a method on the same batch, with this backbone if the method does not change it."""
    model = build_encoder(args, method, None if method in ("lora", "full_finetuning") else backbone)
    inputs = build_inputs(args.batch, args.image_size)
    if method.endswith("_stored"):
        model.prefix_store = PrefixStore()
        model.encode([*inputs[0], *inputs[1]])
    model.train()
    columns = [to_device(model.preprocess(column), model.device) for column in inputs]
    temperature = torch.tensor(0.07, device=model.device)
    decoder: Any = model.backbone.base_model

    if method == "encode":
        model.eval()

        def encode() -> None:
            with torch.no_grad():
                for features in columns:
                    model(dict(features))

        return encode

    def last_token(features: dict[str, Any]) -> Tensor:
        states = decoder(**model_inputs(features), use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(states[:, -1].float(), dim=-1)

    def all_positions(features: dict[str, Any]) -> Tensor:
        return torch.nn.functional.normalize(model.transformer.all_positions(features).float().mean(dim=1), dim=-1)

    def prefix(features: dict[str, Any]) -> Tensor:
        return model(dict(features))["sentence_embedding"]

    embed = {"lora": last_token, "full_finetuning": last_token, "all_positions": all_positions}.get(method, prefix)
    trained: list[Any] = list(model.parameters())
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        decoder = get_peft_model(decoder, LoraConfig(r=16, lora_alpha=32, target_modules=names))
        if args.checkpointing:
            decoder.gradient_checkpointing_enable()
            decoder.enable_input_require_grads()
            decoder.train()
        trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    elif method == "full_finetuning":
        decoder.requires_grad_(True)
        trained = list(decoder.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        first, second = (embed(features) for features in columns)
        symmetric_info_nce(first, second, temperature).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def five_epochs(args: argparse.Namespace, backbone: Any = None) -> float:
    """Seconds of our path for EPOCHS x CAPTIONS steps over one batch of images, each time with another caption."""
    model = build_encoder(args, backbone=backbone)
    model.prefix_store = PrefixStore()
    images, texts = build_inputs(args.batch * CAPTIONS, args.image_size)
    images = images[: args.batch]
    captions = [texts[n * args.batch : (n + 1) * args.batch] for n in range(CAPTIONS)]
    model.train()
    optimizer = torch.optim.AdamW([model.queries], lr=1e-4)
    temperature = torch.tensor(0.07, device=model.device)
    seconds = 0.0
    for _ in range(EPOCHS):
        for texts in captions:
            columns = [to_device(model.preprocess(column), model.device) for column in (images, texts)]

            def step(columns: list[dict[str, Any]] = columns) -> None:
                first, second = (model(features)["sentence_embedding"] for features in columns)
                symmetric_info_nce(first, second, temperature).backward()
                optimizer.step()
                optimizer.zero_grad()

            seconds += timed(step, args.device)
    return seconds


def build_steps(args: argparse.Namespace, backbone: Any, errors: dict[str, str]) -> dict[str, Callable[[], None]]:
    """The steps of all methods; on a GPU, of those whose first step works."""
    steps = {}
    for method in args.methods:
        with recorded(errors, method):
            step = build_step(method, args, backbone)
            if args.device != "cpu":
                step()  # what does not work there fails here, before the rounds
            steps[method] = step
    return steps


def peak_here(args: argparse.Namespace, method: str, batch: int, backbone: Any) -> int:
    """Peak of a method in this process, in bytes: exact on a GPU, which counts anew for each."""
    release(args.device)
    step = build_step(method, argparse.Namespace(**{**vars(args), "batch": batch}), backbone)
    return peak_above_weights(step, args.device)


def peak_elsewhere(args: argparse.Namespace, method: str, batch: int, threads: int | None) -> int:
    """Peak of a method in a process of its own, in bytes: on a CPU, what was there before would be used again."""
    shared = ["--device", args.device, "--dtype", args.dtype, "--shape", args.shape]
    shared += ["--image-size", *args.image_size]
    shared += ["--checkpointing"] if args.checkpointing else []
    return int(in_own_process(__file__, "--memory-of", method, "--batch", batch, *shared, threads=threads))


def measure_peaks(
    args: argparse.Namespace, batches: list[int], backbone: Any, errors: dict[str, str]
) -> Iterator[tuple[str, list[int]]]:
    """Each method with its peaks at these batches, in bytes.

    In a short run on a CPU two processes work at once, since most of it is imports, with one thread each: two of them would wait
    for each other.
    """
    on_cpu = args.device == "cpu"
    at_once, threads = (2, 1) if args.quick and on_cpu else (1, None)

    def measure(method: str) -> list[int]:
        with recorded(errors, f"peak of {method}"):
            if on_cpu:
                return [peak_elsewhere(args, method, batch, threads) for batch in batches]
            return [peak_here(args, method, batch, backbone) for batch in batches]
        return []

    with ThreadPoolExecutor(at_once) as pool:
        # On a GPU in this thread: another one has workspaces of its own, which would count.
        found = (pool.map if on_cpu else map)(measure, args.methods)
        for method, peaks in zip(args.methods, found, strict=True):
            if peaks:
                yield method, peaks


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=None)
    options.add_argument("--image-size", type=int, nargs=2, default=(512, 416), help="width and height in pixels")
    options.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options.add_argument("--memory", type=float, default=4.0, help="GB above the weights, for the largest batch")
    options.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for LoRA")
    options.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = options.parse_args()
    quiet()
    args.batch = args.batch or (8 if args.quick else 16)
    args.rounds = args.rounds or (3 if args.quick else 9)
    if args.memory_of:
        print(peak_above_weights(build_step(args.memory_of, args), args.device))
        return
    errors: dict[str, str] = {}
    backbone = build_backbone(args.shape, args.device, args.dtype)
    steps = build_steps(args, backbone, errors)
    batches = [2] if args.quick else [args.batch, args.batch // 2]
    result = machine(args) | {
        "batch": args.batch,
        "image_size": args.image_size,
        "memory_batch": batches[0],
        "peak_bytes_above_weights": {},
        "errors": errors,
    }

    def keep(times: dict[str, list[float]]) -> None:
        result.update(seconds_per_step=medians(times), all_seconds=times)
        write(args.json, result)

    if args.quick:
        ours = {method: step for method, step in steps.items() if method in OURS}
        others = {method: step for method, step in steps.items() if method not in OURS}
        times = rounds_of(ours, args.rounds, args.device) | rounds_of(others, 1, args.device, warm_up=False)
        keep(times)
        del ours, others
    else:
        times = rounds_of(steps, args.rounds, args.device, after=keep)
    del steps
    if args.device == "cpu":
        backbone = None  # the processes that follow need its memory
    release(args.device)
    seconds = medians(times)
    peaks = {}
    for method, found in measure_peaks(args, batches, backbone, errors):
        peaks[method] = found
        result["peak_bytes_above_weights"][method] = found[0]
        write(args.json, result)
    print(f"{result['machine']}; {args.shape}, {args.dtype}, batch {args.batch}, {args.rounds} rounds")
    print(result["versions"])
    print(
        f"{'method':>20} {'s a step':>9} {'s a pair':>9} {'x encode':>9} {'min..max s':>14} {f'peak at batch {batches[0]}':>19}"
    )
    for method in times:
        spread = f"{min(times[method]):.2f}..{max(times[method]):.2f}"
        ratio = seconds[method] / seconds.get(args.methods[0], math.nan)
        pair = seconds[method] / args.batch
        peak = f"{peaks[method][0] / 1e9:16.2f} GB" if method in peaks else f"{'failed':>19}"
        print(f"{method:>20} {seconds[method]:9.3f} {pair:9.4f} {ratio:9.2f} {spread:>14} {peak}")
    if not args.quick:
        largest = {}
        for method, (whole, half) in peaks.items():
            each = (whole - half) / (args.batch - args.batch // 2)
            largest[method] = int((args.memory * 1e9 - (whole - each * args.batch)) / each) if each > 0 else None
        result["largest_batch"] = {"gigabytes": args.memory, **largest}
        print(f"largest batch in {args.memory:g} GB above the weights, extrapolated: {largest}")
        ours = five_epochs(args, backbone)
        whole = {method: EPOCHS * CAPTIONS * seconds[method] for method in seconds if method in OTHERS}
        result["five_epochs_five_captions_seconds"] = {"prefix_stored": ours, **whole}
        ratios = ", ".join(f"{method} {value:.1f} s ({value / ours:.1f} x)" for method, value in whole.items())
        print(f"{EPOCHS} epochs x {CAPTIONS} captions of {args.batch} images: stored prefixes {ours:.1f} s; {ratios}")
    write(args.json, result)
    exit_with(errors)


if __name__ == "__main__":
    main()
