"""KARR-Bench: retrieval by queries that imply knowledge, as a whole and by category."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from slq_embed.evaluation.encoding import EvaluatorOptions, require_images
from slq_embed.evaluation.evaluator import Evaluator
from slq_embed.evaluation.retrieval import RECALL_AT, both_ways, mean_recall


class KARRBenchEvaluator(Evaluator):
    """Recall at 1, 5 and 10, MRR at 10 and nDCG at 10 both ways, and recalls for each category.

    There is one query an image. A category's queries and images are ranked among all, so the categories' recalls,
    weighted by their sizes, make the overall one. The primary metric is the mean of the six overall recalls.

    Args:
        images: Images.
        texts: The query text of each image.
        categories: The category of each pair, such as ``"functional"``. ``None`` where they are not known; a pair whose category
            is ``None`` counts in the overall metrics only.
        **options: See :class:`~slq_embed.evaluation.EvaluatorOptions`.

    Raises:
        ValueError: If the numbers of images, texts and categories differ.

    Source:
        KARR-Bench of arXiv:2604.13710.
    """

    kind, metric = "karr_bench", "mean_recall"

    def __init__(
        self,
        images: Sequence[Any],
        texts: Sequence[str],
        categories: Sequence[str | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(EvaluatorOptions(**options))
        require_images(images)
        counts = {len(images), len(texts), len(images if categories is None else categories)}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"There are {len(images)} images, {len(texts)} texts and "
                f"{'no' if categories is None else len(categories)} categories, but each image needs one text, and one "
                "category or none at all."
            )
        self.images, self.texts = list(images), list(texts)
        self.categories = None if categories is None else [_slug(category or "") for category in categories]

    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode all images and texts, and measure.

        Args:
            model: Any Sentence Transformer that encodes images and texts.

        Returns:
            Metrics by name; those of a category begin with it: ``functional_text_to_image_recall@1``.
        """
        each = both_ways(model, self.images, self.texts, torch.arange(len(self.texts)), self.options)
        metrics = {name: float(values.mean()) for name, values in each.items()}
        metrics["mean_recall"] = mean_recall(metrics)
        for category in filter(None, dict.fromkeys(self.categories or ())):
            rows = torch.from_numpy(np.asarray(self.categories) == category)
            for way in ("text_to_image", "image_to_text"):
                for k in RECALL_AT:
                    metrics[f"{category}_{way}_recall@{k}"] = float(each[f"{way}_recall@{k}"][rows].mean())
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"pairs": len(self.texts), "categories": len(set(filter(None, self.categories or ())))}


def _slug(category: str) -> str:
    """A category as part of a metric's name: ``"tool/appliance"`` is ``"tool_appliance"``."""
    return re.sub(r"\W+", "_", category.lower()).strip("_")
