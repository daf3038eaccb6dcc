"""Distillation: the scores of a reranker, such as the backbone's own judgement, as the labels of a training set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import CrossEncoder

from slq_embed.inputs import Skipped, report
from slq_embed.inputs.columns import LABELS

if TYPE_CHECKING:
    from datasets import Dataset

    from slq_embed.data import ImageTextPairs

logger = logging.getLogger(__name__)


def teacher_scores(
    reranker: CrossEncoder, rows: ImageTextPairs | Dataset, *, batch_size: int = 32, **options: Any
) -> ImageTextPairs:
    """Score the candidates of each row, for ``DistillKLDivLoss`` and ``MarginMSELoss``.

    Args:
        reranker: The teacher. :func:`slq_embed.generation.build_reranker` makes one of the encoder's own backbone, so
            that there is one copy of the weights.
        rows: Rows with an anchor, a positive and negatives, in this order, such as
            :func:`slq_embed.training.mine_negatives` gives.
        batch_size: Pairs a batch, and rows that are read at once.
        **options: For ``reranker.predict``: ``activation_fn=torch.nn.Sigmoid()`` for probabilities, ``prompt``, ...

    Returns:
        The same columns, and ``scores`` in place of a label: of the positive, then of each negative. A row that cannot be
        read is left out and listed.

    Raises:
        ValueError: If the rows are streamed, there are fewer than three columns to read, or no row is left.
    """
    from slq_embed.data import ImageTextPairs

    dataset = rows.dataset if isinstance(rows, ImageTextPairs) else rows
    if not hasattr(dataset, "select"):
        raise ValueError(
            "The rows are streamed, but a teacher scores a Dataset that can be counted: read it in full first."
        )
    columns = [name for name in dataset.column_names if name not in LABELS]
    if len(columns) < 3:
        raise ValueError(
            f"The dataset has the columns {columns}, but an anchor, a positive and at least one negative are needed. "
            "mine_negatives finds negatives."
        )
    skipped: list[Skipped] = []
    kept: list[int] = []
    scores: list[list[float]] = []
    options = {"show_progress_bar": False, **options, "batch_size": batch_size}
    for start in range(0, len(dataset), batch_size):
        chunk: dict[int, list[Any]] = {}
        for number in range(start, min(start + batch_size, len(dataset))):
            try:
                row = dataset[number]
            except Exception as error:  # a damaged file makes a decoder raise any error
                skipped.append(Skipped(f"row {number}", str(error), number))
            else:
                chunk[number] = [row[name] for name in columns]
        for number, found in _score(reranker, chunk, skipped, options):
            kept.append(number)
            scores.append(found)
    if not kept:
        raise ValueError(f"No row could be scored: {report(skipped[:3])}.")
    if skipped:
        skipped.sort(key=lambda row: row.index or 0)
        logger.warning("Teacher scores: %s", report(skipped))
    labels = [name for name in dataset.column_names if name in LABELS]
    return ImageTextPairs(dataset.select(kept).remove_columns(labels).add_column("scores", scores), skipped)


def _score(
    reranker: CrossEncoder, rows: dict[int, list[Any]], skipped: list[Skipped], options: dict[str, Any]
) -> list[tuple[int, list[float]]]:
    """Numbers of rows with the scores of their candidates; rows that cannot be read are added to ``skipped``."""
    if not rows:
        return []
    try:
        return list(zip(rows, _predict(reranker, list(rows.values()), options), strict=True))
    except ValueError as error:  # which of them was it?
        if len(rows) == 1:
            (number,) = rows
            skipped.append(Skipped(f"row {number}", str(error), number))
            return []
    return [item for number, row in rows.items() for item in _score(reranker, {number: row}, skipped, options)]


def _predict(reranker: CrossEncoder, rows: Sequence[list[Any]], options: dict[str, Any]) -> list[list[float]]:
    pairs = [(anchor, candidate) for anchor, *candidates in rows for candidate in candidates]
    scores = np.asarray(reranker.predict(pairs, **options), np.float64).reshape(len(rows), -1)
    return scores.tolist()
