"""Forget examples exactly: they leave the prefix store, the queries and the search index, without training anew.

    python examples/forget.py [--scenes 600] [--epochs 4] [--output forget-output]

Hardware: 2 CPU cores, about a minute. Expected output: how long the first training, the retraining after forgetting and
a training from nothing take, and by how much the two last ones differ: not by a bit, because each prefix is computed in
a pass of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from demo import scene_pairs, train

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.data import ImageTextPairs
from slq_embed.toy import sample_scenes

SMOKE = bool(os.environ.get("SLQ_SMOKE"))


def train_from_start(
    store: PrefixStore | None, pairs: ImageTextPairs, args: argparse.Namespace
) -> tuple[SLQEncoder, float]:
    """Fresh queries, always from the same start, trained on pairs; and the seconds with attaching the store."""
    torch.manual_seed(0)
    model = SLQEncoder.from_backbone(pretrained("mllm-tiny"), num_queries=8, seed=0)
    started = time.perf_counter()
    model.prefix_store = store
    train(
        model,
        pairs,
        args.output / "run",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        seed=0,
        disable_tqdm=True,
    )
    return model, time.perf_counter() - started


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scenes", type=int, default=32 if SMOKE else 600, help="scenes to train on (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=2 if SMOKE else 4, help="passes over them (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("forget-output"), help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    pairs = scene_pairs(sample_scenes(args.scenes, "train"), seed=1)
    shutil.rmtree(args.output / "prefixes", ignore_errors=True)
    store = PrefixStore(args.output / "prefixes", one_by_one=True)

    print("1. Train, and index the pictures")
    model, seconds = train_from_start(store, pairs, args)
    index = model.encode(pairs.dataset["image"][:])
    print(f"   {seconds:.1f} s; {store}")

    print("2. Forget every tenth example: pictures and captions")
    removed = pairs.dataset.select(range(0, args.scenes, 10))
    remaining = ImageTextPairs(pairs.dataset.select([n for n in range(args.scenes) if n % 10]))
    count = model.forget(removed["image"][:]) + model.forget(removed["text"][:])
    computed = store.counts.computed
    retrained, retraining = train_from_start(store, remaining, args)
    index = retrained.encode(remaining.dataset["image"][:])
    print(f"   {count} prefixes removed, their bytes overwritten; retrained in {retraining:.1f} s")
    print(f"   {store.counts.computed - computed} prefixes computed for it; the index holds {len(index)} pictures")

    print("3. As if they had never been seen")
    reference, with_new_store = train_from_start(PrefixStore(one_by_one=True), remaining, args)
    _, without_store = train_from_start(None, remaining, args)
    difference = float(np.abs(reference.encode(remaining.dataset["image"][:]) - index).max())
    print(
        f"   training from nothing: {with_new_store:.1f} s, {with_new_store / retraining:.1f} x as long; without a "
        f"store {without_store:.1f} s, {without_store / retraining:.1f} x"
    )
    print(f"   embeddings differ by {difference:.1e}; equal: {torch.equal(reference.queries, retrained.queries)}")


if __name__ == "__main__":
    main()
