"""All that waits for a GPU, most wanted first, in pieces that each take less than nine minutes.

    make gpu                                   # or: python benchmarks/gpu.py [--minutes 9] [--only NAME ...] [--output FOLDER]
    python benchmarks/gpu.py --rehearse        # the same commands on a CPU, small: do they run?

A piece is a command with a time limit. Its output goes into OUTPUT/NAME.log, its results into OUTPUT/NAME.json. A piece with results
is not run again, so the same command goes on where the last one stopped; one that failed (a test, too) has none, and is, after those
that are left. A piece is begun while a quarter of --minutes is left, and stopped at their end. What a machine lacks is skipped by name.

Wheels in .wheels, which `make gpu-wheels` gathers where there is a registry, are used where they are: a GPU machine may reach none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / ".wheels"
TRUE = ("--device", "cuda", "--dtype", "bfloat16")
SMALL = ("--device", "cpu", "--quick")
STEP = ("--methods", "encode", "prefix", "prefix_stored", "query_adapter", "all_positions", "lora", "full_finetuning")
PHOTOS = ("--image-size", "448", "448", "--rounds", "5", *STEP)


@dataclass(frozen=True)
class Piece:
    """A command.

    Args:
        name: Of its files.
        seconds: After which it is stopped.
        command: A script and its arguments; the results go where ``--json`` says.
        rehearsal: The same on a CPU, small; empty for what only a GPU can do.
        needs: A module that it cannot do without.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    needs: str | None = None


def training(shape: str, batch: int, *more: str) -> Piece:
    """A training step of each method on a backbone of true size."""
    script = "benchmarks/training.py"
    command = (script, *TRUE, "--shape", shape, "--batch", str(batch), *PHOTOS, *more)
    name = "-".join(["training", shape, *(option.strip("-") for option in more)])
    rehearsal = (script, *SMALL, "--rounds", "1", "--batch", "2", "--methods", "encode", "prefix", *more)
    return Piece(name, 500, command, rehearsal)


def recipe(backbone: str, batch: int) -> Piece:
    """The paper's run: steps of a large batch in chunks, through the host's trainer, at true size."""
    command = ("examples/train_recipe.py", "--dry-run", "--data", "coco", "--backbone", backbone, "--path", ".")
    small = ("mllm-tiny" if word == backbone else word for word in command)
    name = f"recipe-{backbone.lower()}-batch-{batch}"
    return Piece(name, 500, (*command, "--dry-batch", str(batch), "--dry-steps", "2"), (*small, "--dry-batch", "2"))


ENCODING = "benchmarks/encoding.py"
PIECES = (
    Piece("tests", 480, ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs", "tests/gpu"), needs="pytest"),
    training("qwen3-vl-2b", 32),
    Piece("encoding-qwen3-vl-2b", 480, (ENCODING, *TRUE, "--shape", "qwen3-vl-2b", "--images", "512", "--texts", "1024")),
    training("qwen3-vl-4b", 16),
    recipe("qwen3-vl-4b", 1024),
    Piece("compiled-qwen3-vl-2b", 500, ("benchmarks/compiled.py", *TRUE, "--shape", "qwen3-vl-2b"), ("benchmarks/compiled.py", *SMALL)),
    training("internvl3-1b", 32),
    training("internvl3-8b", 8),
    Piece("encoding-qwen3-vl-4b", 480, (ENCODING, *TRUE, "--shape", "qwen3-vl-4b", "--images", "256", "--texts", "512")),
    training("qwen3-vl-2b", 32, "--checkpointing"),
    Piece("quantization", 480, ("benchmarks/quantization.py", "--device", "cuda"), ("benchmarks/quantization.py", "--quick"), "torchao"),
    Piece("index", 500, ("benchmarks/index.py", "--gpu"), needs="faiss"),
    Piece("quality-toy", 540, ("benchmarks/quality.py", "--device", "cuda"), ("benchmarks/quality.py", "--quick", "--methods", "slq"), "peft"),
)  # fmt: skip


def environment(folder: str, rehearse: bool) -> dict[str, str]:
    """Of a piece: the project, and on a GPU machine the wheels that were carried along."""
    paths = [
        str(ROOT),
        *(str(ROOT / "integrations" / name) for name in ("langchain-slq", "llama-index-embeddings-slq")),
    ]
    if not rehearse and (wheels := sorted(map(str, WHEELS.glob("*.whl")))):
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
        subprocess.run([*install, *wheels], check=True)
        paths.append(folder)
    paths += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(piece: Piece, output: Path, limit: float, rehearse: bool, settings: dict[str, str]) -> str:
    """Run a piece; returns what became of it in a line."""
    command = piece.rehearsal if rehearse else piece.command
    results = output / f"{piece.name}.json"
    json_of_its_own = command[0] != "-m"
    arguments = [sys.executable, *command, *(["--json", str(results)] if json_of_its_own else [])]
    started = time.monotonic()
    with (output / f"{piece.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                arguments, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.monotonic() - started
    tail = (output / f"{piece.name}.log").read_text("utf8", errors="replace").splitlines()[-3:]
    if code != 0:
        results.unlink(missing_ok=True)
        return f"{'stopped' if code is None else 'FAILED'} after {seconds:.0f} s: {' | '.join(tail)}"
    if not json_of_its_own:
        results.write_text(json.dumps({"command": command, "exit_code": code, "end_of_log": tail}, indent=2) + "\n")
    return f"done in {seconds:.0f} s: {tail[-1] if tail else ''}"


def missing(piece: Piece, rehearse: bool, folder: str) -> str | None:
    """Why a piece cannot run here."""
    if rehearse and not piece.rehearsal:
        return "nothing of it runs on a CPU"
    if piece.needs and not (importlib.util.find_spec(piece.needs) or (Path(folder) / piece.needs).is_dir()):
        return f"there is no {piece.needs}"
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run")
    parser.add_argument("--only", nargs="+", choices=[piece.name for piece in PIECES])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device: skipped. --rehearse runs the commands on a CPU, small.")
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [piece for piece in PIECES if args.only is None or piece.name in args.only]
    for piece in chosen:
        if (results := args.output / f"{piece.name}.json").exists():
            print(f"{piece.name}: done before, see {results}", flush=True)
    chosen = [piece for piece in chosen if not (args.output / f"{piece.name}.json").exists()]
    failed = [piece for piece in chosen if (args.output / f"{piece.name}.log").exists()]
    with tempfile.TemporaryDirectory() as folder:
        settings = environment(folder, args.rehearse)
        for piece in [*(piece for piece in chosen if piece not in failed), *failed]:
            left = end - time.monotonic()
            if reason := missing(piece, args.rehearse, folder):
                print(f"{piece.name}: skipped, {reason}", flush=True)
            elif left < min(piece.seconds, 60 * args.minutes / 4):
                print(f"{piece.name}: not begun, {left:.0f} s are left; run the same command again", flush=True)
            else:
                outcome = run(piece, args.output, min(left, piece.seconds), args.rehearse, settings)
                print(f"{piece.name}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
