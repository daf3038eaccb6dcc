"""What each choice of the method is worth: number of queries, initialisation, pooling, prompt, temperature.

    python benchmarks/ablations.py [--world toy] [--groups queries pooling ...] [--seeds 0 1 2] [--json FILE]

Each group is trained as one sweep: its variants see the same batches, and share the prefixes. Recall is text to image on the
validation split, because these choices are to be made there. A finished group and seed is a file in the output folder:
a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, quiet, write
from datasets import Dataset
from methods import Retriever
from quality import SIZES, WORLDS, recalls
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.data import from_records
from slq_embed.training import sweep
from slq_embed.training.losses import SymmetricInfoNCELoss

QUERIES, RATE = 16, 4e-2
INSTRUCTIONS: dict[str, dict[str, str]] = {
    "plain": {},
    "one word": {"text": "{text}\nThe text above in one word:", "image": "The image above in one word:"},
    "summary": {"text": "Summarise this text: {text}", "image": "Summarise this image."},
}
GROUPS: dict[str, list[dict[str, Any]]] = {
    "queries": [{"num_queries": count} for count in (1, 2, 4, 8, 16, 32, 64)],
    "initialisation": [{"init": init} for init in ("normal", "zeros", "tokens")],
    "pooling": [{}, {"pooling": "last"}, *({"last": count} for count in (2, 4, 8)), {"pooling": "weighted"}],
    "temperature": [
        {},
        {"temperature": 0.02},
        {"temperature": 0.2},
        {"min_temperature": 0.02},
        {"min_temperature": 0.05},
        {"min_temperature": 0.07, "max_temperature": 0.07},
    ],
    "prompt": [{"instructions": name} for name in INSTRUCTIONS],
}


class PoolingOfTheLast(nn.Module):
    """The mean of the last queries.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states: Tensor = features["token_embeddings"]
        features["sentence_embedding"] = states[:, -self.count :].mean(dim=1)
        return features


def loss_of(encoder: SLQEncoder, last: int | None = None, **options: Any) -> nn.Module:
    """The paper's loss, after the pooling was replaced where a variant asks for that."""
    if last is not None:
        encoder[1] = PoolingOfTheLast(last)
    return SymmetricInfoNCELoss(encoder, **options)


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def pairs_of(world: Any, seed: int, steps: int, batch: int, siblings: int = 1) -> Dataset:
    """The batches of a world, one after the other; so many rows in a row belong to one scene or photo."""
    columns = world.batches(seed, steps, batch, siblings)
    rows = (pair for images, texts in columns for pair in zip(images, texts, strict=True))
    pairs = from_records(((str(number), *pair) for number, pair in enumerate(rows)), verify=False).dataset
    labels = [number // siblings for number in range(len(pairs))]
    return pairs.remove_columns("label").add_column("label", labels)


def arguments_of(args: argparse.Namespace, seed: int, steps: int, batch: int) -> SentenceTransformerTrainingArguments:
    """For the host's trainer: the same for all."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(args.output / "training"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=args.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 4),
        batch_sampler=in_order,
        report_to="none",
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        seed=seed,
    )


def measured(encoder: SLQEncoder, world: Any, precision: torch.dtype) -> dict[str, float]:
    """Recall on the validation split."""
    encoder.eval()
    retriever = Retriever(
        encoder, lambda features: encoder(features)["sentence_embedding"], encoder.backbone, {}, precision
    )
    return recalls(retriever, world, "validation")


def run(args: argparse.Namespace, group: str, seed: int) -> list[dict[str, float]]:
    """Train the variants of a group, and measure each."""
    steps, batch, precision = SIZES[args.world]
    steps, batch = args.steps or steps, args.batch or batch
    world = WORLDS[args.world]()
    backbone, processor = world.load()
    backbone = backbone.to(args.device, precision).eval()
    pairs = pairs_of(world, seed, steps, batch)
    arguments = arguments_of(args, seed, steps, batch)
    results = []
    for instructions in dict.fromkeys(variant.get("instructions", "plain") for variant in GROUPS[group]):
        torch.manual_seed(seed)
        texts = INSTRUCTIONS[instructions]
        model = SLQEncoder.from_backbone(backbone, processor, num_queries=QUERIES, seed=seed, instructions=texts)
        model.prefix_store = PrefixStore(args.prefixes) if args.prefixes else None
        settings = [
            {"seed": seed, **{name: value for name, value in variant.items() if name != "instructions"}}
            for variant in GROUPS[group]
            if variant.get("instructions", "plain") == instructions
        ]
        for variant in sweep(model, arguments, pairs, settings, loss=loss_of).variants:
            results.append(measured(variant.encoder, world, precision))
    return results


def options_of(description: str | None, output: Path) -> argparse.ArgumentParser:
    """The options of a script that trains variants on a world."""
    options = parser(description)
    options.add_argument("--world", default="toy", choices=WORLDS)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=None)
    options.add_argument("--batch", type=int, default=None)
    options.add_argument("--rate", type=float, default=RATE, help="learning rate of the queries")
    options.add_argument("--output", type=Path, default=output, help="folder of what is finished")
    options.add_argument("--prefixes", type=Path, help="folder in which the variants share prefixes; tens of GB")
    return options


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on, beside what is compared."""
    return {name: getattr(args, name) for name in ("world", "steps", "batch", "rate")}


def kept(path: Path, options: dict[str, Any], train: Callable[[], Any]) -> Any:
    """The results in a file that was written with the same options, or new ones, which are written there."""
    done = json.loads(path.read_text()) if path.exists() else {}
    if done.get("options") != options:
        done = {"options": options, "results": train()}
        write(path, done)
    return done["results"]


def print_head(name: str, world: Any) -> None:
    """The kinds of query as columns."""
    print(f"\n{name:>40} " + " ".join(f"{f'{kind} R@{world.recall_at}':>20}" for kind in world.kinds))


def print_row(name: str, seeds: dict[str, list[float]]) -> None:
    """Medians over seeds, with the smallest and the largest."""
    cells = (f"{statistics.median(row):7.1%} {min(row):5.1%}..{max(row):5.1%}" for row in seeds.values())
    print(f"{name:>40} {' '.join(cells)}", flush=True)


def main() -> None:
    options = options_of(__doc__, Path("output/ablations"))
    options.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    args = options.parse_args()
    quiet()
    world = WORLDS[args.world]
    sizes = sizes_of(args)
    table: dict[str, list[dict[str, Any]]] = {}
    for group in args.groups:
        runs = []
        for seed in args.seeds:
            path = args.output / args.world / f"{group}-{seed}.json"
            runs.append(kept(path, {**sizes, "variants": GROUPS[group]}, partial(run, args, group, seed)))
        print_head(group, world)
        table[group] = []
        for variant, *results in zip(GROUPS[group], *runs, strict=True):
            seeds = {kind: [result[kind] for result in results] for kind in world.kinds}
            print_row(", ".join(f"{key} {value}" for key, value in variant.items()) or "default", seeds)
            table[group].append({"variant": variant, "seeds": seeds})
    write(args.json, machine(args) | {"sizes": sizes, "seeds": args.seeds, "groups": table})


if __name__ == "__main__":
    main()
