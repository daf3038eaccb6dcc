"""Image-text pairs from folders, COCO and Karpathy JSON, and datasets, with images decoded when they are read."""

from __future__ import annotations

import csv
import io
import json
import logging
import reprlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value

from slq_embed.data.storage import dataset_of, stored_image
from slq_embed.inputs import Skipped, read_image, report
from slq_embed.inputs.identity import identity

logger = logging.getLogger(__name__)

FEATURES = Features({"image": Image(), "text": Value("string"), "label": Value("int64")})
"""Columns of a training set: an image, one of its captions, and the number of the image."""
_CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_CAPTIONS = ("captions", "text", "caption")
_OPTIONS = ("limit", "strict", "verify")
_REMEMBERED = 100_000
"""Images of a stream that are compared with a new one: memory must not grow with the stream."""


@dataclass
class ImageTextPairs:
    """A training set and what was left out of it.

    Args:
        dataset: Rows for the trainer, in the order of the columns that its losses expect. What reads captioned images
            gives ``image`` (decoded when read), ``text``, ``label``: one caption each. The label is the number of the
            image: it marks the captions of one image as siblings. An ``IterableDataset`` if the source was streamed.
        skipped: Records or rows that were left out, by name. If the source is streamed, the list grows while the dataset
            is read.
    """

    dataset: Dataset | IterableDataset
    skipped: list[Skipped] = field(default_factory=list)

    def report(self) -> str:
        """One line that counts the skipped records, and names the first 10."""
        return report(self.skipped)

    def __len__(self) -> int:
        return len(self.dataset)  # else the trainer asks for max_steps, where it needs .dataset

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"ImageTextPairs has no {name!r}. Its rows are in .dataset: pass pairs.dataset instead.")


@dataclass(frozen=True)
class _Record:
    name: str
    image: Any
    captions: tuple[Any, ...]
    same: Any = None  # what equal images share


def from_folder(folder: str | Path, captions: str | Path | None = None, **options: Any) -> ImageTextPairs:
    """Read a folder of images with a caption file.

    Args:
        folder: The folder that image paths are relative to.
        captions: A ``.jsonl`` file with ``image`` (or ``file_name``) and ``captions``, ``text`` or ``caption`` in each line, or a
            ``.csv`` file with such columns, one caption a row. A relative path is relative to the folder. By default
            ``captions.jsonl``, ``metadata.jsonl``, ``captions.csv`` or ``metadata.csv``.
        **options: ``split`` (only rows with this value of ``split``), ``limit`` (images), ``strict``, ``verify``; see
            :func:`from_records`.

    Raises:
        FileNotFoundError: If there is no caption file.
        ValueError: If the caption file cannot be read, or has no row of the split.
    """
    folder = Path(folder)
    candidates = [folder / name for name in ([captions] if captions else _CAPTION_FILES)]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"There is no caption file in {folder}. Looked for: {', '.join(map(str, candidates))}. "
            "Write one, or pass captions=..., relative to the folder."
        )
    text = _read_text(file)
    rows = _csv_rows(text, file) if file.suffix == ".csv" else _json_lines(text, file)
    split = options.pop("split", None)
    if split is not None:
        splits = sorted({str(row.get("split")) for row in rows} - {"None"})
        rows = [row for row in rows if row.get("split") == split]
        _require_rows(rows, split, splits, file)
    captions_of: dict[Path, list[Any]] = {}
    for row in rows:
        name = row.get("image") or row.get("file_name")
        if not name:
            raise ValueError(f"{file} has a row without 'image' or 'file_name': {reprlib.repr(row)}")
        value = next((row[key] for key in _CAPTIONS if key in row), None)
        captions_of.setdefault(Path(name), []).extend(value if isinstance(value, list) else [value])
    names = {name for row in rows for name in row}
    if names and names.isdisjoint(_CAPTIONS):
        raise ValueError(f"{file} has {sorted(names)}, but one of {_CAPTIONS} is needed for the captions.")
    return from_records(((str(name), folder / name, values) for name, values in captions_of.items()), **options)


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")  # Excel begins a CSV file with a mark that would be part of the first name
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _csv_rows(text: str, file: Path) -> list[dict[str, Any]]:
    rows: list[dict[Any, Any]] = list(csv.DictReader(io.StringIO(text)))
    if (longer := next((row for row in rows if None in row), None)) is not None:  # its caption would end at the comma
        raise ValueError(
            f"{file} has a row of more values than there are columns: {reprlib.repr(longer)}. Put a caption with a comma into "
            "quotes."
        )
    return rows


def _json_lines(text: str, file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{file} is not JSON in line {number}: {error}. Each line must be a JSON object."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{file} has a {type(row).__name__} in line {number}, but each line must be an object."
                )
            rows.append(row)
    return rows


def _require_rows(rows: list[Any], split: str, splits: Iterable[str], file: str | Path) -> None:
    if not rows:
        raise ValueError(f"{file} has no rows of the split {split!r}. Its splits are: {', '.join(splits) or 'none'}.")


def _annotations(file: str | Path, keys: Sequence[str], kind: str) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(Path(file)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{file} is no {kind} file: it needs the keys {', '.join(keys)}.")
    return content


def from_coco(annotations: str | Path, images: str | Path, **options: Any) -> ImageTextPairs:
    """Read a COCO captions file (``captions_train2017.json``).

    Args:
        annotations: The JSON file with ``images`` and ``annotations``.
        images: The folder of the image files.
        **options: See :func:`from_records`.

    Raises:
        ValueError: If the file is of another kind.
    """
    content = _annotations(annotations, ("images", "annotations"), "COCO captions")
    captions: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        if "caption" not in row:
            raise ValueError(
                f"{annotations} has annotations without a caption, such as COCO's boxes. Use captions_*.json."
            )
        captions.setdefault(row["image_id"], []).append(row["caption"])
    folder = Path(images)
    return from_records(
        ((row["file_name"], folder / row["file_name"], captions.get(row["id"], [])) for row in content["images"]),
        **options,
    )


def from_karpathy(
    annotations: str | Path, images: str | Path, split: str | None = None, **options: Any
) -> ImageTextPairs:
    """Read a Karpathy split file (``dataset_coco.json``, ``dataset_flickr30k.json``).

    Args:
        annotations: The JSON file.
        images: The folder of the image files. An image may name a folder below it (``filepath``, as COCO's do).
        split: ``"train"``, ``"val"``, ``"test"`` or ``"restval"``; by default all.
        **options: See :func:`from_records`.

    Raises:
        ValueError: If the file is of another kind, or has no image of the split.
    """
    rows = _annotations(annotations, ("images",), "Karpathy split")["images"]
    if any(not {"filename", "sentences"} <= set(row) for row in rows):
        raise ValueError(f"{annotations} is no Karpathy split file: each image needs 'filename' and 'sentences'.")
    if split is not None:
        splits = sorted({str(row.get("split")) for row in rows} - {"None"})
        rows = [row for row in rows if row.get("split") == split]
        _require_rows(rows, split, splits, annotations)
    records = (
        (
            row["filename"],
            Path(images) / row.get("filepath", "") / row["filename"],
            [sentence["raw"] for sentence in row["sentences"]],
        )
        for row in rows
    )
    return from_records(records, **options)


def from_dataset(
    dataset: Dataset | IterableDataset, image_column: str = "image", text_column: str = "text", **options: Any
) -> ImageTextPairs:
    """Read any dataset with an image and a text column; a text may be a list of captions.

    Rows with the same image, by its path, bytes or pixels, have one label. In a stream, an image is compared with the last
    100,000 images.

    Args:
        dataset: A dataset. If it is streamed, the pairs are streamed too.
        image_column: The column of images.
        text_column: The column of captions.
        **options: See :func:`from_records`.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If it is no dataset, but a dict of splits or a table, or a column is missing.
    """
    _require_known(options)
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, but a Dataset is needed. Choose a split of a DatasetDict, such as "
            'dataset["train"]; a DataFrame becomes one with datasets.Dataset.from_pandas.'
        )
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
        yield from _good_rows(records(), pairs.skipped, remembered=_REMEMBERED, **options)
        if pairs.skipped:
            logger.warning("Streamed image-text pairs: %s", pairs.report())

    pairs.dataset = IterableDataset.from_generator(generate, features=FEATURES)
    return pairs


def from_records(records: Iterable[tuple[str, Any, Any]], **options: Any) -> ImageTextPairs:
    """Build pairs from names, images and captions. Records with the same image, by its path, bytes or pixels, have one label.

    Args:
        records: Name, image (path, bytes, PIL image, or what ``datasets`` gives undecoded) and captions (a str or
            several). Images that are no paths are held in memory, once a caption.
        **options: ``limit``: the most records to read. ``strict``: raise an error at the first bad record instead of
            skipping it. ``verify``: decode each image once now, so that a bad image does not stop the training later
            (the default).

    Returns:
        The pairs. Bad images and empty captions are skipped and listed, and a warning names the first of them.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If a record has other parts, ``strict`` and a record is bad, no record is good, or ``limit`` is below 1.
    """
    _require_known(options)
    skipped: list[Skipped] = []
    dataset = dataset_of(_good_rows(records, skipped, **options), FEATURES)
    if dataset is None:
        raise ValueError(
            f"No image-text pair is left: {report(skipped)}."
            if skipped
            else "There are no records, but at least one image with a caption is needed."
        )
    pairs = ImageTextPairs(dataset, skipped)
    if skipped:
        logger.warning("Image-text pairs: %s", pairs.report())
    return pairs


def _require_known(options: Iterable[str]) -> None:
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise TypeError(
            f"There is no option {unknown[0]!r}. The options are {', '.join(_OPTIONS)}; from_folder has split."
        )


def _good_rows(
    records: Iterable[tuple[str, Any, Any]],
    skipped: list[Skipped],
    *,
    limit: int | None = None,
    strict: bool = False,
    verify: bool = True,
    remembered: int | None = None,
) -> Iterator[dict[str, Any]]:
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but at least 1 is needed. Leave it out to read all images.")

    def check(values: tuple[str, Any, Any]) -> tuple[_Record, str | None]:
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ValueError(
                f"A record is {reprlib.repr(values)}, but a name, an image and its captions are needed, such as "
                '("cat", Path("cat.jpg"), ["a cat"]).'
            )
        name, image, captions = values
        record = _Record(name, None, tuple(captions) if isinstance(captions, list | tuple) else (captions,))
        try:
            if verify:
                read_image(image)
            stored = stored_image(image)
            return replace(record, image=stored, same=identity(stored)), None
        except ValueError as error:
            return record, str(error)

    def skip(name: str, reason: str) -> None:
        if strict:
            raise ValueError(f"{name}: {reason}")
        skipped.append(Skipped(name, reason))

    labels: OrderedDict[Any, int] = OrderedDict()  # a dict finds its first key slowly, once many were removed
    images = 0
    waiting = iter(records if limit is None else islice(records, limit))
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(waiting, 256)):  # bounded, so that a stream is never read ahead as a whole
            for record, problem in pool.map(check, chunk):
                if problem is not None:
                    skip(record.name, problem)
                    continue
                captions = [caption for caption in record.captions if isinstance(caption, str) and caption.strip()]
                for number, caption in enumerate(record.captions):
                    if caption not in captions:
                        skip(record.name, _caption_problem(caption, number))
                if not record.captions:
                    skip(record.name, "no caption")
                if not captions:
                    continue
                label = labels.setdefault(record.same, images)
                images += label == images
                if remembered is not None and len(labels) > remembered:
                    labels.popitem(last=False)
                for caption in captions:
                    yield {"image": record.image, "text": caption, "label": label}


def _caption_problem(caption: Any, number: int) -> str:
    if caption is None:
        return "no caption"
    if isinstance(caption, str):
        return f"caption {number} is empty"
    return f"caption {number} is a {type(caption).__name__}, but a str is needed"


def retrieval_set(pairs: ImageTextPairs | Dataset) -> tuple[list[dict[str, Any]], list[str], list[int]]:
    """Split pairs into distinct images, all texts, and for each text the index of its image.

    Args:
        pairs: The pairs, or their dataset: it has the columns ``image``, ``text`` and ``label``.

    Returns:
        Arguments for :class:`slq_embed.evaluation.ImageTextRetrievalEvaluator`. The images are undecoded, as dicts of ``bytes``
        and ``path``: thousands of decoded ones would fill the memory.

    Raises:
        ValueError: If the pairs are streamed, or are no pairs.
    """
    dataset = pairs.dataset if isinstance(pairs, ImageTextPairs) else pairs
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "An evaluation needs all pairs at once, but these are streamed. Load the dataset without streaming."
        )
    if not isinstance(dataset, Dataset) or not set(FEATURES) <= set(dataset.column_names):
        has = f"the columns {dataset.column_names}" if isinstance(dataset, Dataset) else f"a {type(dataset).__name__}"
        raise ValueError(
            f"The pairs are {has}, but image-text pairs are needed, with the columns {list(FEATURES)}. Read them with "
            "from_folder or from_dataset."
        )
    labels = np.asarray(dataset["label"])
    _, first_rows, image_of = np.unique(labels, return_index=True, return_inverse=True)
    images = dataset.select(first_rows).cast_column("image", Image(decode=False))["image"]
    return list(images), list(dataset["text"]), image_of.tolist()
