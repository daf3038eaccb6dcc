"""Columns of a training set that the trainer would misread: paths as texts, numbers as inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LABELS = ("label", "labels", "score", "scores")  # columns that the host does not encode


def require_inputs(dataset: Any, columns: Iterable[str] | None = None) -> None:
    """Refuse columns that hold no texts, images or both.

    Args:
        dataset: A dataset. One with a transform passes: its features are not those of the values.
        columns: The columns to encode; by default all but labels.

    Raises:
        ValueError: If a column holds numbers, or one that is named for images holds strings.
    """
    if dataset.format["type"] == "custom":
        return
    for name in [name for name in dataset.column_names if name not in LABELS] if columns is None else columns:
        kind = str(getattr(dataset.features[name], "dtype", None))
        if name in ("image", "images") and kind in ("string", "large_string"):
            raise ValueError(
                f"The column {name!r} holds strings. A str is always a text, so the model would learn the paths and not "
                f"the images. Open them with dataset.cast_column({name!r}, datasets.Image()), or read the dataset with "
                "slq_embed.data.from_dataset. If these are texts, rename the column."
            )
        if kind.startswith(("int", "uint", "float", "bool")):
            raise ValueError(
                f"The column {name!r} holds {kind}, but a column of texts or images is needed. Remove it with "
                f"dataset.remove_columns({name!r}). If equal numbers mark rows of one image, rename it to 'label'."
            )
