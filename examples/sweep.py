"""Choose the number of queries, the learning rate and the temperature in one training.

    python examples/sweep.py [--scenes 1000] [--steps 60]

Hardware: 2 CPU cores, under a minute. Expected output: a table with a line for each setting; the best has a star.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from demo import scene_pairs
from sentence_transformers import SentenceTransformerTrainingArguments

from slq_embed import SLQEncoder, pretrained
from slq_embed.data import DistinctImageBatchSampler
from slq_embed.evaluation import ImageTextRetrievalEvaluator
from slq_embed.toy import captions, render, sample_scenes
from slq_embed.training import sweep

SMOKE = bool(os.environ.get("SLQ_SMOKE"))
VARIANTS = [
    {"num_queries": 4, "learning_rate": 2e-2},
    {"num_queries": 8, "learning_rate": 2e-2},
    {"num_queries": 8, "learning_rate": 4e-2},
    {"num_queries": 8, "learning_rate": 4e-2, "temperature": 0.02},
    {"num_queries": 16, "learning_rate": 4e-2, "pooling": "last"},
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenes", type=int, default=64 if SMOKE else 1000, help="scenes to train on (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=2 if SMOKE else 60, help="steps to train (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = SLQEncoder.from_backbone(pretrained("mllm-tiny"), seed=0)
    scenes = sample_scenes(20 if SMOKE else 200, "validation")
    evaluator = ImageTextRetrievalEvaluator(
        [render(scene, seed=7) for scene in scenes], [captions(scene)[0] for scene in scenes], range(len(scenes))
    )
    arguments = SentenceTransformerTrainingArguments(
        "sweep-output",
        max_steps=args.steps,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        batch_sampler=DistinctImageBatchSampler,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    started = time.perf_counter()
    pairs = scene_pairs(sample_scenes(args.scenes, "train"), seed=1)
    result = sweep(
        model, arguments, pairs.dataset, [{"seed": 0, **settings} for settings in VARIANTS], evaluator=evaluator
    )
    print(result)
    print(f"{len(VARIANTS)} query sets in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
