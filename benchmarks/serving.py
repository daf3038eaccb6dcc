"""Serving: vLLM with the plugin vllm-slq against SLQEncoder.encode, the same model and inputs, in turns of one run.

    make test-vllm  # once: it makes the virtual environment of vLLM
    python benchmarks/serving.py [--quick] [--json FILE] [--dtype bfloat16] [--texts 64] [--images 32]

Texts of 3 to 60 words and noise images of 256 x 256 pixels, new ones in every round, because vLLM keeps what its tower has computed
of an image. Both get batches of 32. The server runs on this machine, in two processes, each with as many threads as SLQEncoder here:
one reads requests and images, one computes, so it can use twice the cores. Its time includes decoding and encoding images as PNG.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import QUERIES, WORDS, machine, medians, noise_image, parser, quiet, timed, write
from shapes import build_folder

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests start a server in the same way
from slq_embed import SLQEncoder
from slq_embed.remote import RemoteEncoder
from slq_embed.saving import export_vllm
from slq_embed.serving import embed
from tests.vllm.server import PYTHON, vllm

PIXELS = 256


def build_inputs(texts: int, images: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "texts": [" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(texts)],
        "images": [noise_image(rng, (PIXELS, PIXELS)) for _ in range(images)],
    }


def embed_into(found: list[Any], model: SLQEncoder | RemoteEncoder, inputs: list[Any]) -> None:
    found.append(embed(model, inputs))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=None)
    options.add_argument("--images", type=int, default=None)
    args = options.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    counts = (args.texts or (16 if args.quick else 64), args.images or (8 if args.quick else 32))
    quiet()
    command = [str(PYTHON), "-c", "import vllm; print('vllm', vllm.__version__)"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_folder(folder / "backbone", args.shape, args.dtype, PIXELS**2)
        local = SLQEncoder.from_backbone(
            folder / "backbone", num_queries=QUERIES, seed=0, device="cpu", dtype=args.dtype
        )
        export_vllm(local, folder / "model")
        threads = str(torch.get_num_threads())
        with vllm(folder / "model", folder / "log.txt", "--dtype", args.dtype, threads=threads) as process:
            if process.code is not None:
                raise RuntimeError(process.log.read_text()[-3000:])
            remote = RemoteEncoder(process.url)
            times: dict[str, list[float]] = {}
            cosine = 1.0
            for turn in range(-1, args.rounds):  # the first one warms up
                for kind, inputs in build_inputs(*counts, seed=turn + 1).items():
                    found: list[Any] = []
                    for who, model in (("SLQEncoder", local), ("vLLM", remote)):
                        seconds = timed(partial(embed_into, found, model, inputs), "cpu")
                        if turn >= 0:
                            times.setdefault(f"{who}, {kind}", []).append(seconds)
                    cosine = min(cosine, float((found[0] * found[1]).sum(1).min()))
    seconds = medians(times)
    result = {"machine": machine(args), "vllm": version, "texts": counts[0], "images": counts[1], "seconds": seconds}
    result |= {"seconds_of_rounds": times, "least_cosine": cosine}
    print(f"{'':24}{'s':>8}{'inputs/s':>10}")
    for name, value in seconds.items():
        print(f"{name:24}{value:8.2f}{result[name.split(', ')[1]] / value:10.1f}")
    print(f"least cosine {cosine:.7f}, vLLM {version}")
    write(args.json, result)


if __name__ == "__main__":
    main()
