"""Whether torch.compile and CUDA graphs pay for the query pass, forward and backward.

    python benchmarks/compiled.py [--quick] [--batch 16] [--json FILE] [--device cuda --dtype bfloat16 --shape qwen3-vl-2b]

The prefixes of a batch are computed once, as in later epochs, where the query pass is all that is left to run. The layers of the
language model are compiled one by one. A form runs all its rounds, then the next one does, and then all forms once more; the
compilation is counted apart. The gradients of each form, after its last round, are compared with those of the eager one. Results are
written as they come; a form that fails is among their `errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from common import (
    QUERIES,
    build_inputs,
    exit_with,
    machine,
    medians,
    parser,
    quiet,
    recorded,
    timed,
    to_device,
    write,
)
from shapes import build_backbone, build_processor

from slq_embed import SLQEncoder

FORMS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {"dynamic": False},
    "with CUDA graphs": {"dynamic": False, "mode": "reduce-overhead"},
}


@contextmanager
def compiled(layers: Any, options: dict[str, Any] | None) -> Iterator[None]:
    """Layers that are compiled while they are used here.

    Each layer is a variant of the same code. By default eight are compiled, and the others run uncompiled without a word.
    """
    for layer in layers:
        if options is not None:
            layer.compile(**options)
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 2 * len(layers))
    try:
        with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def build_step(model: SLQEncoder, batch: int, size: tuple[int, int]) -> Callable[[], None]:
    """A function that runs the queries after the prefixes of a batch of images, and back."""
    transformer = model.transformer
    features = to_device(model.preprocess(build_inputs(batch, size)[0], keyed=False), model.device)
    model.train()
    prefix = transformer.prefix(features)
    weight = torch.randn(
        transformer.query_states(prefix).shape, device=model.device
    )  # the norm of states has no gradient

    def step() -> None:
        transformer.queries.grad = None
        (transformer.query_states(prefix) * weight).sum().backward()

    return step


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--image-size", type=int, nargs=2, default=(448, 448), help="width and height in pixels")
    args = options.parse_args()
    quiet()
    args.rounds = args.rounds or (2 if args.quick else 20)
    args.batch = 2 if args.quick else args.batch
    pixels = args.image_size[0] * args.image_size[1]
    backbone = build_backbone(args.shape, args.device, args.dtype)
    processor = build_processor(args.shape, pixels, pixels)
    model = SLQEncoder.from_backbone(backbone, processor, num_queries=QUERIES, seed=0, backbone_name="random")
    step = build_step(model, args.batch, args.image_size)
    layers = backbone.base_model.get_decoder().layers
    forms = {name: form for name, form in FORMS.items() if args.device != "cpu" or "CUDA" not in name}
    step()
    reference = model.queries.grad.clone()
    result: dict[str, Any] = machine(args) | {"batch": args.batch, "first": {}, "difference": {}, "errors": {}}
    times: dict[str, list[float]] = {name: [] for name in forms}
    changes: dict[str, list[Any]] = {name: [] for name in forms}
    for turn in range(2):  # forms take turns twice: a compiled form does not stay behind when another runs
        for name, form in forms.items():
            if name in result["errors"]:
                continue
            torch.compiler.reset()
            with recorded(result["errors"], name), compiled(layers, form):
                seconds = timed(step, args.device)
                if not turn:
                    result["first"][name] = seconds
                timed(step, args.device)
                times[name] += [timed(step, args.device) for _ in range(args.rounds)]
                # Of the last round: the first runs of CUDA graphs only record, and replays may be wrong.
                changes[name].append((model.queries.grad - reference).norm() / reference.norm())
                result["difference"][name] = float(torch.stack(changes[name]).max())
            result["all_seconds"] = {name: seconds for name, seconds in times.items() if seconds}
            result["seconds"] = medians(result["all_seconds"])
            write(args.json, result)
    print(f"{result['machine']}; {args.shape}, {args.dtype}, batch {args.batch}, {args.rounds} rounds twice")
    print(f"{'form':>18} {'s a pass':>9} {'x eager':>8} {'first, s':>9} {'gradient differs by':>20}")
    for name, seconds in result["seconds"].items():
        ratio, difference = seconds / result["seconds"]["eager"], result["difference"][name]
        print(f"{name:>18} {seconds:9.4f} {ratio:8.2f} {result['first'][name]:9.1f} {difference:20.1e}")
    exit_with(result["errors"])


if __name__ == "__main__":
    main()
