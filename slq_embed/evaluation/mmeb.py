"""MMEB v1: 36 tasks of four groups, each query with candidates of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from slq_embed.evaluation.encoding import EvaluatorOptions, embed
from slq_embed.evaluation.evaluator import Evaluator
from slq_embed.evaluation.ranking import order_own

MMEB_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {
        "in_distribution": ("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
        "out_of_distribution": ("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    },
    "vqa": {
        "in_distribution": ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
        "out_of_distribution": ("ScienceQA", "VizWiz", "GQA", "TextVQA"),
    },
    "retrieval": {
        "in_distribution": (
            *("VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA"),
        ),
        "out_of_distribution": ("FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    },
    "grounding": {
        "in_distribution": ("MSCOCO",),
        "out_of_distribution": ("RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
    },
}
"""The tasks of each group; those whose training data are in MMEB-train are in-distribution."""
MMEB_TASKS = tuple(task for halves in MMEB_GROUPS.values() for tasks in halves.values() for task in tasks)
"""The 36 names."""


@dataclass(frozen=True)
class MMEBTask:
    """A task: distinct inputs, and which candidates each query has.

    Args:
        queries: The query of each row.
        candidates: Candidates of all rows.
        own: For each query, the indices of its candidates, the right one first.
    """

    queries: Sequence[Any]
    candidates: Sequence[Any]
    own: Sequence[Sequence[int] | NDArray[np.integer[Any]]]


class MMEBEvaluator(Evaluator):
    """Precision at 1 of each task, and the means of the leaderboard.

    A query is right if its first candidate scores highest among its own candidates. Each mean is one over tasks, not
    over groups or queries: of each group, of the in-distribution and out-of-distribution tasks, and of all of them
    (``mean``, the primary metric). Of some tasks only, the means are over those.

    Args:
        tasks: Tasks by name; :data:`MMEB_TASKS` has the names.
        **options: See :class:`~slq_embed.evaluation.EvaluatorOptions`.

    Raises:
        ValueError: If there is no task, a name is not one of MMEB's, or a task's lists do not fit each other.

    Source:
        VLM2Vec and MMEB, arXiv:2410.05160.
    """

    kind, metric = "mmeb", "mean"

    def __init__(self, tasks: Mapping[str, MMEBTask], **options: Any) -> None:
        super().__init__(EvaluatorOptions(**options))
        if not tasks or (unknown := set(tasks) - set(MMEB_TASKS)):
            raise ValueError(f"MMEB has no task {sorted(unknown) if tasks else ''}. It has: {', '.join(MMEB_TASKS)}.")
        for name, task in tasks.items():
            count = len(task.candidates)
            if len(task.queries) != len(task.own) or any(len(row) == 0 for row in task.own):
                raise ValueError(
                    f"{name} has {len(task.queries)} queries and {len(task.own)} rows of candidates, but each query "
                    "needs a row with at least one."
                )
            if any(min(row) < 0 or max(row) >= count for row in task.own):
                raise ValueError(f"{name} has {count} candidates, but a row of `own` holds other indices.")
        self.tasks = dict(tasks)

    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode each distinct query and candidate of each task once, and measure.

        Args:
            model: Any Sentence Transformer that encodes images with texts.

        Returns:
            Precision at 1 by task, and means.
        """
        scores = {}
        for name, task in self.tasks.items():
            queries = embed(model, task.queries, "query", self.options, f"{name}_queries")
            candidates = embed(model, task.candidates, "document", self.options, f"{name}_candidates")
            orders = order_own(queries, candidates, task.own)
            scores[name] = sum(order[:1] == [0] for order in orders) / len(orders)
        return {f"{name}_precision@1": score for name, score in scores.items()} | mmeb_means(scores)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"tasks": len(self.tasks), "queries": sum(len(task.queries) for task in self.tasks.values())}


def mmeb_means(scores: Mapping[str, float]) -> dict[str, float]:
    """The means of the leaderboard, each over the tasks that are there.

    Args:
        scores: A score by the name of its task.

    Returns:
        ``classification``, ``vqa``, ``retrieval``, ``grounding``, ``in_distribution``, ``out_of_distribution`` and
        ``mean``; a mean without any task is left out.
    """
    parts = {group: [task for tasks in halves.values() for task in tasks] for group, halves in MMEB_GROUPS.items()}
    for half in ("in_distribution", "out_of_distribution"):
        parts[half] = [task for halves in MMEB_GROUPS.values() for task in halves[half]]
    parts["mean"] = list(MMEB_TASKS)
    there = {name: [scores[task] for task in tasks if task in scores] for name, tasks in parts.items()}
    return {name: sum(values) / len(values) for name, values in there.items() if values}
