"""What other losses and harder examples are worth: hard negatives, several positives, distillation, listwise, triplets.

    python benchmarks/objectives.py [--world toy] [--seeds 0 1 2] [--only NAME ...] [--json FILE]

Every objective trains fresh queries with the same seed, pairs, steps and learning rate. The first row, the paper's loss, gives
the model that finds the hard negatives, and the guide. Recall is text to image on the validation split. A finished
objective and seed is a file in the output folder: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from ablations import QUERIES, arguments_of, kept, measured, options_of, pairs_of, print_head, print_row, sizes_of
from common import machine, quiet, write
from quality import SIZES, WORLDS
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from torch import nn

from slq_embed import PrefixStore, SLQEncoder, SymmetricInfoNCELoss
from slq_embed.data import ImageTextPairs
from slq_embed.generation import build_reranker
from slq_embed.training import mine_negatives, teacher_scores

PAPER = "the paper's loss"
JUDGE = {
    "toy": "{document}is there {query}?",
    "photos": "{document}Does the photo show this: {query}? Answer yes or no.",
}


class Bench:
    """A world with one seed: its pairs, a backbone, and what the paper's loss makes of them."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        steps, batch, self.precision = SIZES[args.world]
        self.steps, self.batch = args.steps or steps, args.batch or batch
        self.world = WORLDS[args.world]()
        backbone, self.processor = self.world.load()
        self.backbone = backbone.to(args.device, self.precision).eval()
        self.arguments = arguments_of(args, seed, self.steps, self.batch)

    def pairs(self, siblings: int = 1) -> Any:
        """The training pairs."""
        return pairs_of(self.world, self.seed, self.steps, self.batch, siblings)

    def trained(self, dataset: Any, loss_of: Callable[[SLQEncoder], nn.Module]) -> SLQEncoder:
        """Fresh queries, trained. A data set with fewer rows is read several times."""
        torch.manual_seed(self.seed)
        model = SLQEncoder.from_backbone(self.backbone, self.processor, num_queries=QUERIES, seed=self.seed)
        model.prefix_store = PrefixStore(self.args.prefixes) if self.args.prefixes else None
        SentenceTransformerTrainer(model, self.arguments, train_dataset=dataset, loss=loss_of(model)).train()
        return model

    @cached_property
    def paper(self) -> SLQEncoder:
        """Trained with the paper's loss."""
        return self.trained(self.pairs(), SymmetricInfoNCELoss)

    @cached_property
    def mined(self) -> ImageTextPairs:
        """The pairs with three hard negatives each."""
        return mine_negatives(self.paper, self.pairs(), num_negatives=3)

    @cached_property
    def scored(self) -> Any:
        """Some of them, with the backbone's own judgement, which takes longer than a training step."""
        judge = build_reranker(self.paper, instruction=JUDGE[self.args.world], activation_fn=nn.Sigmoid())
        rows = self.mined.dataset
        return teacher_scores(judge, rows.select(range(min(len(rows), self.batch * max(1, self.steps // 8))))).dataset


OBJECTIVES: dict[str, Callable[[Bench], SLQEncoder]] = {
    PAPER: lambda bench: bench.paper,
    "three hard negatives": lambda bench: bench.trained(bench.mined.dataset, SymmetricInfoNCELoss),
    "three hard negatives, host's loss": lambda bench: bench.trained(
        bench.mined.dataset, partial(losses.MultipleNegativesRankingLoss, scale=1 / 0.02)
    ),
    "two captions, siblings left out": lambda bench: bench.trained(bench.pairs(2), SymmetricInfoNCELoss),
    "two captions, both positives": lambda bench: bench.trained(
        bench.pairs(2), partial(SymmetricInfoNCELoss, positives="all")
    ),
    "triplets": lambda bench: bench.trained(
        bench.mined.dataset.select_columns(["anchor", "positive", "negative_1"]),
        lambda model: losses.TripletLoss(model, losses.TripletDistanceMetric.COSINE, triplet_margin=0.2),
    ),
    "the trained model as a guide": lambda bench: bench.trained(
        bench.pairs().remove_columns("label"), lambda model: losses.GISTEmbedLoss(model, guide=bench.paper.eval())
    ),
    "distillation of margins": lambda bench: bench.trained(bench.scored, losses.MarginMSELoss),
    "distillation of lists": lambda bench: bench.trained(
        bench.scored,
        partial(losses.DistillKLDivLoss, student_temperature=0.05, teacher_temperature=0.2),
    ),
}


def train(name: str, bench: Callable[[], Bench]) -> dict[str, float]:
    """Train with an objective, and measure."""
    return measured(OBJECTIVES[name](bench()), bench().world, bench().precision)


def main() -> None:
    options = options_of(__doc__, Path("output/objectives"))
    options.add_argument("--only", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    args = options.parse_args()
    quiet()
    world = WORLDS[args.world]
    sizes = sizes_of(args)
    table: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in world.kinds} for name in args.only}
    for seed in args.seeds:
        bench = cache(partial(Bench, args, seed))  # made when the first objective is to be trained
        for name in args.only:
            path = args.output / args.world / f"{name.replace(' ', '-')}-{seed}.json"
            result = kept(path, {**sizes, "objective": name}, partial(train, name, bench))
            for kind in world.kinds:
                table[name][kind].append(result[kind])
        del bench
        gc.collect()
    print_head("", world)
    for name, seeds in table.items():
        print_row(name, seeds)
    write(args.json, machine(args) | {"sizes": sizes, "seeds": args.seeds, "objectives": table})


if __name__ == "__main__":
    main()
