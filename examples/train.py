"""Train latent queries on your own images with captions, on one GPU or many, from memory or as a stream.

    python examples/train.py --data photos --holdout 20
    python examples/train.py --data photos --backbone Qwen/Qwen3-VL-2B-Instruct --learning-rate 5e-4 --queries 20
    torchrun --nproc-per-node 4 examples/train.py --data photos --batch 1024 --chunk 32
    python examples/train.py --stream shards/*.tar --columns jpg txt --test photos --steps 1000

--data is a folder with `captions.jsonl` (`image`, `captions`, and `split` with train and val, or --holdout). --stream
takes WebDataset shards or parquet files, which are read as they are needed and mixed in a buffer; --test is then such a folder. The
same command again goes on from the last whole checkpoint. Hardware: 2 CPU cores and some ten minutes with the embedded default, which has hardly
seen a photo: recall is low, and printed as it is. A GPU for a real backbone. Expected output: the loss, seconds, pairs a second, recall
at 1, 5 and 10 both ways, before and after, with the model in OUTPUT/model.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.data import DistinctImageBatchSampler, ImageTextPairs, from_dataset, from_folder, retrieval_set
from slq_embed.evaluation import ImageTextRetrievalEvaluator
from slq_embed.training import CachedSymmetricInfoNCELoss, learning_rate_mapping

RUN = ("data", "stream", "columns", "buffer", "holdout", "limit", "backbone", "queries", "projection", "query_adapter")
RUN += ("batch", "learning_rate", "seed")
"""Options that must stay the same where a run goes on."""


def load(folder: Path, holdout: int, limit: int | None) -> tuple[ImageTextPairs, ImageTextPairs]:
    """Training and test pairs: by the file's own split, or the last images."""
    if not holdout:
        try:
            return from_folder(folder, split="train", limit=limit), from_folder(folder, split="val")
        except ValueError as error:
            raise SystemExit(f"{error} To measure on the last images, add --holdout 20.") from error
    pairs = from_folder(folder)
    labels = pairs.dataset["label"][:]
    if not 0 < holdout <= labels[-1]:
        raise SystemExit(
            f"--holdout is {holdout}, but {folder} has {labels[-1] + 1} images that can be read. Hold out at least one, and fewer "
            "than all."
        )
    first = labels.index(labels[-1] + 1 - holdout)
    parts = range(first if limit is None else labels.index(min(limit, labels[first]))), range(first, len(labels))
    training, test = (ImageTextPairs(pairs.dataset.select(rows), pairs.skipped) for rows in parts)
    return training, test


def read(args: argparse.Namespace) -> tuple[ImageTextPairs, ImageTextPairs | None]:
    """Pairs to train on, and pairs to measure on if there are any."""
    if args.test is not None and (
        args.holdout or (args.data is not None and args.test.resolve() == args.data.resolve())
    ):
        raise SystemExit(
            "--test is another folder to measure on. To measure on a part of --data, give --holdout alone."
        )
    test = None if args.test is None else from_folder(args.test)
    if args.stream is not None:
        return stream(args.stream, *args.columns, args.buffer, args.seed), test
    return (
        load(args.data, args.holdout, args.limit) if test is None else (from_folder(args.data, limit=args.limit), test)
    )


def stream(files: list[str], image_column: str, text_column: str, buffer: int = 1000, seed: int = 0) -> ImageTextPairs:
    """Pairs of many files, read as they are needed, and mixed in a buffer, in another order in each epoch."""
    if missing := [file for file in files if not Path(file).is_file()]:
        raise SystemExit(f"There is no file {missing[0]}. Give WebDataset shards (*.tar) or parquet files.")
    kind = "webdataset" if files[0].endswith(".tar") else "parquet"
    rows = load_dataset(kind, data_files=files, split="train", streaming=True)
    pairs = from_dataset(rows, image_column, text_column)  # a bad image is left out, and listed
    # Mixed after reading: so the captions of an image come apart too, and a bad row has its number in the files.
    pairs.dataset = pairs.dataset.shuffle(seed, buffer_size=buffer)
    return pairs


class SamplerEpoch(TrainerCallback):
    """Tells a sampler its epoch, where several processes share it.

    Where a run goes on in the middle of an epoch, the hosts wrap the sampler once more, and do not reach it: the rest of that epoch would
    have the order of the first one. Seen in transformers 5.23 with accelerate 1.15: https://github.com/huggingface/accelerate/issues/2016
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sharded = getattr(kwargs["train_dataloader"], "batch_sampler", None)
        sampler = getattr(sharded, "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch))


def build_trainer(
    model: SLQEncoder,
    rows: Any,
    *,
    batch: int,
    chunk: int,
    temperature: float | None = None,
    evaluator: Any = None,
    **settings: Any,
) -> SentenceTransformerTrainer:
    """SentenceTransformerTrainer with the paper's loss.

    The batch may have any size whatever the memory: it is embedded and differentiated in chunks, and all processes share
    their negatives.

    Args:
        model: The encoder.
        rows: The training set.
        batch: Pairs a step, over all processes.
        chunk: Rows that are differentiated at a time: only memory and time depend on it.
        temperature: Initial temperature.
        evaluator: For metrics during the training.
        **settings: For SentenceTransformerTrainingArguments.

    Raises:
        SystemExit: If one process has several GPUs.
    """
    arguments: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),  # else several processes on CPUs would not find each other
        "learning_rate_mapping": learning_rate_mapping(model),
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
    }
    if isinstance(rows, IterableDataset):
        # Each process reads its own batches. Else one process would cut a batch for all by rows, and pixels lie by patch.
        arguments["accelerator_config"] = {"dispatch_batches": False}
    training = SentenceTransformerTrainingArguments(**{**arguments, **settings})
    training.per_device_train_batch_size = max(1, batch // training.world_size)
    loss = CachedSymmetricInfoNCELoss(
        model, temperature, mini_batch_size=chunk, gather_across_devices=training.world_size > 1
    )
    trainer = SentenceTransformerTrainer(model, training, train_dataset=rows, loss=loss, evaluator=evaluator)
    trainer.add_callback(SamplerEpoch)
    if trainer.args.n_gpu > 1:  # 1 where the layers of a large model lie on several GPUs
        raise SystemExit(
            f"One process has {trainer.args.n_gpu} GPUs, and would split batches among them in a way that latent queries do not "
            f"support. Start one process for each: torchrun --nproc-per-node {trainer.args.n_gpu} ..., or choose one GPU: "
            "CUDA_VISIBLE_DEVICES=0."
        )
    return trainer


def last_checkpoint(folder: Path, processes: int = 1) -> tuple[Path | None, list[Path]]:
    """The last whole checkpoint, and later ones that a killed run began to write.

    The trainer writes trainer_state.json last. Only the other processes' random states may come still later. A checkpoint without all
    of them is taken where no other has them: then the run had fewer processes.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    found.sort(key=lambda path: int(path.name[11:]), reverse=True)
    readable = [path for path in found if is_readable(path)]
    names = ["rng_state.pth"], [f"rng_state_{process}.pth" for process in range(processes if processes > 1 else 0)]
    whole = [path for path in readable if any(all((path / name).is_file() for name in each) for each in names)]
    last = next(iter(whole or readable), None)
    return last, found if last is None else found[: found.index(last)]


def is_readable(checkpoint: Path) -> bool:
    """Whether the files that the trainer itself wrote are there to their ends."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf8"))
    except (FileNotFoundError, ValueError):
        return False
    return all(zipfile.is_zipfile(file) for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")])


def train(trainer: SentenceTransformerTrainer) -> None:
    """Train, from the last whole checkpoint on if there is one.

    Raises:
        SystemExit: If several processes have fewer rows than a step takes, or not one step was run.
    """
    share, processes, rows = trainer.args.per_device_train_batch_size, trainer.args.world_size, trainer.train_dataset
    if processes > 1 and isinstance(rows, Dataset) and len(rows) < share * processes:
        raise SystemExit(
            f"A step takes {share * processes} pairs, {share} in each of {processes} processes, but there are {len(rows)} to train "
            "on. Several processes take full batches only: lower --batch."
        )
    checkpoint, half = last_checkpoint(Path(trainer.args.output_dir), processes)
    for path in half:
        print(f"{path} is left out, because it was not written to its end; it is written anew when the run comes there")
    if checkpoint is not None:
        print(f"going on from {checkpoint}; for a new run, give another --output")
    if checkpoint is not None and 0 < trainer.args.max_steps <= int(checkpoint.name[11:]):
        # The trainer would take another step, at a learning rate beyond the end of its schedule, and save it.
        print(f"all {trainer.args.max_steps} steps are done")
        trainer._load_from_checkpoint(str(checkpoint))
        return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not trainer.state.global_step:
        raise SystemExit(
            f"Nothing was trained: the data did not fill one batch of {share} different images in each of {processes} processes. "
            "Lower --batch."
        )


def require_same_run(args: argparse.Namespace) -> None:
    """Record the settings of a run, or compare them where it goes on.

    Raises:
        SystemExit: If the run that is there has other settings: it could not be read, or would end as it is.
    """
    settings = {name: getattr(args, name) for name in RUN} | {"data": args.data and str(args.data.resolve())}
    record = args.output / "run.json"
    if last_checkpoint(args.output)[0] is None:
        args.output.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=1) + "\n", "utf8")
        return
    before = json.loads(record.read_text("utf8")) if record.is_file() else {}
    if other := [name for name in before if before[name] != settings.get(name)]:
        was = "; ".join(f"--{name.replace('_', '-')} was {before[name]}, and is {settings.get(name)}" for name in other)
        raise SystemExit(
            f"{args.output} has a run with other settings: {was}. Give another --output, or these settings."
        )


def positive(text: str) -> int:
    """A whole number of an option, which must be at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}, but at least 1 is needed")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with captions.jsonl")
    add("--stream", nargs="+", help="WebDataset shards or parquet files, in place of --data")
    add(
        "--columns",
        nargs=2,
        default=["image", "text"],
        help="of the streamed files: image and text (default: %(default)s)",
    )
    add(
        "--buffer",
        type=positive,
        default=1000,
        help="mix so many streamed pairs at a time: as many images are in memory (default: %(default)s)",
    )
    add("--test", type=Path, help="folder with captions.jsonl to measure on; by default a part of --data")
    add(
        "--holdout",
        type=int,
        default=0,
        help="measure on so many last images, where the file has no split (default: %(default)s)",
    )
    add("--limit", type=positive, help="train on so many images only")
    add("--backbone", help="hub name or folder; by default the embedded mllm-tiny")
    add("--queries", type=positive, default=16, help="latent queries (default: %(default)s)")
    add("--projection", action="store_true", help="train a projection head, too")
    add("--query-adapter", action="store_true", help="train an adapter at the queries, too")
    add("--steps", type=positive, default=600, help="steps to train (default: %(default)s)")
    add("--batch", type=positive, default=64, help="pairs a step, over all processes (default: %(default)s)")
    add("--chunk", type=positive, default=32, help="rows that are differentiated at a time (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-2, help="of the queries (default: %(default)s)")
    add("--prefixes", type=Path, help="folder to keep prefixes in, which all processes share")
    add("--eval-steps", type=positive, help="measure after so many steps, too")
    add("--save-steps", type=positive, default=200, help="steps between checkpoints (default: %(default)s)")
    add("--report-to", default="none", help="who gets the loss: tensorboard, trackio, ... (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the queries and the order (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("output/slq-photos"),
        help="folder of the checkpoints, and at the end of the model (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.stream is None and (args.data is None or not args.data.is_dir()):
        problem = "Which images?" if args.data is None else f"There is no folder {args.data}."
        raise SystemExit(f"{problem} Give a folder of captioned images with --data, or shards with --stream.")
    torch.manual_seed(args.seed)
    try:
        training, test = read(args)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    require_same_run(args)
    if args.stream is None:
        print(f"{len(training.dataset)} captions to train on; {training.report()}")
    settings: dict[str, Any] = {"projection": args.projection, "query_adapter": args.query_adapter or None}
    model = SLQEncoder.from_backbone(
        args.backbone or pretrained("mllm-tiny"), num_queries=args.queries, seed=args.seed, **settings
    )
    model.prefix_store = PrefixStore(args.prefixes) if args.prefixes else None
    evaluator = None if test is None else ImageTextRetrievalEvaluator(*retrieval_set(test), batch_size=64)
    before = {} if evaluator is None else evaluator(model)
    trainer = build_trainer(
        model,
        training.dataset,
        batch=args.batch,
        chunk=args.chunk,
        evaluator=evaluator,
        output_dir=str(args.output),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, args.steps // 4),
        save_steps=args.save_steps,
        eval_strategy="no" if evaluator is None or not args.eval_steps else "steps",
        eval_steps=args.eval_steps,
        report_to=args.report_to,
        seed=args.seed,
        **({} if args.stream else {"batch_sampler": DistinctImageBatchSampler}),
    )
    train(trainer)
    first = trainer.is_world_process_zero()
    # The processes part here. One that just ended would at times crash in its own clean-up, and torchrun would stop the first one.
    trainer.accelerator.end_training()
    if not first:
        return
    if args.stream:
        print(training.report())
    if evaluator is not None:
        print(f"{len(evaluator.images)} images and {len(evaluator.texts)} captions to measure on")
        for name, value in evaluator(model).items():
            print(f"{name:>24}: {before[name]:6.1%} -> {value:6.1%}")
    model.save_pretrained(args.output / "model")
    print(f"saved to {args.output / 'model'}")


if __name__ == "__main__":
    main()
