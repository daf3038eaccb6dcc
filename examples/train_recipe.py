"""Train on COCO, Flickr30K or MMEB-train as the paper does, or say before what that takes.

    python examples/train_recipe.py --data coco --backbone qwen3-vl-2b --path coco --output output/coco-2b
    python examples/train_recipe.py --data coco --backbone qwen3-vl-2b --dry-run     # needs neither data nor weights
    torchrun --nproc-per-node 4 examples/train_recipe.py --data mmeb --backbone internvl3-8b --form merged --path MMEB-train

What --path must hold is in docs/guides/recipes.md. The same command again goes on from the last checkpoint. Hardware: one
GPU with 24 GB or more; --dry-run estimates memory and hours for your card and runs on a CPU. Expected output: the settings,
the loss, and at the end the metrics beside the paper's, with the model in OUTPUT/model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, Value, concatenate_datasets
from evaluate import BENCHMARKS, PAPER, load_data, table
from sentence_transformers import SentenceTransformerTrainer
from train import build_trainer, positive, train

from slq_embed import SLQEncoder, pretrained
from slq_embed.data import from_karpathy, load_mmeb_train
from slq_embed.evaluation import MMEB_TASKS
from slq_embed.inputs import Skipped
from slq_embed.training import plan_prefixes

Rows = Dataset | dict[str, Dataset]


@dataclass(frozen=True)
class Data:
    """A row of the data table.

    Args:
        epochs: Of the run.
        pairs: Pairs of an epoch, for --dry-run; a run counts its own.
        image_size: Width and height in pixels of a typical image, for --dry-run.
        words: Words beside the image and in the text of a typical pair, for --dry-run.
        published: Where the data are published.
        read: Reads training pairs: ``(path, images, limit)``.
        test_in_path: Whether the folder holds the test set too.
        instructions: Of the encoder.
    """

    epochs: int
    pairs: int
    image_size: tuple[int, int]
    words: tuple[int, int]
    published: str
    read: Callable[..., tuple[Rows, list[Skipped]]]
    test_in_path: bool
    instructions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Backbone:
    """A row of the backbone table.

    Args:
        name: On the hub.
        learning_rate: Of the queries.
        batch: Pairs a step, over all processes.
        max_pixels: Largest image; ``None`` for a family that resizes every image to one size.
    """

    name: str
    learning_rate: float
    batch: int = 1024
    max_pixels: int | None = None


def read_karpathy(
    path: Path,
    images: Path | None,
    limit: int | None,
    names: Sequence[str],
    splits: Sequence[str],
    roots: Sequence[str],
) -> tuple[Dataset, list[Skipped]]:
    """Training pairs of a Karpathy split file; labels mark captions of one image."""
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"There is no Karpathy split file in {path}. Looked for: {', '.join(names)}.")
    folders = [images] if images else [path / root for root in roots]
    named = [Path(row.get("filepath", "")) / row["filename"] for row in json.loads(file.read_text("utf8"))["images"]]
    root = next((folder for folder in folders if any((folder / name).is_file() for name in named[:100])), None)
    if root is None:
        looked = ", ".join(map(str, folders))
        raise FileNotFoundError(f"None of the first images of {file}, such as {named[0]}, is in {looked}.")
    parts, skipped, images_read = [], [], 0
    for split in splits:
        if limit is None or images_read < limit:
            pairs = from_karpathy(file, root, split, limit=None if limit is None else limit - images_read)
            labels = np.asarray(pairs.dataset["label"]) + images_read
            parts.append(pairs.dataset.remove_columns("label").add_column("label", labels))
            skipped += pairs.skipped
            images_read = int(labels[-1]) + 1
    # Undecoded: an image is decoded where it is preprocessed, in a worker.
    return concatenate_datasets(parts).cast_column("image", Image(decode=False)), skipped


def read_coco(path: Path, images: Path | None, limit: int | None) -> tuple[Rows, list[Skipped]]:
    names, roots = ("dataset_coco.json", "coco/dataset.json"), (".", "images", "coco")
    return read_karpathy(path, images, limit, names, ("train", "restval"), roots)


def read_flickr30k(path: Path, images: Path | None, limit: int | None) -> tuple[Rows, list[Skipped]]:
    names, roots = ("dataset_flickr30k.json", "flickr30k/dataset.json"), ("flickr30k-images", "flickr30k_images")
    return read_karpathy(path, images, limit, names, ("train",), (*roots, "images", "."))


MMEB_SETS = ("A-OKVQA", "CIRR", "ChartQA", "DocVQA", "HatefulMemes", "ImageNet_1K", "InfographicsVQA", "MSCOCO")
MMEB_SETS += ("MSCOCO_i2t", "MSCOCO_t2i", "N24News", "NIGHTS", "OK-VQA", "SUN397", "VOC2007", "VisDial", "Visual7W")
MMEB_SETS += ("VisualNews_i2t", "VisualNews_t2i", "WebQA")
"""The 20 sets to train on. The published folder holds six more, which belong to the out-of-distribution tasks."""

UNDECODED = {"image": Image(decode=False), "text": Value("string")}


def read_mmeb(path: Path, images: Path | None, limit: int | None) -> tuple[Rows, list[Skipped]]:
    """Training pairs of each set; labels mark pairs with the same target, such as two images of one class."""
    if missing := [name for name in MMEB_SETS if not (path / name).is_dir()]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(MMEB_SETS)} sets of MMEB-train are missing in {path}: {', '.join(missing)}."
        )
    rows: dict[str, Dataset] = {}
    skipped: list[Skipped] = []
    for name in MMEB_SETS:
        pairs = load_mmeb_train(path, name, images=images, limit=limit)
        undecoded = pairs.dataset.select_columns("positive").cast_column("positive", UNDECODED)
        targets = [json.dumps(row["positive"]) for row in undecoded]
        labels = np.unique(targets, return_inverse=True)[1]
        rows[name] = pairs.dataset.select_columns(["anchor", "positive"]).add_column("label", labels)
        skipped += [Skipped(f"{name}, {row.name}", row.reason) for row in pairs.skipped]
    return rows, skipped


# COCO: "train" of the paper is taken as Karpathy's train and restval, 113,287 images, which share none with its test split.
# Flickr30K: the paper names no training on it; COCO's settings.
# MMEB: one epoch; 662,000 pairs is the number that papers give for the 20 sets. Batches are of one set each. Its texts are
# instructions already, so none is put around them. A typical pair is assumed to be an image with an instruction and a short text.
DATA = {
    "coco": Data(
        *(5, 566_747, (640, 480), (0, 10), "dataset_coco.json (Karpathy split) with train2014 and val2014 of COCO"),
        *(read_coco, True),
    ),
    "flickr30k": Data(
        *(5, 145_000, (500, 375), (0, 12), "dataset_flickr30k.json (Karpathy split) with the images of Flickr30K"),
        *(read_flickr30k, True),
    ),
    "mmeb": Data(
        *(1, 662_000, (640, 480), (20, 8), "TIGER-Lab/MMEB-train, with its images_zip unpacked"),
        *(read_mmeb, False, {"composed": "{text}"}),
    ),
}
# The learning rates are those of the authors' two scripts: 5e-4 for Qwen3-VL, 1e-5 for InternVL3. At 1e-5, AdamW moves a number
# by about 0.014 in COCO's 2,770 steps, less than the queries' initial standard deviation: if the loss stays where it is, try 5e-4.
# Qwen3-VL: the authors keep an image's resolution; 1,024 tokens an image is our bound, above every image of COCO.
# InternVL3: one tile of 448 x 448 pixels, as in their script (which pads to a square; here the image is stretched).
BACKBONES = {
    "qwen3-vl-2b": Backbone("Qwen/Qwen3-VL-2B-Instruct", 5e-4, max_pixels=1024 * 1024),
    "qwen3-vl-4b": Backbone("Qwen/Qwen3-VL-4B-Instruct", 5e-4, max_pixels=1024 * 1024),
    "internvl3-1b": Backbone("OpenGVLab/InternVL3-1B-hf", 1e-5),
    "internvl3-8b": Backbone("OpenGVLab/InternVL3-8B-hf", 1e-5, batch=512),
}
# 20 queries, as the text says ("about 36K" numbers on InternVL3-1B would be 40). Texts are cut at 128 tokens there and at 512
# characters here, since the saved template counts characters. 100 steps of warm-up are those of the Qwen script. The schedule is not
# stated in what we have: linear, the trainer's default.
COMMON = {"queries": 20, "temperature": 0.07, "warmup_steps": 100, "lr_scheduler_type": "linear", "max_text_chars": 512}


def resolve(args: argparse.Namespace) -> tuple[Data, Backbone]:
    """The rows of the tables; options that were not given are taken from there."""
    data = DATA[args.data]
    name = pretrained(args.backbone) if args.backbone == "mllm-tiny" else args.backbone
    backbone = BACKBONES.get(name) or Backbone(name, 5e-4)
    for option, value in {**COMMON, **asdict(backbone), "epochs": data.epochs}.items():
        if getattr(args, option, None) is None:
            setattr(args, option, value)
    return data, backbone


def build_model(
    args: argparse.Namespace, data: Data, backbone: Any, processor: Any = None, **options: Any
) -> SLQEncoder:
    """Fresh queries on a backbone, which is a name or a loaded model."""
    options |= {"num_queries": args.queries, "max_text_chars": args.max_text_chars, "max_pixels": args.max_pixels}
    return SLQEncoder.from_backbone(
        backbone, processor, seed=args.seed, form=args.form, instructions=data.instructions, **options
    )


def trainer_of(args: argparse.Namespace, model: SLQEncoder, rows: Rows, **settings: Any) -> SentenceTransformerTrainer:
    """The trainer with the recipe's settings."""
    # The paper's parameter is the temperature itself, and ours its logarithm. Where the first moves by a learning rate, the second
    # moves by that divided by the temperature.
    rates = {r"\blog_temperature$": args.learning_rate / args.temperature}
    arguments: dict[str, Any] = {
        "output_dir": str(args.output),
        "num_train_epochs": args.epochs,
        "max_steps": args.steps or -1,
        "learning_rate": args.learning_rate,
        "learning_rate_mapping": rates,
        "warmup_steps": args.warmup_steps,
        "lr_scheduler_type": args.lr_scheduler_type,
        "dataloader_num_workers": args.workers,
        "save_steps": args.save_steps,
        "seed": args.seed,
    }
    return build_trainer(
        model, rows, batch=args.batch, chunk=args.chunk, temperature=args.temperature, **{**arguments, **settings}
    )


def read(args: argparse.Namespace, data: Data) -> tuple[Rows, Any]:
    """Training pairs and evaluator; the test set first, so that what is missing is said before all images are checked."""
    test = args.test_path or (args.path if data.test_in_path else None)
    try:
        wanted = argparse.Namespace(benchmark=args.data, data=test, limit=args.limit, tasks=MMEB_TASKS)
        wanted.images = args.test_images or args.images
        evaluator = BENCHMARKS[args.data][1](**load_data(wanted)) if test else None
        rows, skipped = data.read(args.path, args.images, args.limit)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"{error} For --data {args.data}, --path is to hold {data.published}.") from error
    names = "; ".join(f"{row.name} ({row.reason})" for row in skipped[:5]) + "; ..." * (len(skipped) > 5)
    print(f"{count(rows):,} pairs to train on; {len(skipped):,} skipped: {names or 'none'}")
    return rows, evaluator


def count(rows: Rows) -> int:
    return sum(map(len, rows.values())) if isinstance(rows, dict) else len(rows)


def together(rows: Rows) -> Dataset:
    """The pairs of all sets; of several without their labels, which each set counts from 0."""
    if isinstance(rows, Dataset):
        return rows
    return concatenate_datasets([part.remove_columns("label") for part in rows.values()])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=DATA, required=True, help="whose recipe")
    add("--backbone", required=True, help=f"{', '.join(BACKBONES)}, mllm-tiny, or a hub name or folder")
    add("--path", type=Path, help="folder of the data")
    add("--images", type=Path, help="folder of the images, if elsewhere")
    add(
        "--test-path",
        type=Path,
        help="folder of the test set, if elsewhere (MMEB: of MMEB-eval; without it no evaluation)",
    )
    add("--test-images", type=Path, help="folder of the test set's images, if elsewhere")
    add(
        "--output",
        type=Path,
        default=Path("output/recipe"),
        help="folder of checkpoints and model (default: %(default)s)",
    )
    add("--limit", type=positive, help="read so many images only (MMEB: rows of each set)")
    add("--queries", type=positive, help="latent queries; by default the recipe's")
    add("--batch", type=positive, help="pairs a step, over all processes; by default the recipe's")
    add(
        "--chunk",
        type=positive,
        default=32,
        help="rows that are differentiated at a time: only memory and time depend on it (default: %(default)s)",
    )
    add("--epochs", type=positive, help="passes over the data; by default the recipe's")
    add("--steps", type=positive, help="stop after so many steps")
    add("--learning-rate", type=float, help="of the queries; by default the recipe's")
    add("--max-pixels", type=positive, help="largest image, for families that keep the resolution")
    add(
        "--form",
        default="adapter",
        choices=["adapter", "merged"],
        help="how to save; InternVL3 needs merged: see docs/guides/save-load-serve.md (default: %(default)s)",
    )
    add("--prefixes", type=Path, help="folder to keep prefixes in, if that is faster by measurement")
    add("--save-steps", type=positive, default=100, help="steps between checkpoints (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=8 if torch.cuda.is_available() else 0,
        help="processes that preprocess (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the queries and the order (default: %(default)s)")
    add("--dry-run", action="store_true", help="random weights and synthetic pairs: time, memory, hours to finish")
    add("--layers", type=positive, help="dry run: layers of each tower; by default 2 on a CPU, all on a GPU")
    add("--dry-steps", type=int, default=3, help="dry run: steps to measure; 0 only counts (default: %(default)s)")
    add("--dry-batch", type=positive, help="dry run: pairs of a measured step; by default 4 on a CPU, 64 on a GPU")
    add("--card", action="append", help="dry run: NAME,GB,TFLOPS of a card to estimate for; may come several times")
    add(
        "--utilisation",
        type=float,
        default=0.4,
        help="dry run: assumed share of the card's peak (default: %(default)s)",
    )
    add("--json", type=Path, help="dry run: file to write the results to")
    args = parser.parse_args(argv)
    if not 0 < args.utilisation <= 1:
        parser.error(f"argument --utilisation: {args.utilisation}, but a share above 0 and up to 1 is needed")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data, backbone = resolve(args)
    if args.dry_run:
        sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
        from dry_run import dry_run

        dry_run(args, data, backbone.name, build_model, trainer_of)
        return
    if args.path is None:
        raise SystemExit(f"--path is missing: the folder with {data.published}. Without data there is --dry-run.")
    torch.manual_seed(args.seed)
    rows, evaluator = read(args, data)
    model = build_model(args, data, backbone.name)
    if args.prefixes is not None:
        plan = plan_prefixes(model, together(rows), args.epochs, folder=args.prefixes)
        print(plan)
        model.prefix_store = plan.store()
    trainer = trainer_of(args, model, rows)
    chosen = {name: getattr(args, name) for name in ("batch", "chunk", "epochs", "learning_rate", *COMMON)}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(f"{numbers:,} numbers to train; {', '.join(f'{name} {value}' for name, value in chosen.items())}")
    train(trainer)
    if not trainer.is_world_process_zero():
        return
    model.save_pretrained(args.output / "model", form=args.form)
    print(f"saved to {args.output / 'model'}")
    if evaluator is None:
        print("not measured: give the folder of MMEB-eval with --test-path, or run examples/evaluate.py")
        return
    metrics = evaluator(model)
    print(table(metrics, PAPER[args.data]))
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", "utf8")


if __name__ == "__main__":
    main()
