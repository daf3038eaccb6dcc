"""Toy training shared by tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from slq_embed.data import ImageTextPairs, from_records

WORDS = ["red circle", "blue square", "two green stars", "a heart", "yellow ring", "black cross", "pink moon", "a tree"]


def toy_pairs(count: int = 8) -> ImageTextPairs:
    rng = np.random.default_rng(0)
    drawn = (Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count))
    return from_records([(str(n), image, WORDS[n % 8] + " x" * (n // 8)) for n, image in enumerate(drawn)])


def arguments(output: Any, **settings: Any) -> SentenceTransformerTrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "report_to": "none", "save_strategy": "no"}
    defaults |= {"logging_steps": 1, "disable_tqdm": True, "seed": 0, "use_cpu": True, "max_steps": 4}
    return SentenceTransformerTrainingArguments(output_dir=str(output), **{**defaults, **settings})


def toy_train(model: Any, pairs: ImageTextPairs, output: Any, loss: Any = None, **settings: Any) -> Any:
    from slq_embed import SymmetricInfoNCELoss

    extra = {key: settings.pop(key) for key in ("evaluator", "callbacks") if key in settings}
    resume = settings.pop("resume", None)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(output, **settings),
        train_dataset=pairs.dataset,
        loss=loss or SymmetricInfoNCELoss(model),
        **extra,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
