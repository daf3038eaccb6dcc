"""Image-text pairs to train on, and benchmarks as they are published."""

try:
    import datasets  # noqa: F401
except ImportError as error:
    raise ImportError("slq_embed.data needs datasets. Install it: pip install 'slq-embed[train]'.") from error

from slq_embed.data.caption_sets import RetrievalSet, load_coco, load_flickr30k
from slq_embed.data.cirr import CIRRSet, load_cirr
from slq_embed.data.concatenate import concatenate_pairs
from slq_embed.data.fashion_iq import FashionIQSet, load_fashion_iq
from slq_embed.data.karr_bench import KARRBenchSet, load_karr_bench
from slq_embed.data.mmeb import load_mmeb_eval, load_mmeb_train
from slq_embed.data.pairs import (
    ImageTextPairs,
    from_coco,
    from_dataset,
    from_folder,
    from_karpathy,
    from_records,
    retrieval_set,
)
from slq_embed.data.sampler import DistinctImageBatchSampler

__all__ = [
    "CIRRSet",
    "DistinctImageBatchSampler",
    "FashionIQSet",
    "ImageTextPairs",
    "KARRBenchSet",
    "RetrievalSet",
    "concatenate_pairs",
    "from_coco",
    "from_dataset",
    "from_folder",
    "from_karpathy",
    "from_records",
    "load_cirr",
    "load_coco",
    "load_fashion_iq",
    "load_flickr30k",
    "load_karr_bench",
    "load_mmeb_eval",
    "load_mmeb_train",
    "retrieval_set",
]
