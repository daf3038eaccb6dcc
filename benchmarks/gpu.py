"""All that waits for a GPU, most wanted first, in pieces that each take less than nine minutes.

    make gpu                                   # or: python benchmarks/gpu.py [--minutes 9] [--only NAME ...] [--output FOLDER]
    python benchmarks/gpu.py --rehearse        # the same commands on a CPU, small: do they run?

A piece is a command with a time limit. Its output is NAME.log, its results are NAME.json. All of them are in OUTPUT/results.tar, one
file that is written anew after each piece: a machine that is lent may bring back only a few. A piece with results is not run
again, so the same command goes on where the last one stopped. On another machine it goes on from benchmarks/results/gpu/results.tar:
put the last one there. A piece that failed (a test, too) keeps what it had as NAME.partial.json, and is run after those that are
left. A piece is begun while 0.7 of its seconds are left of --minutes, and stopped at their end, with all that it has started. What a
machine lacks is skipped by name.

Wheels in .wheels, which `make gpu-wheels` gathers where there is a registry, come before the machine's own packages. If pip refuses
one of them, none is used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / ".wheels"
KEPT = ROOT / "benchmarks/results/gpu"
BEGUN_WITH = 0.7
"""Share of a piece's seconds that must be left. The seconds are guesses on the safe side: none of this ran on a GPU yet."""
# A process group can be stopped with all its processes. A session of its own would outlive what runs this script.
OWN_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
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
        folder: An option that takes a folder, in which the piece keeps what is done of it.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    needs: str | None = None
    folder: str | None = None


def training(shape: str, batch: int, seconds: int, *more: str) -> Piece:
    """A training step of each method on a backbone of true size."""
    script = "benchmarks/training.py"
    command = (script, *TRUE, "--shape", shape, "--batch", str(batch), *PHOTOS, *more)
    name = "-".join(["training", shape, *(option.strip("-") for option in more)])
    methods = ("encode", "lora") if "--checkpointing" in more else ("encode", "prefix")
    rehearsal = (script, *SMALL, "--rounds", "1", "--batch", "2", "--methods", *methods, *more)
    return Piece(name, seconds, command, rehearsal)


def recipe(backbone: str, batch: int) -> Piece:
    """The paper's run: steps of a large batch in chunks, through the host's trainer, at true size."""
    command = ("examples/train_recipe.py", "--dry-run", "--data", "coco", "--backbone", backbone, "--path", ".")
    small = tuple("mllm-tiny" if word == backbone else word for word in command)
    name = f"recipe-{backbone.lower()}-batch-{batch}"
    command = (*command, "--dry-batch", str(batch), "--dry-steps", "2")
    return Piece(name, 450, command, (*small, "--dry-batch", "2"), needs="datasets")


# A line for each test, and the stack of one that hangs, also in the log of a run that is stopped. A warning of a package is no failure.
TESTS = ("-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-rs", "-p", "no:cacheprovider", "tests/gpu")
TESTS += ("-o", "faulthandler_timeout=120", "-W", "default::DeprecationWarning", "-W", "default::FutureWarning")
ENCODING, QUALITY = "benchmarks/encoding.py", ("benchmarks/quality.py", "--quick")
PIECES = (
    Piece("tests", 400, TESTS, needs="pytest"),
    training("qwen3-vl-2b", 32, 300),
    Piece("encoding-qwen3-vl-2b", 450, (ENCODING, *TRUE, "--shape", "qwen3-vl-2b", "--images", "512", "--texts", "1024")),
    training("qwen3-vl-4b", 16, 350),
    recipe("qwen3-vl-4b", 1024),
    training("internvl3-1b", 32, 300),
    training("internvl3-8b", 8, 400),
    Piece("compiled-qwen3-vl-2b", 450, ("benchmarks/compiled.py", *TRUE, "--shape", "qwen3-vl-2b"), ("benchmarks/compiled.py", *SMALL)),
    Piece("encoding-qwen3-vl-4b", 450, (ENCODING, *TRUE, "--shape", "qwen3-vl-4b", "--images", "256", "--texts", "512")),
    training("qwen3-vl-2b", 32, 300, "--checkpointing"),
    Piece("quantization", 480, ("benchmarks/quantization.py", "--device", "cuda"), ("benchmarks/quantization.py", "--quick"), "torchao"),
    Piece("self-check-qwen3-vl-4b", 150, ("benchmarks/self_check.py", *TRUE, "--shape", "qwen3-vl-4b"), ("benchmarks/self_check.py", *SMALL)),
    Piece("index", 500, ("benchmarks/index.py", "--gpu"), needs="faiss"),
    Piece("quality-quick", 450, (*QUALITY, "--device", "cuda"), (*QUALITY, "--methods", "slq"), "peft", "--output"),
)  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """Of a piece: the project, and the wheels that were carried along."""
    paths = [
        str(ROOT),
        *(str(ROOT / "integrations" / name) for name in ("langchain-slq", "llama-index-embeddings-slq")),
    ]
    if wheels := sorted(map(str, WHEELS.glob("*.whl"))):
        # Not compiled: most of Transformers is never imported.
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(folder)]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=False)
        if done.returncode:
            print(f"without {WHEELS}, which pip refuses: the machine's own packages alone", flush=True)
        else:
            paths.append(str(folder))
    paths += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def stopped_after(limit: float, command: list[str], log: Path, settings: dict[str, str]) -> int | None:
    """The exit code of a command; ``None`` if it was stopped. Nothing that it has started runs on, to hold the GPU."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT, **OWN_GROUP
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(piece: Piece, output: Path, limit: float, rehearse: bool, settings: dict[str, str]) -> str:
    """Run a piece; returns what became of it in a line."""
    command = piece.rehearsal if rehearse else piece.command
    kinds = ("json", "partial.json", "running.json", "log")
    results, partial, running, log = (output / f"{piece.name}.{kind}" for kind in kinds)
    json_of_its_own = command[0] != "-m"
    arguments = [sys.executable, *command]
    arguments += [piece.folder, str(output / piece.name)] if piece.folder else []
    arguments += ["--json", str(running)] if json_of_its_own else []
    started, code = time.monotonic(), None
    try:
        code = stopped_after(limit, arguments, log, settings)
    finally:  # also where this script is ended: results that are not whole must not pass for whole ones
        if running.exists():
            running.replace(results if code == 0 else partial)
    seconds = time.monotonic() - started
    tail = log.read_text("utf8", errors="replace").splitlines()[-3:]
    if code != 0:
        return f"{'stopped' if code is None else 'FAILED'} after {seconds:.0f} s: {' | '.join(tail)}"
    partial.unlink(missing_ok=True)
    if not json_of_its_own:
        stamp = {"date": date.today().isoformat(), "versions": {"torch": torch.__version__}}
        result = {**stamp, "command": command, "exit_code": code, "end_of_log": tail}
        results.write_text(json.dumps(result, indent=2) + "\n")
    return f"done in {seconds:.0f} s: {tail[-1] if tail else ''}"


def unpack(archive: Path, folder: Path) -> None:
    if archive.exists():
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")


def pack(folder: Path, archive: Path) -> None:
    """Write an archive whole, or leave the one that is there."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as files:
        for path in sorted(folder.iterdir()):
            files.add(path, path.name)
    partial.replace(archive)


def missing(piece: Piece, rehearse: bool, wheels: Path) -> str | None:
    """Why a piece cannot run here."""
    if rehearse and not piece.rehearsal:
        return "nothing of it runs on a CPU"
    if piece.needs and not (importlib.util.find_spec(piece.needs) or (wheels / piece.needs).is_dir()):
        return f"there is no {piece.needs}"
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run")
    parser.add_argument("--only", nargs="+", choices=[piece.name for piece in PIECES])
    parser.add_argument("--output", type=Path, default=KEPT, help="folder of results.tar")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device: skipped. --rehearse runs the commands on a CPU, small.")
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    archive = args.output / ("rehearsal.tar" if args.rehearse else "results.tar")
    with tempfile.TemporaryDirectory() as temporary:
        wheels, output = Path(temporary) / "wheels", Path(temporary) / "output"
        output.mkdir()
        for folder in (KEPT, args.output):
            unpack(folder / archive.name, output)
        settings = environment(wheels)
        for piece in in_order(output, args.only):
            left = end - time.monotonic()
            if (output / f"{piece.name}.json").exists():
                line = f"done before, see {piece.name}.json"
            elif reason := missing(piece, args.rehearse, wheels):
                line = f"skipped, {reason}"
            elif left < BEGUN_WITH * piece.seconds:
                line = f"not begun, {left:.0f} s are left and it may take {piece.seconds}; run the same command again"
            else:
                limit = left if args.rehearse else min(left, piece.seconds)  # a busy CPU may take longer than a GPU
                try:
                    line = run(piece, output, limit, args.rehearse, settings)
                finally:
                    pack(output, archive)
            print(f"{piece.name}: {line}", flush=True)
    print(f"logs and results: {archive}")


def in_order(output: Path, only: list[str] | None) -> list[Piece]:
    """The chosen pieces: first those that are done, last those that failed before."""
    chosen = [piece for piece in PIECES if only is None or piece.name in only]

    def rank(piece: Piece) -> int:
        if (output / f"{piece.name}.json").exists():
            return 0
        return 2 if (output / f"{piece.name}.log").exists() else 1

    return sorted(chosen, key=rank)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the piece ends as well
    main()
