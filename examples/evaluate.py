"""Measure a model on a benchmark of the paper, from the data as they are published.

    python examples/evaluate.py --benchmark coco --data coco_test --model my-model --json coco.json
    python examples/evaluate.py --benchmark cirr --data cirr --model my-model --split test1    # writes the submissions
    python examples/evaluate.py --benchmark mmeb --data MMEB-eval --model my-model --tasks GQA,OVEN --limit 100

What each folder must hold is in docs/guides/evaluate.md. The embeddings are kept in --embeddings: a run that was killed
goes on where it was, and one that was finished is measured again in seconds. Hardware: a GPU for a real backbone, minutes
(COCO) to hours (MMEB). Expected output: a table of the metrics beside those that the paper reports.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder, __version__, pretrained
from slq_embed.data import (
    load_cirr,
    load_coco,
    load_fashion_iq,
    load_flickr30k,
    load_karr_bench,
    load_mmeb_eval,
)
from slq_embed.evaluation import (
    MMEB_TASKS,
    CIRREvaluator,
    FashionIQEvaluator,
    ImageTextRetrievalEvaluator,
    KARRBenchEvaluator,
    MMEBEvaluator,
)

BENCHMARKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "coco": (load_coco, ImageTextRetrievalEvaluator),
    "flickr30k": (load_flickr30k, ImageTextRetrievalEvaluator),
    "karr": (load_karr_bench, KARRBenchEvaluator),
    "cirr": (load_cirr, CIRREvaluator),
    "fashioniq": (load_fashion_iq, FashionIQEvaluator),
    "mmeb": (load_mmeb_eval, MMEBEvaluator),
}
SLQ = "SLQ"  # the paper's summaries do not name the backbone of these figures
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "coco": {
        "image_to_text_recall@1": {SLQ: 69.6},
        "text_to_image_recall@1": {SLQ: 55.4},
        "image_to_text_recall@5": {"SLQ 8B": 89.1, "VLM2Vec-7B": 88.4},
        "text_to_image_recall@5": {"SLQ 8B": 79.7, "VLM2Vec-7B": 73.8},
    },
    "flickr30k": {
        "image_to_text_recall@1": {SLQ: 92.0},
        "text_to_image_recall@1": {SLQ: 81.8},
        "image_to_text_recall@5": {"SLQ 8B": 99.4, "VLM2Vec-7B": 99.5, "CLIP ViT-L": 98.3},
        "text_to_image_recall@5": {"SLQ 8B": 95.1, "VLM2Vec-7B": 95.0, "CLIP ViT-L": 89.0},
    },
    "karr": {},
    "cirr": {"recall@5": {SLQ: 63.5}},
    "fashioniq": {"mean_recall@50": {SLQ: 43.1}},
    "mmeb": {"mean": {"SLQ 8B": 67.5, "SLQ 4B": 64.5, "VLM2Vec-7B": 62.9}},
}
"""Percentages reported in arXiv:2604.13710, by metric and system."""


def load_model(name: str) -> SentenceTransformer:
    """An SLQ model if it is one, else a plain Sentence Transformer."""
    try:
        return SLQEncoder(pretrained(name) if name == "slq-tiny" else name)
    except ValueError as error:
        print(f"Loaded as a plain Sentence Transformer, whose embeddings are not kept ({error})")
        return SentenceTransformer(name)


def load_data(args: argparse.Namespace) -> dict[str, Any]:
    """What the evaluator takes."""
    options: dict[str, Any] = {"limit": args.limit}
    if args.benchmark == "cirr":
        options["split"] = args.split
    if args.benchmark == "mmeb":
        return {"tasks": load_mmeb_eval(args.data, args.tasks, images=args.images, **options)}
    if args.benchmark != "karr":
        options["images"] = args.images
    return vars(BENCHMARKS[args.benchmark][0](args.data, **options))


def table(metrics: dict[str, float], paper: dict[str, dict[str, float]]) -> str:
    """Percentages, with a column for each system of the paper."""
    systems = list(dict.fromkeys(name for row in paper.values() for name in row))
    lines = [["", "here", *systems]]
    for metric, value in metrics.items():
        reported = [paper.get(metric, {}).get(system) for system in systems]
        lines.append([metric, f"{100 * value:.1f}", *("" if value is None else f"{value:.1f}" for value in reported)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True, help="what to measure")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data as published")
    parser.add_argument("--images", type=Path, help="folder of the image files, if it is elsewhere")
    parser.add_argument(
        "--model", default="slq-tiny", help="a model: a folder, a hub name, or slq-tiny (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument(
        "--limit", type=int, help="read only so many images (CIRR, FashionIQ: queries; MMEB: rows a task)"
    )
    parser.add_argument("--split", default="val", choices=["val", "test1"], help="of CIRR (default: %(default)s)")
    parser.add_argument(
        "--tasks", type=lambda names: names.split(","), default=MMEB_TASKS, help="of MMEB, with commas; by default all"
    )
    parser.add_argument("--embeddings", type=Path, help="folder to keep embeddings in; by default evaluation/...")
    parser.add_argument("--batch", type=int, default=32, help="inputs a batch (default: %(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("slq_embed.evaluation").setLevel(logging.INFO)  # it says what is being encoded

    try:
        data = load_data(args)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    model = load_model(args.model)
    run = [args.benchmark, Path(args.model).name, *([args.split] if args.benchmark == "cirr" else [])]
    folder = args.embeddings or Path("evaluation") / "-".join([*run, *([str(args.limit)] if args.limit else [])])
    kept = folder if isinstance(model, SLQEncoder) else None
    evaluator = BENCHMARKS[args.benchmark][1](
        **data, batch_size=args.batch, show_progress_bar=True, embeddings_folder=kept
    )
    print(f"{args.benchmark}: {', '.join(f'{count:,} {name}' for name, count in evaluator.get_config_dict().items())}")
    if (
        args.benchmark == "mmeb"
        and isinstance(model, SLQEncoder)
        and model.slq_config.instructions["composed"] != "{text}"
    ):
        print("This model puts its own instruction around an image's text, and MMEB's texts are instructions already:")
        print("build the model with instructions={'composed': '{text}'} for MMEB.")

    if args.benchmark == "cirr" and args.split == "test1":
        folder.mkdir(parents=True, exist_ok=True)
        for metric, content in evaluator.submissions(model).items():
            path = folder / f"submission_{metric}.json"
            path.write_text(json.dumps(content), "utf8")
            print(f"for the test server: {path}")
        return
    started = time.perf_counter()
    metrics = evaluator(model)
    seconds = time.perf_counter() - started
    is_part = args.benchmark == "mmeb" and set(args.tasks) != set(MMEB_TASKS)  # its mean is over other tasks
    paper = {} if is_part else PAPER[args.benchmark]
    print(table(metrics, paper))
    print(f"in %; {seconds:.0f} s" + (f"; a part of the data only (--limit {args.limit})" if args.limit else ""))
    if args.json is not None:
        result = {"benchmark": args.benchmark, "model": args.model, "data": str(args.data), "limit": args.limit}
        result |= {**evaluator.get_config_dict(), "metrics": metrics, "paper_percent": paper}
        result |= {"seconds": round(seconds, 1), "slq_embed": __version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf8")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
