"""Columns of a training set that the trainer would misread: paths as texts, numbers as inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slq_embed.inputs.images import IMAGE_SUFFIXES

LABELS = ("label", "labels", "score", "scores")  # columns that the host does not encode

_TEXTS = ("string", "large_string")
_FIRST = 4


def require_inputs(dataset: Any, columns: Iterable[str] | None = None) -> None:
    """Refuse columns that hold no texts, images or both, and labels that are strings.

    Args:
        dataset: A dataset. One with a transform passes: its features are not those of the values.
        columns: The columns to encode; by default all but labels, which are looked at too.

    Raises:
        ValueError: If it is no dataset. If a column to encode holds numbers or lists of texts; or strings, if it is named for images or these name image files.
            Or if labels are strings.
    """
    if not hasattr(dataset, "column_names"):
        raise ValueError(
            f"The dataset is a {type(dataset).__name__}, but a Dataset of the package datasets is needed. Make one with "
            "Dataset.from_list or Dataset.from_pandas."
        )
    if dataset.format["type"] == "custom":
        return
    for name in dataset.column_names if columns is None else columns:
        feature = dataset.features[name]
        kind = str(getattr(feature, "dtype", None))
        if columns is None and name in LABELS:
            if kind in _TEXTS:
                raise ValueError(
                    f"The column {name!r} holds strings, but labels are numbers, because losses get a tensor. Number them with "
                    f"dataset.class_encode_column({name!r}). If these are texts to embed, rename the column."
                )
            continue
        if kind in _TEXTS and (name in ("image", "images") or _names_images(dataset, name)):
            raise ValueError(
                f"The column {name!r} holds strings. A str is always a text, so the model would learn the paths and not "
                f"the images. Open them with dataset.cast_column({name!r}, datasets.Image()), or read the dataset with "
                "slq_embed.data.from_dataset. If these are texts, rename the column, or give each as {'text': value}."
            )
        item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if str(getattr(item, "dtype", None)) in _TEXTS:
            raise ValueError(
                f"The column {name!r} holds lists of texts, but one input a row is needed. Split it into columns, such as "
                f"'{name}_1' and '{name}_2'."
            )
        if kind.startswith(("int", "uint", "float", "bool")):
            raise ValueError(
                f"The column {name!r} holds {kind}, but a column of texts or images is needed. Remove it with "
                f"dataset.remove_columns({name!r}). If equal numbers mark rows of one image, rename it to 'label'."
            )


def _names_images(dataset: Any, column: str) -> bool:
    """Whether the first texts of a column, if they are there at once, all end as names of image files do."""
    values = list(dataset.select_columns(column)[:_FIRST][column]) if hasattr(dataset, "__len__") else []
    return bool(values) and all(isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES) for value in values)
