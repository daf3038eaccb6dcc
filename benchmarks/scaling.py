"""How costs grow: with images, tokens an image, queries, batch, passes; what the prefix store takes; query sets.

    python benchmarks/scaling.py [--quick] [--json FILE] [--device cuda --dtype bfloat16 --shape qwen3-vl-2b]

Preprocessing is left out, but in the store's part, where a step is timed as a trainer takes it. Medians of rounds in which the
settings of a part take their turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    build_inputs,
    machine,
    medians,
    parser,
    quiet,
    rounds_of,
    to_device,
    write,
)
from shapes import build_backbone, build_processor

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.prefix import features
from slq_embed.training.losses import symmetric_info_nce

SIZE = (512, 416)  # 208 tokens


class Bench:
    """Encoders and steps on one backbone."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.backbone = build_backbone(args.shape, args.device, args.dtype)

    def encoder(self, queries: int = 20) -> SLQEncoder:
        processor = build_processor(self.args.shape, 32 * 32, 2048 * 2048)
        return SLQEncoder.from_backbone(self.backbone, processor, num_queries=queries, seed=0, backbone_name="random")

    def step(self, model: SLQEncoder, inputs: Any, preprocess: bool = False) -> Callable[[], None]:
        """A training step on one batch."""
        temperature = torch.tensor(0.07, device=model.device)

        def columns() -> list[dict[str, Any]]:
            return [to_device(model.preprocess(column), model.device) for column in inputs]

        features_of_columns = None if preprocess else columns()

        def run() -> None:
            model.train()
            first, second = (
                model(dict(features))["sentence_embedding"] for features in features_of_columns or columns()
            )
            symmetric_info_nce(first, second, temperature).backward()
            model.queries.grad = None

        return run

    def encoding(self, model: SLQEncoder, images: list[Any]) -> Callable[[], None]:
        features = to_device(model.preprocess(images), model.device)

        def run() -> None:
            model.eval()
            with torch.inference_mode():
                model(dict(features))

        return run

    def medians(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        return medians(rounds_of(calls, self.args.rounds, self.args.device))


def images(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds an image, against how many are encoded."""
    model, (pictures, _) = bench.encoder(), build_inputs(4 * batch, SIZE)
    counts = [batch // 2, batch, 2 * batch, 4 * batch]
    calls = {str(n): bench.encoding(model, pictures[:n]) for n in counts}
    return {name: value / int(name) for name, value in bench.medians(calls).items()}


def tokens(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds a pair of a training step, against tokens an image."""
    model = bench.encoder()
    sizes = {size[0] * size[1] // 1024: size for size in ((256, 256), SIZE, (704, 704))}
    calls = {str(count): bench.step(model, build_inputs(batch, size)) for count, size in sizes.items()}
    return {name: value / batch for name, value in bench.medians(calls).items()}


def queries(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds a pair, against queries, first and later epochs."""
    inputs, calls = build_inputs(batch, SIZE), {}
    for count in (4, 20, 64):
        calls[f"{count} first"] = bench.step(bench.encoder(count), inputs)
        later = bench.encoder(count)
        later.prefix_store = PrefixStore()
        later.encode([*inputs[0], *inputs[1]])
        calls[f"{count} later"] = bench.step(later, inputs)
    return {name: value / batch for name, value in bench.medians(calls).items()}


def batches(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds a pair, against the batch."""
    model = bench.encoder()
    calls = {str(n): bench.step(model, build_inputs(n, SIZE)) for n in (batch // 4, batch, 2 * batch)}
    return {name: value / int(name) for name, value in bench.medians(calls).items()}


def passes(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds an image of encoding, against padded tokens a pass."""
    kind, before = bench.backbone.device.type, dict(features.TOKENS_PER_PASS)
    run = bench.encoding(bench.encoder(), build_inputs(2 * batch, SIZE)[0])

    def at(count: int) -> Callable[[], None]:
        def call() -> None:
            features.TOKENS_PER_PASS[kind] = count
            run()

        return call

    results = bench.medians({str(count): at(count) for count in (512, 1024, 2048, 4096, 8192)})
    features.TOKENS_PER_PASS.clear()
    features.TOKENS_PER_PASS.update(before)
    return {name: value / (2 * batch) for name, value in results.items()}


def paths(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds an input of encoding: as one sequence; as a prefix that stops at its last layer's keys and then queries."""
    model, calls = bench.encoder(), {}
    for kind, inputs in zip(("image", "text"), build_inputs(batch, SIZE), strict=True):
        batched = to_device(model.preprocess(inputs), model.device)

        def prefix(batched: dict[str, Any] = batched) -> None:
            with torch.inference_mode():
                model.transformer.query_states(model.transformer.prefix(dict(batched)))

        def whole(batched: dict[str, Any] = batched) -> None:
            with torch.inference_mode():
                model(dict(batched))

        def alone(batched: dict[str, Any] = batched) -> None:
            model.transformer.source.store = PrefixStore(budget=0, one_by_one=True)
            prefix(batched)
            model.transformer.source.store = None

        calls |= {f"{kind} whole": whole, f"{kind} prefix, queries": prefix, f"{kind} one by one, queries": alone}
    model.eval()
    return {name: value / batch for name, value in bench.medians(calls).items()}


def stores(bench: Bench, batch: int) -> dict[str, dict[str, float]]:
    """Seconds a pair with preprocessing, bytes a pair, and the largest change of an embedding, for each kind of store."""
    inputs = build_inputs(batch, SIZE)
    plain = bench.encoder()
    expected = plain.encode(inputs[0])
    calls = {"none": bench.step(plain, inputs, preprocess=True)}
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for level in ("keys_values", "vision"):
            for precision in ("exact", "bfloat16", "int8"):
                for where in ("memory", "disk"):
                    if where == "disk" and precision == "bfloat16":
                        continue
                    name = f"{level} {precision} {where}"
                    folder = None if where == "memory" else Path(temporary) / name
                    store = PrefixStore(folder, level=level, precision=precision)
                    model = bench.encoder()
                    model.prefix_store = store
                    calls[name] = bench.step(model, inputs, preprocess=True)
                    calls[name]()
                    model.eval()
                    difference = float(abs(model.encode(inputs[0]) - expected).max())
                    cosine = float((model.encode(inputs[0]) * expected).sum(axis=1).min())
                    results[name] = {"bytes": store.nbytes / batch, "change": difference, "least_cosine": cosine}
        for name, seconds in bench.medians(calls).items():
            results.setdefault(name, {})["seconds"] = seconds / batch
        # What a miss costs above no store: pack and write.
        misses: dict[str, Callable[[], None]] = {}
        for name in [name for name in calls if name != "none"]:
            level, precision, where = name.split()

            def miss(level: Any = level, precision: Any = precision, where: str = where) -> None:
                with tempfile.TemporaryDirectory(dir=temporary) as folder:
                    plain.prefix_store = PrefixStore(
                        None if where == "memory" else folder, level=level, precision=precision
                    )
                    calls["none"]()
                    plain.prefix_store = None

            misses[name] = miss
        for name, seconds in medians(rounds_of(misses, 1, bench.args.device)).items():
            results[name]["seconds_miss"] = seconds / batch
    return results


def sets(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds an image of encoding for one and for four query sets."""
    model, (pictures, _) = bench.encoder(), build_inputs(batch, SIZE)
    others = {str(n): bench.encoder() for n in range(4)}
    calls = {
        "1": lambda: model.encode(pictures),
        "4 at once": lambda: model.encode(pictures, query_sets=others),
        "4 in turn": lambda: [other.encode(pictures) for other in others.values()],
    }
    return {name: value / batch for name, value in bench.medians(calls).items()}


def sweeps(bench: Bench, batch: int) -> dict[str, float]:
    """Seconds a pair of a training step for one and for four query sets, first and later epochs."""
    inputs, calls = build_inputs(batch, SIZE), {}
    for name in ("first", "later"):
        model = bench.encoder()
        if name == "later":
            model.prefix_store = PrefixStore()
            model.encode([*inputs[0], *inputs[1]])
        for count in (1, 4):
            encoders = [model.with_queries(seed=n) for n in range(count)]
            for other in encoders:
                other.transformer.source = model.transformer.source
            steps = [bench.step(other, inputs) for other in encoders]

            def step(model: SLQEncoder = model, steps: list[Callable[[], None]] = steps) -> None:
                memory = model.transformer.source.memory
                memory.shared = True
                memory.clear()
                for take in steps:
                    take()

            calls[f"{count} {name}"] = step
    return {name: value / batch for name, value in bench.medians(calls).items()}


PARTS = (images, tokens, queries, batches, passes, paths, stores, sets, sweeps)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch", type=int, default=None)
    arguments.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], default=None)
    args = arguments.parse_args()
    quiet()
    args.batch = args.batch or (4 if args.quick else 16)
    args.rounds = args.rounds or (1 if args.quick else 3)
    result: dict[str, Any] = machine(args) | {"batch": args.batch}
    print(f"{result['machine']}; {args.shape}, {args.dtype}, batch {args.batch}, {args.rounds} rounds")
    print(result["versions"])
    bench = Bench(args)
    for part in PARTS:
        if args.parts and part.__name__ not in args.parts:
            continue
        results = result[part.__name__] = part(bench, args.batch)
        print(f"{part.__name__}: {part.__doc__}")
        for name, value in results.items():
            shown = f"{value:.4f}" if isinstance(value, float) else ", ".join(f"{k} {v:.4g}" for k, v in value.items())
            print(f"{name:>28}  {shown}")
    write(args.json, result)


if __name__ == "__main__":
    main()
