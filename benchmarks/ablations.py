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
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, quiet, write
from datasets import Dataset
from methods import Retriever
from quality import SIZES, TEMPERATURE_RATE, WORLDS, recalls
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
    "pooling": [{}, {"pooling": "last"}, *({"last": count} for count in (2, 4, 8)), {"weighted": True}],
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


class WeightedPooling(nn.Module):
    """A weighted mean over the queries. Learned weights start equal; else the last queries have weight 1 and the others 0.

    Args:
        queries: Number of queries, ``Q``.
        last: How many of the last queries count; by default, the weights of all are learned.
    """

    def __init__(self, queries: int, last: int | None = None) -> None:
        super().__init__()
        learned = last is None
        scores = torch.zeros(queries) if learned else torch.full((queries,), -torch.inf)
        if not learned:
            scores[-last:] = 0
        self.scores = nn.Parameter(scores, requires_grad=learned)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        states: Tensor = features["token_embeddings"]
        features["sentence_embedding"] = (states * self.scores.softmax(dim=0)[:, None]).sum(dim=1)
        return features


def loss_of(encoder: SLQEncoder, last: int | None = None, weighted: bool = False, **options: Any) -> nn.Module:
    """The paper's loss, after the pooling was replaced where a variant asks for that."""
    if last is not None or weighted:
        encoder[1] = WeightedPooling(len(encoder.queries), last).to(encoder.device)
    return SymmetricInfoNCELoss(encoder, **options)


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def pairs_of(world: Any, seed: int, steps: int, batch: int) -> Dataset:
    """The batches of a world, one after the other."""
    columns = world.batches(seed, steps, batch)
    rows = (pair for images, texts in columns for pair in zip(images, texts, strict=True))
    return from_records(((str(number), *pair) for number, pair in enumerate(rows)), verify=False).dataset


def run(args: argparse.Namespace, group: str, seed: int) -> list[dict[str, float]]:
    """Train the variants of a group, and measure each."""
    steps, batch, precision = SIZES[args.world]
    steps, batch = args.steps or steps, args.batch or batch
    world = WORLDS[args.world]()
    backbone, processor = world.load()
    backbone = backbone.to(args.device, precision).eval()
    pairs = pairs_of(world, seed, steps, batch)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(args.output / "training"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        learning_rate_mapping={"log_temperature": TEMPERATURE_RATE},
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 4),
        batch_sampler=in_order,
        report_to="none",
        logging_steps=steps,
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
        seed=seed,
    )
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
            encoder = variant.encoder.eval()
            retriever = Retriever(
                encoder,
                lambda features, encoder=encoder: encoder(features)["sentence_embedding"],
                backbone,
                {},
                precision,
            )
            results.append(recalls(retriever, world, "validation"))
    return results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--world", default="toy", choices=WORLDS)
    options.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=None)
    options.add_argument("--batch", type=int, default=None)
    options.add_argument("--output", type=Path, default=Path("output/ablations"), help="folder of the finished groups")
    options.add_argument("--prefixes", type=Path, help="folder in which the groups share prefixes; tens of GB")
    args = options.parse_args()
    quiet()
    world = WORLDS[args.world]
    sizes = {"world": args.world, "steps": args.steps, "batch": args.batch}
    table: dict[str, list[dict[str, Any]]] = {}
    for group in args.groups:
        runs = []
        for seed in args.seeds:
            path = args.output / args.world / f"{group}-{seed}.json"
            done = json.loads(path.read_text()) if path.exists() else {}
            if done.get("options") != {**sizes, "variants": GROUPS[group]}:
                done = {"options": {**sizes, "variants": GROUPS[group]}, "results": run(args, group, seed)}
                write(path, done)
            runs.append(done["results"])
        print(f"\n{group:>40} " + " ".join(f"{f'{kind} R@{world.recall_at}':>20}" for kind in world.kinds))
        table[group] = []
        for variant, *results in zip(GROUPS[group], *runs, strict=True):
            seeds = {kind: [result[kind] for result in results] for kind in world.kinds}
            name = ", ".join(f"{key} {value}" for key, value in variant.items()) or "default"
            cells = (f"{statistics.median(row):7.1%} {min(row):5.1%}..{max(row):5.1%}" for row in seeds.values())
            print(f"{name:>40} {' '.join(cells)}", flush=True)
            table[group].append({"variant": variant, "seeds": seeds})
    write(args.json, machine(args) | {"sizes": sizes, "seeds": args.seeds, "groups": table})


if __name__ == "__main__":
    main()
