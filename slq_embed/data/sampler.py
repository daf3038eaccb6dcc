"""Batches without two captions of one image."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from slq_embed.inputs.columns import require_inputs


class DistinctImageBatchSampler(NoDuplicatesBatchSampler):
    """Batches without two captions of one image: for losses to which every other row is a negative.

    Pass the class as ``batch_sampler`` of ``SentenceTransformerTrainingArguments``. Its own
    ``NO_DUPLICATES`` would decode every image to compare them; this compares the ``label`` column.

    Raises:
        ValueError: If the dataset has no column ``label``, or a column that the trainer would misread.
    """

    def __init__(self, dataset: Dataset, *args: Any, **kwargs: Any) -> None:
        if "label" not in dataset.column_names:
            raise ValueError(
                f"The dataset has the columns {dataset.column_names}, but DistinctImageBatchSampler needs 'label': equal "
                "numbers mark rows of one image. from_folder and from_dataset add it. Or leave the sampler out."
            )
        require_inputs(dataset)
        # Renamed, because the host drops label columns before it compares.
        super().__init__(dataset.select_columns("label").rename_column("label", "image"), *args, **kwargs)
