"""MMEB: the rows to train on, and the 36 tasks to measure on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value

from slq_embed.data.pairs import ImageTextPairs
from slq_embed.data.published import locate, read_columns, require_count, require_limit
from slq_embed.evaluation.mmeb import MMEB_TASKS, MMEBTask
from slq_embed.inputs import Skipped, report

logger = logging.getLogger(__name__)

_ROWS = 1000
_PLACEHOLDER = "<|image_1|>"
_EVAL, _TRAIN = "TIGER-Lab/MMEB-eval", "TIGER-Lab/MMEB-train"
_INPUT = Features({"image": Image(), "text": Value("string")})


def load_mmeb_eval(
    folder: str | Path,
    tasks: Iterable[str] = MMEB_TASKS,
    *,
    images: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, MMEBTask]:
    """Read tasks of MMEB v1 for :class:`~slq_embed.evaluation.MMEBEvaluator`.

    Args:
        folder: A copy of ``TIGER-Lab/MMEB-eval``: a folder of parquet files for each task, and the unpacked
            ``images.zip`` in ``images``, ``eval_images``, or beside them.
        tasks: Their names; by default all 36.
        images: The folder of the images, if elsewhere.
        limit: Read so many rows a task, with all their candidates. This lifts the check of the count: 1,000 rows a task.

    Returns:
        Tasks by name. Each distinct query and candidate is there once.

    Raises:
        FileNotFoundError: If a file is missing; the message says where it is published.
        ValueError: If a name is not one of MMEB's, or the counts or columns are others.
    """
    require_limit(limit)
    folder, tasks = Path(folder), list(tasks)
    if unknown := sorted(set(tasks) - set(MMEB_TASKS)):
        raise ValueError(f"MMEB has no task {', '.join(unknown)}. It has: {', '.join(MMEB_TASKS)}.")
    if missing := [task for task in tasks if not (folder / task).is_dir()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(tasks)} tasks are missing in {folder}: {', '.join(missing)}. They are published as "
            f"{_EVAL}; pass tasks=[...] to measure on some of them."
        )
    roots = [Path(images)] if images else [folder / name for name in ("images", "eval_images", ".")]
    return {task: _read_task(folder / task, roots, limit) for task in tasks}


def _read_task(folder: Path, roots: Sequence[Path], limit: int | None) -> MMEBTask:
    names = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
    columns = read_columns(folder, "test", names, _EVAL, optional=["qry_inst"])
    if "qry_inst" in columns:
        raise ValueError(f"{folder} holds rows of MMEB v2, with instructions of their own. MMEB v1 is {_EVAL}.")
    require_count(f"rows of {folder.name}", len(columns["qry_text"]), _ROWS, limit)
    queries = list(zip(columns["qry_text"], columns["qry_img_path"], strict=True))[:limit]
    candidates: dict[tuple[str, str], int] = {}
    own = []
    for number, (texts, paths) in enumerate(zip(columns["tgt_text"][:limit], columns["tgt_img_path"], strict=False)):
        if not isinstance(texts, list) or not texts or not isinstance(paths, list) or len(paths) != len(texts):
            raise ValueError(
                f"Row {number} of {folder} has other numbers of texts and images for its candidates: tgt_text and "
                "tgt_img_path must be lists of one length."
            )
        # Many rows of a thousand numbers: an array takes a tenth of a list.
        own.append(
            np.array([candidates.setdefault(key, len(candidates)) for key in zip(texts, paths, strict=True)], np.int32)
        )
    paths = {path for _, path in (*queries, *candidates) if path}
    located = dict(
        zip(sorted(paths), locate(sorted(paths), roots, f"images.zip of {_EVAL}") if paths else [], strict=True)
    )
    return MMEBTask(
        [_input(*key, located, f"{folder}, row {n}") for n, key in enumerate(queries)],
        [_input(*key, located, f"{folder}, a candidate") for key in candidates],
        own,
    )


def _input(text: str | None, path: str | None, located: dict[str, Path], where: str) -> dict[str, Any]:
    text = (text or "").replace(_PLACEHOLDER, "").strip()
    if not text and not path:
        raise ValueError(f"{where}, has neither a text nor an image.")
    return {**({"image": located[path]} if path else {}), **({"text": text} if text else {})}


def load_mmeb_train(
    folder: str | Path,
    task: str,
    split: str = "original",
    *,
    images: str | Path | None = None,
    limit: int | None = None,
) -> ImageTextPairs:
    """Read one set of MMEB-train for ``SentenceTransformerTrainer``.

    Args:
        folder: A copy of ``TIGER-Lab/MMEB-train``: a folder of parquet files for each set, and the unpacked archives of
            ``images_zip`` in ``images`` or beside them.
        task: The set, such as ``"MSCOCO_t2i"``.
        split: ``"original"`` or ``"diverse_instruction"``.
        images: The folder that the paths of the rows are relative to, if elsewhere.
        limit: Read so many rows only.

    Returns:
        Rows ``anchor``, ``positive``, and ``negative`` if every row has one; each is an input with ``image`` and
        ``text``, either of which may be ``None``. Rows whose image is missing or which hold nothing are skipped and
        listed.

    Raises:
        FileNotFoundError: If there is no such set.
        ValueError: If a column is missing, or no row is left.
    """
    require_limit(limit)
    folder = Path(folder)
    roles = {"anchor": ("qry", "qry_image_path"), "positive": ("pos_text", "pos_image_path")}
    negative = ("neg_text", "neg_image_path")
    needed = [column for pair in roles.values() for column in pair]
    columns = read_columns(folder / task, split, needed, _TRAIN, optional=negative)
    if all(name in columns for name in negative) and all(
        isinstance(text, str) and (text or path)
        for text, path in zip(*(columns[name] for name in negative), strict=True)
    ):
        roles["negative"] = negative
    roots = [Path(images)] if images else [folder, folder / "images"]
    rows, skipped = [], []
    for number in range(len(columns["qry"][:limit])):
        row = {}
        try:
            for role, (text, path) in roles.items():
                row[role] = _training_input(columns[text][number], columns[path][number], roots)
        except ValueError as error:
            skipped.append(Skipped(f"row {number}", str(error), number))
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"No row of {folder / task} is left: {report(skipped)}. The images are published as {_TRAIN}.")
    if skipped:
        logger.warning("MMEB-train, %s: %s", task, report(skipped))
    return ImageTextPairs(Dataset.from_list(rows, Features(dict.fromkeys(roles, _INPUT))), skipped)


def _training_input(text: str | None, path: str | None, roots: Sequence[Path]) -> dict[str, str | None]:
    text = (text or "").replace(_PLACEHOLDER, "").strip()
    if not text and not path:
        raise ValueError("neither a text nor an image")
    file = next((str(root / path) for root in roots if (root / path).is_file()), None) if path else None
    if path and file is None:
        raise ValueError(f"there is no image {path}")
    return {"image": file, "text": text or None}
