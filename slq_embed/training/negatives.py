"""Hard negatives from a training set: what the model takes for a match and is none, as further columns of each row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.protocol import Task
from slq_embed.encoding.stream import collect, stream
from slq_embed.index.faiss_index import FaissIndex
from slq_embed.inputs import Skipped
from slq_embed.inputs.columns import require_inputs
from slq_embed.inputs.identity import identity
from slq_embed.training.read_rows import ReadRows

if TYPE_CHECKING:
    from datasets import Dataset

    from slq_embed.data import ImageTextPairs

logger = logging.getLogger(__name__)

_ANCHORS_A_SEARCH = 1024
_ROWS_A_READ = 256


def mine_negatives(
    model: SLQEncoder,
    pairs: ImageTextPairs | Dataset,
    *,
    anchor: str = "text",
    positive: str = "image",
    num_negatives: int = 3,
    range_min: int = 0,
    range_max: int | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    duplicate_score: float | None = 0.95,
    factory: str = "Flat",
    search_parameters: str = "",
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> ImageTextPairs:
    """Find the nearest wrong candidates of each anchor.

    The candidates are the distinct values of the ``positive`` column. What belongs to the anchor is none of its
    negatives: candidates of rows with its label or with an equal anchor, and one that is the anchor itself. For text alone,
    ``sentence_transformers.util.mine_hard_negatives`` does the same without labels; it cannot take images. The embeddings
    of all distinct values are held in memory; searches and scores are made for some anchors at a time.

    Args:
        model: The encoder whose mistakes are wanted: a trained one.
        pairs: Image-text pairs, or any dataset that is not streamed. Without a column ``label``, rows with an equal
            anchor belong together.
        anchor: The column that searches: texts, images, or both.
        positive: The column that is searched.
        num_negatives: Negatives of each row.
        range_min: How many of an anchor's nearest candidates to pass over. Its own do not count.
        range_max: How many of them to look at; by default ``range_min + 10 * num_negatives``.
        absolute_margin: A negative scores at least so much less than the anchor's lowest positive.
        relative_margin: The same, as a share of that positive's score. 0.05 is a good value for texts, by
            arXiv:2407.15831.
        duplicate_score: A candidate with a higher cosine to one of the anchor's positives counts as a near duplicate of
            it, and is no negative; ``None`` for no limit.
        factory: FAISS's name of the index type, as for :class:`~slq_embed.index.EmbeddingIndex`.
        search_parameters: FAISS's search-time settings.
        batch_size: Inputs a batch.
        show_progress_bar: Whether to show one while encoding.

    Returns:
        Rows ``anchor``, ``positive``, ``negative_1``, ..., ``label``. A row whose input cannot be read, or that has too
        few negatives, is left out and listed. Images are read from ``pairs`` when a batch is read.

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If an argument does not fit, the pairs are streamed, or no row is left.
    """
    from slq_embed.data import ImageTextPairs

    range_max = range_min + 10 * num_negatives if range_max is None else range_max
    if num_negatives < 1 or range_min < 0 or range_max - range_min < num_negatives:
        raise ValueError(
            f"{num_negatives} negatives are wanted from ranks {range_min} to {range_max}, but at least 1 is needed, and "
            "as many ranks as negatives."
        )
    dataset = _checked(pairs, anchor, positive)
    anchors, anchor_of, searching = _distinct(dataset, anchor)
    candidates, candidate_of, searched = _distinct(dataset, positive)
    labels = anchor_of if "label" not in dataset.column_names else np.asarray(dataset["label"])
    # Before the long work: FAISS may be missing, or have no such type.
    index = FaissIndex(factory, int(model.get_embedding_dimension() or 0), search_parameters)
    encoding: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    queries, bad_anchors = _encode(model, dataset, anchor, anchors, "query", **encoding)
    vectors, bad_candidates = _encode(model, dataset, positive, candidates, "document", **encoding)
    itself = [searched.get(value) for value in searching]
    positives = _positives(anchor_of, candidate_of, labels, itself)
    readable = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    index = _filled(index, vectors, readable)

    chosen: dict[int, NDArray[np.int64]] = {}
    for start in range(0, len(anchors), _ANCHORS_A_SEARCH):
        chunk = range(start, min(start + _ANCHORS_A_SEARCH, len(anchors)))
        own = [np.intersect1d(positives[number], readable) for number in chunk]
        k = max(1, min(len(readable), range_max + max(map(len, own))))
        _, hits = index.search(queries[chunk.start : chunk.stop], k)
        for number, mine, row in zip(chunk, own, hits, strict=True):
            found = readable[row[row >= 0]]
            found = found[~np.isin(found, mine)][range_min:range_max]
            if len(mine) and len(found):
                scores, to_positives = vectors[found] @ queries[number], vectors[found] @ vectors[mine].T
                lowest = float((vectors[mine] @ queries[number]).min())
                keep = np.ones(len(found), bool)
                if absolute_margin is not None:
                    keep &= scores <= lowest - absolute_margin
                if relative_margin is not None:
                    keep &= scores <= lowest - abs(lowest) * relative_margin
                if duplicate_score is not None:
                    keep &= to_positives.max(axis=1) <= duplicate_score
                found = found[keep]
            chosen[number] = found[:num_negatives]

    rows, used, negatives, skipped = [], [], [], []
    for row, (a, c) in enumerate(zip(anchor_of.tolist(), candidate_of.tolist(), strict=True)):
        if (reason := bad_anchors.get(a) or bad_candidates.get(c)) is not None:
            skipped.append(Skipped(f"row {row}", reason, row))
        elif (count := len(chosen[a])) < num_negatives:
            skipped.append(Skipped(f"row {row}", f"{count} of {num_negatives} negatives found", row))
        else:
            rows.append(row)
            used.append((anchors[a], candidates[c]))
            negatives.append(candidates[chosen[a]])
    if not rows:
        raise ValueError(
            f"No row has {num_negatives} negatives: the first is {skipped[0].name} ({skipped[0].reason}). Raise range_max "
            f"({range_max}) or duplicate_score ({duplicate_score}), lower the margins, or mine with a trained model."
            if skipped
            else "The dataset has no rows, but negatives are chosen from them."
        )
    if skipped:
        logger.warning(
            "Negatives: %d of %d rows are left out; the first is %s (%s). ImageTextPairs.skipped lists them.",
            len(skipped),
            len(dataset),
            skipped[0].name,
            skipped[0].reason,
        )
    return ImageTextPairs(
        _as_dataset(dataset, anchor, positive, np.array(used), np.stack(negatives), labels[rows]), skipped
    )


def _checked(pairs: ImageTextPairs | Dataset, anchor: str, positive: str) -> Dataset:
    from datasets import Dataset

    dataset = pairs if isinstance(pairs, Dataset) else getattr(pairs, "dataset", pairs)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The pairs are a {type(dataset).__name__}, but negatives are chosen from all rows: pass a Dataset that is not "
            "streamed."
        )
    if missing := {anchor, positive} - set(dataset.column_names):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names}, but {', '.join(map(repr, sorted(missing)))} is needed. "
            "Pass anchor=... and positive=..."
        )
    require_inputs(dataset, (anchor, positive))
    return dataset.with_format(None)


def _values(dataset: Dataset, column: str, rows: Sequence[int] | NDArray[np.int64] | None = None) -> Iterator[Any]:
    """Values of a column as they are stored: images are not decoded."""
    stored = dataset.select_columns(column).with_format("arrow")
    numbers = range(len(dataset)) if rows is None else rows
    for start in range(0, len(numbers), _ROWS_A_READ):
        yield from stored[[int(row) for row in numbers[start : start + _ROWS_A_READ]]][column].to_pylist()


def _distinct(dataset: Dataset, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[Any, int]]:
    """The first row of each distinct value, for each row which of them it holds, and their numbers by what they are."""
    numbers: dict[Any, int] = {}
    first: list[int] = []
    of: list[int] = []
    for row, value in enumerate(_values(dataset, column)):
        number = numbers.setdefault(identity(value), len(numbers))
        if number == len(first):
            first.append(row)
        of.append(number)
    return np.array(first, np.int64), np.array(of, np.int64), numbers


def _encode(
    model: SLQEncoder, dataset: Dataset, column: str, rows: NDArray[np.int64], task: Task, **settings: Any
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Normalised embeddings of some rows, NaN where one cannot be read, and the reasons for those."""
    skipped: list[Skipped] = []
    batches = stream(
        model,
        enumerate(_values(dataset, column, rows)),
        task=task,
        normalize_embeddings=True,
        total=len(rows),
        **settings,
    )
    found = collect(batches, len(rows), True, skipped)
    width = int(model.get_embedding_dimension() or 0)
    embeddings = found.float().numpy() if found.numel() else np.full((len(rows), width), np.nan, np.float32)
    return embeddings, {entry.index: f"{column}: {entry.reason}" for entry in skipped if entry.index is not None}


def _positives(
    anchor_of: NDArray[np.int64], candidate_of: NDArray[np.int64], labels: NDArray[Any], itself: Sequence[int | None]
) -> list[NDArray[np.int64]]:
    """For each anchor the candidates of all rows that share a label with one of its rows, and the candidate that it is itself."""
    by_label: dict[Any, set[int]] = {}
    of_anchor: dict[int, set[Any]] = {}
    for a, c, label in zip(anchor_of.tolist(), candidate_of.tolist(), labels.tolist(), strict=True):
        by_label.setdefault(label, set()).add(c)
        of_anchor.setdefault(a, set()).add(label)
    own = [set().union(*(by_label[label] for label in of_anchor[a])) for a in range(len(of_anchor))]
    for candidates, same in zip(own, itself, strict=True):
        if same is not None:
            candidates.add(same)
    return [np.array(sorted(candidates), np.int64) for candidates in own]


def _filled(index: FaissIndex, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> FaissIndex:
    for start in range(0, len(rows), _ANCHORS_A_SEARCH):
        index.add(vectors[rows[start : start + _ANCHORS_A_SEARCH]])
    if index.can_learn_from(len(rows)):
        index = index.learned(np.arange(len(rows))) or index
    return index


def _as_dataset(
    dataset: Dataset,
    anchor: str,
    positive: str,
    pairs: NDArray[np.int64],
    negatives: NDArray[np.int64],
    labels: NDArray[Any],
) -> Dataset:
    """Rows of numbers. Equal values have the same number."""
    from datasets import Dataset

    searched = {f"negative_{number}": column for number, column in enumerate(negatives.T, start=1)}
    numbers = {"anchor": pairs[:, 0], "positive": pairs[:, 1], **searched}
    queries, values = dataset.select_columns(anchor), dataset.select_columns(positive)
    sources = {name: queries if name == "anchor" else values for name in numbers}
    return Dataset.from_dict({**numbers, "label": labels}).with_transform(ReadRows(sources))
