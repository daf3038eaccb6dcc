"""What the benchmarks share: inputs, timing, memory, a record of the machine."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from PIL import Image
from shapes import SHAPES
from torch import Tensor

from slq_embed.prefix.features import backbone_inputs, lay_out

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


def noise_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def build_inputs(batch: int, size: tuple[int, int], words: int = 24) -> tuple[list[Image.Image], list[str]]:
    rng = np.random.default_rng(0)
    return [noise_image(rng, size) for _ in range(batch)], [" ".join(rng.choice(WORDS, words)) for _ in range(batch)]


def model_inputs(features: dict[str, Any]) -> dict[str, Any]:
    """What a plain backbone takes of the features of a batch."""
    laid_out = lay_out(features)
    return {
        "input_ids": laid_out["input_ids"],
        "attention_mask": laid_out["attention_mask"],
        **backbone_inputs(laid_out),
    }


def to_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
    if (media := features.get("media")) is not None:
        moved["media"] = replace(media, values={name: value.to(device) for name, value in media.values.items()})
    return moved


def tensors_of(features: dict[str, Any]) -> list[Tensor]:
    """All tensors of a batch, those of its images too."""
    media = features["media"].values.values() if "media" in features else ()
    return [*(value for value in features.values() if isinstance(value, Tensor)), *media]


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def rounds_of(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
    warm_up: bool = True,
    after: Callable[[dict[str, list[float]]], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of rounds in which every call takes its turn; a first round warms up and is not counted.

    ``after`` gets the seconds so far after each round: a run that is stopped keeps them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-int(warm_up), rounds):
        for name, call in calls.items():
            seconds = timed(call, device)
            if turn >= 0:
                times[name].append(seconds)
        if after is not None and turn >= 0:
            after(times)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_above_weights(step: Callable[[], Any], device: str, times: int = 2) -> int:
    """Bytes that some steps need at most, above what is loaded already; on a CPU, for a process of its own."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(times):
            step()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the step has freed is not the step's to use again
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = kilobytes("VmRSS")
    for _ in range(times):
        step()
    return 1024 * (kilobytes("VmHWM") - before)


def release(device: str) -> None:
    """Give back the memory of what was deleted: models and optimizers are in cycles, and PyTorch keeps what it freed on a GPU."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


@contextmanager
def recorded(errors: dict[str, str], name: str) -> Iterator[None]:
    """What fails in here is written down under this name, and costs its own row, not the others."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        errors[name] = f"{type(error).__name__}: {error}"


def exit_with(errors: dict[str, str]) -> None:
    """End as a failure if there were any; what else was measured is written by then."""
    if errors:
        raise SystemExit(f"failed: {', '.join(errors)}")


def in_own_process(script: str, *arguments: Any, threads: int | None = None) -> str:
    """The last word that a script prints; with so many threads, by default as many as there are cores."""
    command = [sys.executable, "-W", "ignore", script, *map(str, arguments)]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        raise RuntimeError(process.stderr)
    return process.stdout.split()[-1]


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a short run, of about two minutes or less")
    options.add_argument("--json", type=Path, help="file to write the results to")
    options.add_argument("--rounds", type=int, default=None)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--shape", default="design", choices=SHAPES)
    return options


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (torch, transformers, sentence_transformers)}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    processor = cpu if args.device == "cpu" else torch.cuda.get_device_name()
    return {
        "machine": processor,
        "versions": versions(),
        "dtype": args.dtype,
        "shape": args.shape,
        "rounds": args.rounds,
    }


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result, with the date and the versions if it does not say them itself."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stamped = {"date": date.today().isoformat(), "versions": versions(), **result}
        path.write_text(json.dumps(stamped, indent=2) + "\n")
