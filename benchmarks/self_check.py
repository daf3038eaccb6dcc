"""How long the self-check of a backbone takes at true size, beside encoding its own samples.

    python benchmarks/self_check.py [--quick] [--json FILE] [--device cuda --dtype bfloat16 --shape qwen3-vl-2b]

The families that are known are not checked when a user loads them: here one stands for a backbone of that size that is not known.
"""

from __future__ import annotations

from common import QUERIES, machine, medians, parser, quiet, rounds_of, timed, write
from shapes import build_backbone, build_processor

from slq_embed import SLQEncoder
from slq_embed.backbone import check
from slq_embed.backbone.self_check import samples


def main() -> None:
    args = parser(__doc__).parse_args()
    quiet()
    args.rounds = args.rounds or (1 if args.quick else 5)
    backbone, processor = (
        build_backbone(args.shape, args.device, args.dtype),
        build_processor(args.shape, 32 * 32, 448 * 448),
    )
    inputs = samples(reads_images=True)
    model = SLQEncoder.from_backbone(backbone, processor, num_queries=QUERIES, seed=0, backbone_name="random")
    reports = []
    calls = {
        "encode": lambda: model.encode(inputs, show_progress_bar=False),
        "check": lambda: reports.append(check(backbone, processor)),
    }
    first = timed(calls["check"], args.device)
    times = rounds_of(calls, args.rounds, args.device)
    seconds = medians(times)
    assert all(report.schedule == "prefix" for report in reports), reports[0]
    result = machine(args) | {"first": first, "seconds": seconds, "all_seconds": times, "schedule": reports[0].schedule}
    write(args.json, result)
    print(f"{result['machine']}; {args.shape}, {args.dtype}, {args.rounds} rounds, {len(inputs)} samples")
    print(
        f"self-check {seconds['check']:.2f} s (the first {first:.2f} s), encoding its samples {seconds['encode']:.2f} s:"
    )
    print(f"{seconds['check'] / seconds['encode']:.1f} times as long; schedule: {result['schedule']}")


if __name__ == "__main__":
    main()
