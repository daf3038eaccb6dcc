"""Preprocessing: what preparing a batch costs, against the processor called once on decoded images and rendered texts.

    python benchmarks/preprocessing.py [--quick] [--json FILE]

A training step looks each input up by its key before it prepares it. The key needs the rendered text and the bytes of the
file, and the features need both again. The ratio says whether that work is done once: 1.0 is the processor alone (with
decoding and rendering), and what is above it is keys and bookkeeping. With kept prefixes there is nothing to prepare: what
is left is reading files and looking keys up. CPU seconds of this process, which other work on the machine moves less than
the clock; the backbone is not run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import WORDS, machine, medians, noise_image, parser, quiet, write
from PIL import Image

from slq_embed import PrefixStore, SLQEncoder, pretrained


def cpu_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of rounds in which every call takes its turn; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def main() -> None:
    args = parser(__doc__).parse_args()
    quiet()
    torch.set_num_threads(1)
    args.rounds = args.rounds or (3 if args.quick else 15)
    count = 64 if args.quick else 256
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 40))) for _ in range(count)]
    model = SLQEncoder.from_backbone(pretrained("mllm-tiny"), num_queries=16, device="cpu")
    module: Any = model[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(count // 4)]
        for path in paths:
            noise_image(rng, (40, 30)).resize((640, 480)).save(path, quality=90)

        def alone(inputs: list[Any]) -> None:
            """As a user of transformers alone would do it."""
            images = [[Image.open(value).convert("RGB")] if isinstance(value, Path) else [] for value in inputs]
            chats = [
                [{"role": "user", "content": [{"type": "image"} if image else {"type": "text", "text": value}]}]
                for image, value in zip(images, inputs, strict=True)
            ]
            rendered = model.processor.apply_chat_template(chats, tokenize=False)
            model.processor(
                text=rendered,
                images=images if any(images) else None,
                text_kwargs={"padding": True},
                common_kwargs={"return_tensors": "pt"},
            )

        def stored(inputs: list[Any]) -> Callable[[], Any]:
            store = PrefixStore()

            def run() -> None:
                model.prefix_store = store
                module.preprocess(inputs)
                model.prefix_store = None

            model.prefix_store = store
            model.encode(inputs)
            return run

        calls: dict[str, Callable[[], Any]] = {}
        for name, inputs in (("texts", texts), ("images", paths)):
            calls[f"{name}, processor alone"] = lambda inputs=inputs: alone(inputs)
            calls[f"{name}, without keys"] = lambda inputs=inputs: module.preprocess(inputs, keyed=False)
            calls[f"{name}, with keys"] = lambda inputs=inputs: module.preprocess(inputs)
            calls[f"{name}, prefixes kept"] = stored(inputs)
        seconds = medians(cpu_seconds(calls, args.rounds))
    result = {"machine": machine(args), "inputs": {"texts": count, "images": count // 4}, "cpu_seconds": seconds}
    print(f"{'':28}{'CPU ms an input':>16}{'ratio':>8}")
    for name, value in seconds.items():
        kind = name.split(",")[0]
        print(
            f"{name:28}{1000 * value / result['inputs'][kind]:16.3f}{value / seconds[f'{kind}, processor alone']:8.2f}"
        )
    write(args.json, result)


if __name__ == "__main__":
    main()
