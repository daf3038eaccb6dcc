"""What 10 million, a billion and 100 billion images cost to embed, to keep and to search: a simulation from unit costs.

    python benchmarks/corpus.py [--share 0.4] [--prices 0.5 1.8 3.5] [--core-hour 0.04] [--disk-month 0.08] [--json FILE]

Unit costs come from benchmarks/results: FLOPs an image as `dry_run.py` counted them, seconds an image on 2 CPU cores as
`encoding.py` measured them, bytes a vector and queries a second as `index.py` measured them. Nothing else is measured:
a card's speed is a share of its published peak, and a search takes as long as it has numbers to scan. Prices are examples. All
assumptions are printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import parser, write
from run_cost import CARDS, Card

RESULTS = Path(__file__).parent / "results"
CORPORA = {"10 M": 10**7, "1 B": 10**9, "100 B": 10**11}
HARDWARE = (*CARDS, Card("H200", 141e9, 989e12))
QUERIES_A_SECOND = 100


@dataclass(frozen=True)
class Index:
    """An index type, as measured on 2 cores.

    Args:
        name: In words.
        bytes_a_vector: On disk, with the id and the metadata.
        numbers_a_second: Numbers of all vectors in the index, divided by the seconds of a query.
        recall: At 10, against an exact search.
    """

    name: str
    bytes_a_vector: float
    numbers_a_second: float
    recall: float


def result(pattern: str) -> dict[str, Any]:
    """The newest result file of a name."""
    found: dict[str, Any] = json.loads(sorted(RESULTS.glob(pattern))[-1].read_text("utf8"))
    return found


def flops_of_an_image(shape: str) -> float:
    """To embed one, without training."""
    image = result(f"*-dry-run-coco-{shape}.json")["counted"]["image"]
    return float(image["prefix_flops"] + image["query_flops"])


def indexes(width: int) -> Iterator[Index]:
    """Those that were measured at this width, and IVF, which was measured at another."""
    names = {"Flat": "exact, float32", "SQ8": "8 bits", "SQ4": "4 bits", "RaBitQ,RFlat": "1 bit, and float32 on disk"}
    kinds = result("*-index-2-cores.json")["kinds"]
    for kind in sorted(kinds, key=lambda kind: kind["dimension"] != width):
        numbers = kind["count"] * kind["dimension"] * kind["queries_per_second"]
        size = kind["bytes"] / kind["count"]
        if kind["factory"] in names and kind["dimension"] == width:
            yield Index(names[kind["factory"]], size, numbers, kind["recall"])
        elif kind["parameters"] == "nprobe=64":
            size += 4 * (width - kind["dimension"])
            yield Index("IVF with 1.6 % of its lists", size, numbers, kind["recall"])


def simulate(shape: str, width: int, share: float) -> dict[str, Any]:
    """Hours, bytes and cores for each corpus.

    Args:
        shape: Of the backbone.
        width: Of its embeddings.
        share: Of a card's peak that encoding reaches.
    """
    flops = flops_of_an_image(shape)
    measured = result("*-encoding-2-cores.json")
    seconds = measured["seconds"]["slq_images"] / measured["images"]
    hours = {
        name: {
            **{card.name: count * flops / (card.peak * share) / 3600 for card in HARDWARE},
            "61 M, 2 cores": count * seconds / 3600,
        }
        for name, count in CORPORA.items()
    }
    stored = {
        index.name: {
            name: {
                "bytes": count * index.bytes_a_vector,
                "seconds_a_query": count * width / index.numbers_a_second,
                "cores": 2 * QUERIES_A_SECOND * count * width / index.numbers_a_second,
            }
            for name, count in CORPORA.items()
        }
        | {"recall": index.recall}
        for index in indexes(width)
    }
    return {"flops_an_image": flops, "hours": hours, "indexes": stored}


def spell(value: float) -> str:
    """With three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.set_defaults(shape="qwen3-vl-2b")
    options.add_argument("--width", type=int, default=2048, help="of the embeddings: 2,048 for Qwen3-VL-2B")
    options.add_argument("--share", type=float, default=0.4, help="of a card's peak that encoding reaches")
    options.add_argument("--prices", type=float, nargs=3, default=(0.5, 1.8, 3.5), help="dollars a card's hour")
    options.add_argument("--core-hour", type=float, default=0.04, help="dollars a CPU core's hour")
    options.add_argument("--disk-month", type=float, default=0.08, help="dollars a GB and month")
    args = options.parse_args(argv)
    found = simulate(args.shape, args.width, args.share)
    print(f"Embed: {args.shape}, {found['flops_an_image'] / 1e12:.2f} TFLOP an image of 640 x 480 (counted).")
    print(f"Assumed: {args.share:.0%} of each card's peak in bfloat16; pictures arrive as fast as they are embedded.")
    print(f"{'one card, and its price':>26} " + " ".join(f"{name:>26}" for name in CORPORA))
    for card, price in zip(HARDWARE, args.prices, strict=True):
        cells = [found["hours"][name][card.name] for name in CORPORA]
        row = " ".join(f"{spell(hours) + ' h, $' + spell(hours * price):>26}" for hours in cells)
        print(f"{f'{card.name}, ${price:g} an hour':>26} {row}")
    price = 2 * args.core_hour
    cells = [found["hours"][name]["61 M, 2 cores"] for name in CORPORA]
    row = " ".join(f"{spell(hours) + ' h, $' + spell(hours * price):>26}" for hours in cells)
    print(f"{f'a CPU, ${price:g} an hour':>26} {row}")
    print("Measured on the CPU: 2 cores, a model of 61 million parameters, and smaller images: 350 x 350 in the mean.")
    print(
        f"\nKeep: {args.width} dimensions; bytes as measured (IVF: counted), and dollars a month at ${args.disk_month:g} a GB."
    )
    print(f"{'':>26} " + " ".join(f"{name:>26}" for name in CORPORA))
    for name, index in found["indexes"].items():
        cells = [index[corpus]["bytes"] / 1e9 for corpus in CORPORA]
        row = " ".join(f"{spell(size) + ' GB, $' + spell(size * args.disk_month):>26}" for size in cells)
        print(f"{name:>26} {row}")
    print(f"\nSearch: seconds a query on 2 cores, and cores for {QUERIES_A_SECOND} queries a second.")
    print(
        "Assumed: the time grows with the numbers that are scanned, and everything scanned is in memory. Recall was measured on\n"
        "100,000 vectors, and IVF on a million of 256 dimensions: among more vectors, recall may be lower."
    )
    print(f"{'index, and recall at 10':>34} " + " ".join(f"{name:>26}" for name in CORPORA))
    for name, index in found["indexes"].items():
        cells = [(index[corpus]["seconds_a_query"], index[corpus]["cores"]) for corpus in CORPORA]
        row = " ".join(f"{spell(seconds) + ' s, ' + spell(cores) + ' cores':>26}" for seconds, cores in cells)
        head = f"{name.split(',')[0]}, {index['recall']:.3f}"
        print(f"{head:>34} {row}")
    write(args.json, {"width": args.width, "share": args.share, "shape": args.shape, **found})


if __name__ == "__main__":
    main()
