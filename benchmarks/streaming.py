"""Peak memory of training on a stream, by the size of the stream and of the buffer that mixes it.

    python benchmarks/streaming.py [--quick] [--images 600 1200 2400] [--json FILE]

Runs examples/train.py once over WebDataset shards of JPEG noise, in a process of its own for each size. The last run mixes the largest
stream in a buffer that holds all of it: what memory would grow by if the stream were kept. --quick has two sizes, and takes three minutes
on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import WORDS, in_own_process, machine, noise_image, parser, quiet, write

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZE = (640, 480)
A_SHARD = 100
BATCH, BUFFER = 16, 32


def write_shards(folder: Path, images: int) -> int:
    """Shards of so many images, each with a caption, and their bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    total = 0
    for first in range(0, images, A_SHARD):
        with tarfile.open(folder / f"{first // A_SHARD:04}.tar", "w") as shard:
            for number in range(first, min(first + A_SHARD, images)):
                noise_image(rng, SIZE).save(content := io.BytesIO(), "JPEG", quality=90)
                caption = f"{' '.join(rng.choice(WORDS, 6))} {number}".encode()
                for ending, data in (("jpg", content.getvalue()), ("txt", caption)):
                    entry = tarfile.TarInfo(f"{number:06}.{ending}")
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))
                    total += len(data)
    return total


def train(folder: Path, images: int, buffer: int) -> int:
    """Train on each image of the shards once; the peak memory of this process in bytes."""
    sys.path.insert(0, str(EXAMPLES))
    shards = map(str, sorted(folder.glob("*.tar")))
    options = ["--columns", "jpg", "txt", "--queries", 2, "--batch", BATCH, "--chunk", BATCH, "--buffer", buffer]
    options += ["--steps", images // BATCH, "--output", folder / f"output-{buffer}"]
    importlib.import_module("train").main(["--stream", *shards, *map(str, options)])
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(folder: Path, images: int, buffer: int) -> int:
    """As ``train``, in a process of its own."""
    return int(in_own_process(__file__, "--run", folder, images, buffer))


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="+", help="images of each stream (default: 600 1200 2400)")
    options.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    quiet()
    if args.run:
        folder, images, buffer = args.run
        print(train(Path(folder), int(images), int(buffer)))
        return
    sizes = sorted(args.images or ([600, 1800] if args.quick else [600, 1200, 2400]))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for images in sizes:
            folder = Path(scratch) / str(images)
            size = write_shards(folder, images)
            for buffer in (BUFFER, images) if images == sizes[-1] else (BUFFER,):
                peak = measure(folder, images, buffer)
                runs.append({"images": images, "bytes": size, "buffer": buffer, "peak_bytes": peak})
                print(f"{images:>6} images, {size / 1e6:6.0f} MB, buffer {buffer:>5}: peak {peak / 1e6:6.0f} MB")
    write(args.json, {**machine(args), "shape": "mllm-tiny", "batch": BATCH, "image_size": SIZE, "runs": runs})


if __name__ == "__main__":
    main()
