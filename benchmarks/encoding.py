"""Encoding: SLQEncoder against stock Sentence Transformers on the same folder, and against the bare forward pass.

    python benchmarks/encoding.py [--quick] [--json FILE] [--device cuda --dtype bfloat16 --shape qwen3-vl-2b]

JPEG files of mixed sizes (their areas log-uniform from 96 x 96 to by default 704 x 704 pixels, sides from 1:2 to 2:1) and texts of 3
to 120 words, in random order, float32 unless said otherwise. Stock gets the files once as paths, as it must where a
collection is larger than memory, and once as opened PIL images, which it can sort by size; batch size 32, its default. "Bare" is the
forward pass alone, over features that were made before, in passes of like length: the limit. On CUDA, also the share of
time the GPU is busy and the language model's share of the measured matrix rate.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    QUERIES,
    WORDS,
    machine,
    medians,
    noise_image,
    parser,
    quiet,
    recorded,
    release,
    rounds_of,
    timed,
    to_device,
    write,
)
from PIL import Image
from sentence_transformers import SentenceTransformer
from shapes import build_folder

from slq_embed import SLQEncoder


def build_images(folder: Path, count: int, max_pixels: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        area = np.exp(rng.uniform(np.log(96**2), np.log(max_pixels)))
        ratio = np.exp(rng.uniform(np.log(0.5), np.log(2)))
        size = (int((area * ratio) ** 0.5), int((area / ratio) ** 0.5))
        paths.append(folder / f"{number}.jpg")
        noise_image(rng, (size[0] // 8 + 1, size[1] // 8 + 1)).resize(size).save(paths[-1], quality=90)
    return paths


def build_texts(count: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 120))) for _ in range(count)]


def bare(model: SLQEncoder, inputs: list[Any], batch: int) -> Callable[[], None]:
    """The forward pass over features made before."""
    from slq_embed.encoding.batches import sorted_windows

    batches = [
        to_device(model.transformer.preprocess([value for _, value in part], keyed=False), model.device)
        for window in sorted_windows(enumerate(inputs), batch)
        for part in window
    ]

    def run() -> None:
        model.eval()
        with torch.inference_mode():
            for features in batches:
                model(dict(features))

    return run


def matrix_rate(dtype: torch.dtype) -> float:
    """Measured multiply-add rate of large square matrices, in operations a second."""
    size, turns = 8192, 20
    one = torch.randn(size, size, device="cuda", dtype=dtype)
    timed(lambda: one @ one, "cuda")
    seconds = timed(lambda: [one @ one for _ in range(turns)], "cuda") / turns
    return 2 * size**3 / seconds


def prefill_rate(model: SLQEncoder, tokens: int = 256, rows: int = 64) -> float:
    """Operations a second of the language model's prefill, counting its matrices only."""
    decoder: Any = model.backbone.base_model.language_model
    matrices = sum(p.numel() for name, p in decoder.named_parameters() if p.ndim == 2 and "embed" not in name)
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="cuda")
    with torch.inference_mode():
        taken = rounds_of({"prefill": lambda: decoder(input_ids=ids, use_cache=False)}, 5, "cuda")
    return 2 * matrices * rows * tokens / medians(taken)["prefill"]


def busy_share(run: Callable[[], Any]) -> float:
    """Share of time that the GPU is busy, as nvidia-smi samples it."""
    samples: list[int] = []
    over = threading.Event()

    def watch() -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not over.is_set():
            samples.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return statistics.fmean(samples[2:-2] or samples) / 100


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=None)
    arguments.add_argument("--texts", type=int, default=None)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--max-pixels", type=int, default=704 * 704)
    arguments.add_argument("--workers", type=int, nargs="+", default=None, help="more worker counts to try")
    args = arguments.parse_args()
    quiet()
    args.images = args.images or (12 if args.quick else 96)
    args.texts = args.texts or (48 if args.quick else 384)
    args.rounds = args.rounds or (1 if args.quick else 5)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_folder(folder / "backbone", args.shape, args.dtype, args.max_pixels, args.device)
        release(args.device)
        options: dict[str, Any] = {"device": args.device}
        kwargs = {"model_kwargs": {"dtype": dtype}}
        encoder = SLQEncoder.from_backbone(folder / "backbone", num_queries=QUERIES, seed=0, dtype=dtype, **options)
        encoder.save_pretrained(folder / "slq")
        del encoder
        stock = SentenceTransformer(str(folder / "slq"), **options, **kwargs)
        ours = SLQEncoder(folder / "slq", **options, **kwargs)
        files = build_images(folder, args.images, args.max_pixels)
        names = [str(path) for path in files]
        texts = build_texts(args.texts)

        def pictures() -> list[Image.Image]:
            return [Image.open(path) for path in files]

        def with_workers(count: int | None) -> Callable[[], Any]:
            def run() -> Any:
                ours.num_workers = count
                return ours.encode(files, batch_size=args.batch)

            return run

        calls: dict[str, Callable[[], Any]] = {
            "stock_paths": lambda: stock.encode(names, batch_size=args.batch),
            "stock_pil": lambda: stock.encode(pictures(), batch_size=args.batch),
            "slq_images": with_workers(None),
            "bare_images": bare(ours, list(files), args.batch),
            "stock_texts": lambda: stock.encode(texts, batch_size=args.batch),
            "slq_texts": lambda: ours.encode(texts, batch_size=args.batch),
            "bare_texts": bare(ours, list(texts), args.batch),
        }
        calls |= {f"slq_images_{count}_workers": with_workers(count) for count in args.workers or []}
        difference = float(np.abs(calls["slq_images"]() - calls["stock_paths"]()).max())
        errors: dict[str, str] = {}
        result = machine(args) | {
            "images": args.images,
            "texts": args.texts,
            "batch": args.batch,
            "max_pixels": args.max_pixels,
            "largest_difference": difference,
            "errors": errors,
        }

        def keep(times: dict[str, list[float]]) -> None:
            result.update(seconds=medians(times), all_seconds=times)
            write(args.json, result)

        taken = rounds_of(calls, args.rounds, args.device, after=keep)
        if args.device != "cpu":  # what fails here is written down, and is not worth another run of the rounds
            with recorded(errors, "share of time"):
                result["gpu_busy"] = busy_share(calls["slq_images"])
            with recorded(errors, "rates"):
                result["matrix_rate"], result["prefill_rate"] = matrix_rate(dtype), prefill_rate(ours)
    seconds = medians(taken)
    print(
        f"{result['machine']}; {args.shape}, {args.dtype}, {args.images} images, {args.texts} texts, batch {args.batch}"
    )
    print(result["versions"], f"{args.rounds} rounds; largest difference of an embedding {difference:.1e}")
    for name, value in seconds.items():
        count = args.texts if name.endswith("texts") else args.images
        against = seconds["stock_texts" if name.endswith("texts") else "stock_paths"]
        spread = f"{min(taken[name]):.2f}..{max(taken[name]):.2f}"
        print(f"{name:>22} {value:8.2f} s ({spread}) {count / value:8.2f} a second, {against / value:5.2f} x stock")
    if "gpu_busy" in result:
        print(f"GPU busy {result['gpu_busy']:.0%}")
    if "matrix_rate" in result:
        share = result["prefill_rate"] / result["matrix_rate"]
        print(f"prefill at {share:.0%} of {result['matrix_rate'] / 1e12:.0f} Tflop/s")
    write(args.json, result)


if __name__ == "__main__":
    main()
