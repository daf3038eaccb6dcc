"""What a training step costs: prefix path, all positions with autograd, LoRA and full fine-tuning, side by side.

    python benchmarks/training.py [--quick] [--json FILE] [--device cuda] [--dtype bfloat16]

One backbone shape (Qwen3-VL, 59 M parameters, random weights: speed and memory do not depend on the values), one
batch of images of 208 tokens with texts of about 30. Times are medians of rounds in which every method takes its
turn, so that a noisy machine slows all of them alike; preprocessing is left out of all of them. Memory is the peak
above the loaded weights, each method in a process of its own. At the end, stock `SentenceTransformer.encode` against
`SLQEncoder.encode` on the same folder, preprocessing included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLConfig

from slq_embed import SLQEncoder, pretrained
from slq_embed.losses import symmetric_info_nce

METHODS = ("encode", "prefix", "all_positions", "lora", "full_finetuning")
IMAGE_SIZE = (512, 416)  # width, height in pixels: 16 x 13 = 208 tokens at patch 16, merged two by two
QUERIES = 20
WORDS = [
    "a",
    "red",
    "circle",
    "above",
    "a",
    "blue",
    "square",
    "and",
    "two",
    "green",
    "stars",
    "beside",
    "a",
    "small",
    "yellow",
    "ring",
    "on",
    "a",
    "grey",
    "ground",
]


def build_folder(folder: Path) -> None:
    """The backbone shape of the design notes, with the embedded default's tokenizer."""
    processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))
    tiny = transformers.AutoConfig.from_pretrained(pretrained("mllm-tiny"))
    text = {
        **tiny.text_config.to_dict(),
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
    }
    vision = {
        "depth": 8,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_heads": 6,
        "patch_size": 16,
        "out_hidden_size": 512,
        "num_position_embeddings": 1024,
        "deepstack_visual_indexes": [4],
    }
    ids = {key: getattr(tiny, key) for key in ("image_token_id", "video_token_id")}
    ids |= {key: getattr(tiny, key) for key in ("vision_start_token_id", "vision_end_token_id")}
    torch.manual_seed(0)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.image_processor.patch_size = 16
    pixels = IMAGE_SIZE[0] * IMAGE_SIZE[1]
    processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
    processor.save_pretrained(folder)


def build_inputs(batch: int) -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (*IMAGE_SIZE[::-1], 3), dtype=np.uint8)) for _ in range(batch)]
    return images, [" ".join(rng.choice(WORDS, 24)) for _ in range(batch)]


def to_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}


def build_step(method: str, folder: Path, batch: int, device: str, dtype: str) -> Callable[[], None]:
    """A function that takes one step of a method on the same batch."""
    model = SLQEncoder.from_backbone(folder, num_queries=QUERIES, seed=0, device=device, dtype=getattr(torch, dtype))
    images, texts = build_inputs(batch)
    columns = [to_device(model.preprocess(column), model.device) for column in (images, texts)]
    temperature = torch.tensor(0.07, device=model.device)
    decoder = model.backbone.base_model

    if method == "encode":

        def encode() -> None:
            with torch.no_grad():
                for features in columns:
                    model(dict(features))

        return encode

    def last_token(features: dict[str, Any]) -> Tensor:
        inputs = {key: value for key, value in features.items() if key not in ("num_images_per_sample", "prefix_key")}
        return torch.nn.functional.normalize(
            decoder(**inputs, use_cache=False).last_hidden_state[:, -1].float(), dim=-1
        )

    def all_positions(features: dict[str, Any]) -> Tensor:
        return torch.nn.functional.normalize(model[0].all_positions(features).float().mean(dim=1), dim=-1)

    def prefix(features: dict[str, Any]) -> Tensor:
        return model(dict(features))["sentence_embedding"]

    embed = {"prefix": prefix, "all_positions": all_positions}.get(method, last_token)
    trained = [model.queries]
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        decoder = get_peft_model(decoder, LoraConfig(r=16, lora_alpha=32, target_modules=names))
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


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> float:
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def peak_above_weights(method: str, args: argparse.Namespace, folder: Path) -> int:
    """Bytes; in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", method, "--folder", str(folder)]
    command += ["--batch", str(args.batch), "--device", args.device, "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])


def measure_memory(args: argparse.Namespace) -> None:
    step = build_step(args.memory_of, args.folder, args.batch, args.device, args.dtype)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = kilobytes("VmRSS")
    step()
    step()
    print(1024 * (kilobytes("VmHWM") - before))


def compare_encode(folder: Path, batch: int, rounds: int, device: str) -> dict[str, float]:
    """Seconds for the same inputs through stock Sentence Transformers and through SLQEncoder."""
    images, texts = build_inputs(batch)
    with tempfile.TemporaryDirectory() as saved:
        SLQEncoder.from_backbone(folder, num_queries=QUERIES, seed=0, device=device).save_pretrained(saved)
        models = {"stock": SentenceTransformer(saved, device=device), "slq": SLQEncoder(saved, device=device)}
        taken: dict[str, list[float]] = {f"{name}_{kind}": [] for name in models for kind in ("images", "texts")}
        for turn in range(rounds + 1):
            for name, model in models.items():
                for kind, inputs in (("images", images), ("texts", texts)):
                    seconds = timed(lambda m=model, i=inputs: m.encode(i, batch_size=batch), device)
                    if turn:
                        taken[f"{name}_{kind}"].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small batch and few rounds, under 150 s")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.batch = args.batch or (2 if args.quick else 16)
    args.rounds = args.rounds or (5 if args.quick else 9)
    if args.memory_of:
        measure_memory(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_folder(folder)
        steps = {method: build_step(method, folder, args.batch, args.device, args.dtype) for method in METHODS}
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for turn in range(args.rounds + 1):
            for method, step in steps.items():
                taken = timed(step, args.device)
                if turn:  # the first round warms up
                    seconds[method].append(taken)
        del steps
        medians = {method: statistics.median(values) for method, values in seconds.items()}
        peaks = {method: peak_above_weights(method, args, folder) for method in METHODS}
        encoded = compare_encode(folder, args.batch, args.rounds, args.device)
    machine = platform.processor() or platform.machine()
    where = (
        f"{torch.cuda.get_device_name()}" if args.device != "cpu" else f"{machine}, {torch.get_num_threads()} threads"
    )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, sentence_transformers)}
    print(f"{where}; {args.dtype}, batch {args.batch}, {args.rounds} rounds; {versions}")
    print(f"{'method':>16} {'s a step':>9} {'x encode':>9} {'min..max s':>14} {'peak above weights':>19}")
    for method in METHODS:
        spread = f"{min(seconds[method]):.2f}..{max(seconds[method]):.2f}"
        ratio = medians[method] / medians["encode"]
        print(f"{method:>16} {medians[method]:9.3f} {ratio:9.2f} {spread:>14} {peaks[method] / 1e9:16.2f} GB")
    for kind in ("images", "texts"):
        stock, ours = encoded[f"stock_{kind}"], encoded[f"slq_{kind}"]
        print(f"encode {kind}: stock {stock:.3f} s, SLQEncoder {ours:.3f} s, {stock / ours:.2f} x as fast")
    if args.json:
        result = {"machine": where, "versions": versions, "batch": args.batch, "rounds": args.rounds}
        result |= {"seconds_per_step": medians, "peak_bytes_above_weights": peaks, "encode_seconds": encoded}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
