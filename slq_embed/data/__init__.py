"""Image-text pairs, and a small generated world of coloured shapes."""

from slq_embed.data.pairs import (
    DistinctImageBatchSampler,
    ImageTextPairs,
    from_coco,
    from_dataset,
    from_folder,
    from_karpathy,
    from_records,
    retrieval_set,
)

__all__ = [
    "DistinctImageBatchSampler",
    "ImageTextPairs",
    "from_coco",
    "from_dataset",
    "from_folder",
    "from_karpathy",
    "from_records",
    "retrieval_set",
]
