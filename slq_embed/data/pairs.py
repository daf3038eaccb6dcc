"""Image-text pairs from folders, COCO and Karpathy JSON, and datasets, with images decoded when they are read."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from slq_embed.inputs import Skipped, read_image

logger = logging.getLogger(__name__)

FEATURES = Features({"image": Image(), "text": Value("string"), "label": Value("int64")})
"""Columns of a training set: an image, one of its captions, and the number of the image."""


@dataclass
class ImageTextPairs:
    """A training set and what was left out of it.

    Args:
        dataset: Rows ``image`` (decoded when read), ``text``, ``label``: one caption each. The label is the
            number of the image, so that captions of one image are known to be siblings. An ``IterableDataset``
            where the source was streamed.
        skipped: Bad records, by name. Of a streamed source, it grows while the dataset is read.
    """

    dataset: Dataset | IterableDataset
    skipped: list[Skipped] = field(default_factory=list)

    def report(self) -> str:
        """A line on what was left out, with every name."""
        if not self.skipped:
            return "nothing was skipped"
        names = "; ".join(f"{record.name} ({record.reason})" for record in self.skipped)
        return f"{len(self.skipped)} skipped: {names}"


@dataclass(frozen=True)
class _Record:
    name: str
    image: Any
    captions: tuple[Any, ...]


def from_folder(folder: str | Path, captions: str | Path | None = None, **options: Any) -> ImageTextPairs:
    """Read a folder of images with a caption file.

    Args:
        folder: The folder that image paths are relative to.
        captions: A ``.jsonl`` file with ``image`` (or ``file_name``) and ``captions`` or ``text`` in each
            line, or a ``.csv`` file with such columns, one caption a row; by default ``captions.jsonl``,
            ``metadata.jsonl``, ``captions.csv`` or ``metadata.csv`` in the folder.
        **options: ``split`` (keep rows whose ``split`` it is), ``limit`` (images), ``strict``, ``verify``; see
            :func:`from_records`.

    Raises:
        FileNotFoundError: If there is no caption file.
    """
    folder = Path(folder)
    names = [captions] if captions else ["captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no caption file. Looked for: {', '.join(map(str, names))}.")
    text = found[0].read_text("utf8")
    rows = list(csv.DictReader(io.StringIO(text))) if found[0].suffix == ".csv" else _json_lines(text)
    wanted = options.pop("split", None)
    grouped: dict[str, list[Any]] = {}
    for row in rows:
        name = row.get("image") or row.get("file_name")
        if not name:
            raise ValueError(f"{found[0]} has a row without 'image' or 'file_name': {row}")
        if wanted is None or row.get("split") == wanted:
            said = row.get("captions", row.get("text", row.get("caption")))
            grouped.setdefault(name, []).extend(said if isinstance(said, list) else [said])
    return from_records(((name, folder / name, said) for name, said in grouped.items()), **options)


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def from_coco(annotations: str | Path, images: str | Path, **options: Any) -> ImageTextPairs:
    """Read a COCO captions file (``captions_train2017.json``).

    Args:
        annotations: The JSON file with ``images`` and ``annotations``.
        images: The folder of the image files.
        **options: See :func:`from_records`.
    """
    content = json.loads(Path(annotations).read_text("utf8"))
    said: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        said.setdefault(annotation["image_id"], []).append(annotation["caption"])
    rows = ((row["file_name"], Path(images) / row["file_name"], said.get(row["id"], [])) for row in content["images"])
    return from_records(rows, **options)


def from_karpathy(
    annotations: str | Path, images: str | Path, split: str | None = None, **options: Any
) -> ImageTextPairs:
    """Read a Karpathy split file (``dataset_coco.json``, ``dataset_flickr30k.json``).

    Args:
        annotations: The JSON file.
        images: The folder of the image files; COCO's ``filepath`` is respected.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"restval"``; by default all.
        **options: See :func:`from_records`.
    """
    content = json.loads(Path(annotations).read_text("utf8"))
    rows = (
        (
            row["filename"],
            Path(images) / row.get("filepath", "") / row["filename"],
            [s["raw"] for s in row["sentences"]],
        )
        for row in content["images"]
        if split is None or row["split"] == split
    )
    return from_records(rows, **options)


def from_dataset(
    dataset: Dataset | IterableDataset, image_column: str = "image", text_column: str = "text", **options: Any
) -> ImageTextPairs:
    """Read any dataset with an image and a text column; a text may be a list of captions.

    Args:
        dataset: From the hub or elsewhere. A streamed one stays streamed.
        image_column: Its images.
        text_column: Its captions.
        **options: See :func:`from_records`.

    Raises:
        ValueError: If a column is missing.
    """
    for column in (image_column, text_column):
        if column not in (dataset.column_names or [column]):
            raise ValueError(f"The dataset has the columns {dataset.column_names}, but {column!r} is needed.")
    if isinstance((dataset.features or {}).get(image_column), Image):
        dataset = dataset.cast_column(image_column, Image(decode=False))  # a bad image must not stop the others

    def records() -> Iterator[tuple[str, Any, Any]]:
        return ((f"row {number}", row[image_column], row[text_column]) for number, row in enumerate(dataset))

    if not isinstance(dataset, IterableDataset):
        return from_records(records(), **options)
    pairs = ImageTextPairs(dataset)

    def generate() -> Iterator[dict[str, Any]]:
        pairs.skipped.clear()
        yield from _good_rows(records(), pairs.skipped, **options)
        if pairs.skipped:
            logger.warning("Streamed image-text pairs: %s", pairs.report())

    pairs.dataset = IterableDataset.from_generator(generate, features=FEATURES)
    return pairs


def from_records(records: Iterable[tuple[str, Any, Any]], **options: Any) -> ImageTextPairs:
    """Build pairs from names, images and captions.

    Args:
        records: Name, image (path, bytes, PIL image, or what ``datasets`` gives undecoded) and captions (a str or
            several).
        **options: ``limit``: read no more than so many images. ``strict``: raise at the first bad record
            instead of skipping it. ``verify``: decode each image once now (the default), so that no bad one stops
            the training later.

    Returns:
        The pairs; bad images and empty captions are skipped and listed, and a warning names them.

    Raises:
        ValueError: If ``strict`` and a record is bad, or no record is good.
    """
    skipped: list[Skipped] = []
    rows = list(_good_rows(records, skipped, **options))
    pairs = ImageTextPairs(Dataset.from_list(rows, features=FEATURES if rows else None), skipped)
    if not rows:
        raise ValueError(f"No image-text pair is left: {pairs.report()}.")
    if skipped:
        logger.warning("Image-text pairs: %s", pairs.report())
    return pairs


def _good_rows(
    records: Iterable[tuple[str, Any, Any]],
    skipped: list[Skipped],
    *,
    limit: int | None = None,
    strict: bool = False,
    verify: bool = True,
) -> Iterator[dict[str, Any]]:
    def check(record: tuple[str, Any, Any]) -> tuple[_Record, str | None]:
        name, image, said = record
        found = _Record(name, image, tuple(said) if isinstance(said, list | tuple) else (said,))
        try:
            if verify:
                read_image(image)
        except ValueError as error:
            return found, str(error)
        return found, None

    def skip(name: str, reason: str) -> None:
        if strict:
            raise ValueError(f"{name}: {reason}")
        skipped.append(Skipped(name, reason))

    label = 0
    waiting = iter(records if limit is None else islice(records, limit))
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(waiting, 256)):  # bounded, so that a stream is never read ahead as a whole
            for record, problem in pool.map(check, chunk):
                if problem is not None:
                    skip(record.name, problem)
                    continue
                good = [said for said in record.captions if isinstance(said, str) and said.strip()]
                for number, said in enumerate(record.captions):
                    if said not in good:
                        skip(record.name, f"caption {number} is empty" if record.captions != (None,) else "no caption")
                if not record.captions:
                    skip(record.name, "no caption")
                for said in good:
                    yield {"image": _storable(record.image), "text": said, "label": label}
                label += bool(good)


def _storable(image: Any) -> Any:
    return str(image) if isinstance(image, Path) else {"bytes": image} if isinstance(image, bytes) else image


def retrieval_set(pairs: ImageTextPairs) -> tuple[list[PILImage.Image], list[str], list[int]]:
    """Split pairs into distinct images, all texts, and for each text the number of its image.

    Returns:
        Arguments for :class:`slq_embed.evaluation.ImageTextRetrievalEvaluator`.

    Raises:
        ValueError: If the pairs are streamed.
    """
    if isinstance(pairs.dataset, IterableDataset):
        raise ValueError("An evaluation needs all of its pairs at once: load the dataset without streaming.")
    labels = np.asarray(pairs.dataset["label"])
    _, first_rows, image_of = np.unique(labels, return_index=True, return_inverse=True)
    images = [read_image(row["image"]) for row in pairs.dataset.select(first_rows)]
    return images, list(pairs.dataset["text"]), image_of.tolist()


class DistinctImageBatchSampler(NoDuplicatesBatchSampler):
    """Batches without two captions of one image, for losses that take every other row as a negative.

    Pass the class as ``batch_sampler`` of ``SentenceTransformerTrainingArguments``. The host's own
    ``NO_DUPLICATES`` would decode every image to compare them; this compares the ``label`` column.
    """

    def __init__(self, dataset: Dataset, *args: Any, **kwargs: Any) -> None:
        # Renamed, because the host drops label columns before it compares.
        super().__init__(dataset.select_columns("label").rename_column("label", "image"), *args, **kwargs)
