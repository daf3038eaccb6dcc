"""The whole path on the embedded default: build, train, save, reload with plain Sentence Transformers, search.

    make demo          (or: python examples/demo.py)

Hardware: 2 CPU cores, under 3 minutes. Expected output: recall before and after training, answers to text and
image queries, and the path of a contact sheet (PNG) with each query's best results.
"""

from __future__ import annotations

import argparse
import os
import textwrap
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.util import semantic_search

from slq_embed import SLQEncoder, SymmetricInfoNCELoss, pretrained
from slq_embed.data import DistinctImageBatchSampler, ImageTextPairs, from_records
from slq_embed.evaluation import ImageTextRetrievalEvaluator
from slq_embed.toy import Scene, captions, implicit, render, sample_scenes
from slq_embed.training import learning_rate_mapping

STEPS, BATCH, QUERIES, LEARNING_RATE = 120, 64, 8, 4e-2
SMOKE = bool(os.environ.get("SLQ_SMOKE"))  # a few steps only, for tests


def scene_pairs(scenes: list[Scene], seed: int) -> ImageTextPairs:
    """Pictures of scenes, each with one of its literal captions; a scene that comes again looks different."""
    rng = Random(seed)
    rows = ((str(i), render(s, 100_000 * seed + i), rng.choice(captions(s))) for i, s in enumerate(scenes))
    return from_records(rows, verify=False)


def train(model: SLQEncoder, pairs: ImageTextPairs, output: Path, evaluator: Any = None, **settings: Any) -> float:
    """Train the model with SentenceTransformerTrainer; returns the seconds it took."""
    settings.setdefault("batch_sampler", DistinctImageBatchSampler)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        learning_rate_mapping=learning_rate_mapping(model),
        **settings,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs.dataset,
        loss=SymmetricInfoNCELoss(model),
        evaluator=evaluator,
    )
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def contact_sheet(rows: list[tuple[Any, list[Image.Image]]], path: Path) -> None:
    """A line for each query, the query on the left and its best results beside it."""
    cell, margin = 96, 260
    width = margin + cell * max(len(results) for _, results in rows)
    sheet = Image.new("RGB", (width, (cell + 8) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (query, results) in enumerate(rows):
        top = line * (cell + 8)
        if isinstance(query, Image.Image):
            sheet.paste(query.resize((cell, cell)), (margin - cell - 20, top))
        else:
            draw.multiline_text((8, top + 8), textwrap.fill(query, 37), fill="black")
        for column, image in enumerate(results):
            sheet.paste(image.resize((cell - 4, cell - 4)), (margin + column * cell, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder to write to (default: %(default)s)"
    )
    output: Path = parser.parse_args(argv).output
    torch.manual_seed(0)

    print("1. A frozen multimodal LLM, fresh latent queries and a projection head")
    model = SLQEncoder.from_backbone(pretrained("mllm-tiny"), num_queries=QUERIES, projection=True, seed=0)
    held_out = sample_scenes(20 if SMOKE else 300, "test")
    images = [render(scene, seed=7) for scene in held_out]
    literal = ImageTextRetrievalEvaluator(
        images, [captions(s)[0] for s in held_out], range(len(images)), name="literal"
    )
    indirect = ImageTextRetrievalEvaluator(images, [implicit(s) for s in held_out], range(len(images)), name="implicit")
    before = {**literal(model), **indirect(model)}

    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(f"2. Training {numbers:,} numbers; {model.backbone.num_parameters():,} stay frozen")
    pairs = scene_pairs(sample_scenes(100 if SMOKE else 4000, "train"), seed=1)
    steps = 3 if SMOKE else STEPS
    seconds = train(
        model, pairs, output, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE
    )
    after = {**literal(model), **indirect(model)}
    print(f"   {steps} steps in {seconds:.0f} s. Recall on {len(images)} held-out pictures, before -> after:")
    for name in ("literal_text_to_image_recall@1", "implicit_text_to_image_recall@1", "literal_image_to_text_recall@1"):
        print(f"   {name}: {before[name]:.1%} -> {after[name]:.1%}")

    print("3. Saved, and loaded by plain SentenceTransformer")
    folder = output / "slq-demo"
    model.save_pretrained(folder)
    files = ("adapter_model.safetensors", "1_Dense/model.safetensors")
    trained = sum((folder / name).stat().st_size for name in files)
    stock = SentenceTransformer(str(folder))
    print(f"   {folder}: {trained:,} bytes of trained weights; {type(stock[0]).__name__} from stock modules")

    print("4. Searching the held-out pictures")
    index = stock.encode(images, convert_to_tensor=True)
    # Two scenes by their captions, two by what they are like, and two by another drawing of them.
    queries: list[Any] = [captions(scene)[0] for scene in held_out[:2]] + [implicit(scene) for scene in held_out[2:4]]
    queries += [render(scene, seed=8) for scene in held_out[4:6]]
    hits = semantic_search(stock.encode(queries, convert_to_tensor=True), index, top_k=6)
    rows = []
    for query, results in zip(queries, hits, strict=True):
        best = captions(held_out[results[0]["corpus_id"]])[0]
        print(f"   {query if isinstance(query, str) else 'a picture'}\n      -> {best} ({results[0]['score']:.2f})")
        rows.append((query, [images[hit["corpus_id"]] for hit in results]))
    contact_sheet(rows, output / "contact_sheet.png")
    print(f"Contact sheet: {(output / 'contact_sheet.png').resolve()}")


if __name__ == "__main__":
    main()
