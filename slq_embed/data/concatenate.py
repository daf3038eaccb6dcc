"""Training sets put one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, concatenate_datasets

from slq_embed.data.pairs import ImageTextPairs


def concatenate_pairs(parts: Sequence[ImageTextPairs]) -> ImageTextPairs:
    """Put training sets one after the other. Each numbers its images from 0, so labels are counted on from set to set.

    ``concatenate_datasets`` of the datasets alone would give one label to an image of each set.

    Args:
        parts: Pairs with the columns ``image``, ``text`` and ``label``, not streamed.

    Raises:
        ValueError: If there is no set, or one is streamed, has no labels, or has a transform.
    """
    datasets, skipped, first = [], [], 0
    for number, pairs in enumerate(parts):
        rows = pairs.dataset
        if not isinstance(rows, Dataset) or "label" not in rows.column_names:
            raise ValueError(
                f"Set {number} of {len(parts)} is streamed or has no labels. Read it with from_folder or from_dataset."
            )
        if rows.format["type"] == "custom":
            raise ValueError(
                f"Set {number} of {len(parts)} has a transform, as mine_negatives gives it, which would be lost: its rows "
                "would be numbers. Concatenate first, and mine then."
            )
        labels = [label + first for label in rows["label"]]
        feature, order = rows.features["label"], rows.column_names
        datasets.append(rows.remove_columns("label").add_column("label", labels, feature=feature).select_columns(order))
        first = max([first, *(label + 1 for label in labels)])
        skipped += pairs.skipped
    if not datasets:
        raise ValueError("There is no set to concatenate. Pass a list of ImageTextPairs.")
    return ImageTextPairs(concatenate_datasets(datasets), skipped)
