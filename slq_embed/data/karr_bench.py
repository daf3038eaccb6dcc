"""KARR-Bench: COCO images with query texts that imply knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slq_embed.data.published import image_of, read_columns, require_count, require_limit

_PAIRS = 2915
_SOURCE = (
    "a `datasets` folder, coco_knowledge_bench_test, that the authors of arXiv:2604.13710 evaluate; no public release of "
    "it is known, so ask them for it"
)


@dataclass(frozen=True)
class KARRBenchSet:
    """What :class:`~slq_embed.evaluation.KARRBenchEvaluator` takes: ``KARRBenchEvaluator(**vars(data))``.

    Args:
        images: Images, undecoded.
        texts: The query text of each image.
        categories: The category of each pair, or ``None`` for a pair without one. Without such a column, ``None`` in place of the list.
    """

    images: Sequence[Any]
    texts: Sequence[str]
    categories: Sequence[str | None] | None


def load_karr_bench(folder: str | Path, *, split: str = "train", limit: int | None = None) -> KARRBenchSet:
    """Read KARR-Bench.

    Args:
        folder: The ``datasets`` folder ``coco_knowledge_bench_test``: parquet files, or what ``save_to_disk`` wrote.
            Columns ``image``, ``text``, and perhaps ``category``.
        split: The authors' name of the split.
        limit: Read so many pairs only. This lifts the check of the count: 2,915 pairs.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the count or the columns are others, or a text is empty.
    """
    require_limit(limit)
    folder = Path(folder)
    columns = read_columns(folder, split, ["image", "text"], _SOURCE, optional=["category"])
    require_count("pairs of KARR-Bench", len(columns["text"]), _PAIRS, limit)
    texts = columns["text"][:limit]
    if bad := [number for number, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"Row {bad[0]} of {folder} has the text {texts[bad[0]]!r}, but one query an image is needed.")
    categories = columns.get("category")
    pictures = [image_of(value, folder) for value in columns["image"][:limit]]
    return KARRBenchSet(pictures, texts, categories and categories[:limit])
