"""Image-text retrieval both ways, as COCO and Flickr30K are evaluated."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from slq_embed.evaluation.encoding import EvaluatorOptions, embed, require_images
from slq_embed.evaluation.evaluator import Evaluator
from slq_embed.evaluation.ranking import mrr_at, ndcg_at, recall_at, top_k

RECALL_AT = (1, 5, 10)
_DEPTH = 10


class ImageTextRetrievalEvaluator(Evaluator):
    """Recall at 1, 5 and 10, MRR at 10 and nDCG at 10, from text to image and back.

    From text to image, a hit is the text's image in the top k. From image to text, a hit is any of the image's texts
    in the top k; nDCG counts all of them. The primary metric is the mean of all six recalls.

    Args:
        images: Images, in any form that the model encodes. A path is a ``pathlib.Path`` or ``{"image": path}``: a str is
            a text.
        texts: Texts.
        image_of: For each text, the index of its image in ``images``.
        name: Prefix of the metrics.
        batch_size: Inputs a batch.
        show_progress_bar: Whether to show one while encoding.
        write_csv: Whether to append the metrics to a file in the output path.
        embeddings_folder: See :class:`~slq_embed.evaluation.EvaluatorOptions`.

    Raises:
        ValueError: If ``image_of`` does not fit, an image has no text, or is a str.

    Source:
        The protocol of arXiv:2604.13710: any of an image's captions counts.
    """

    kind, metric = "image_text_retrieval", "mean_recall"

    def __init__(
        self,
        images: Sequence[Any],
        texts: Sequence[str],
        image_of: Sequence[int],
        *,
        name: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        embeddings_folder: str | Path | None = None,
    ) -> None:
        super().__init__(EvaluatorOptions(name, batch_size, show_progress_bar, write_csv, embeddings_folder))
        if isinstance(texts, str):
            raise ValueError(f"texts is the str {reprlib.repr(texts)}, but a list of texts is needed.")
        if (several := next((text for text in texts if not isinstance(text, str)), None)) is not None:
            raise ValueError(
                f"texts has {reprlib.repr(several)}, but each text is a str. Put the captions of an image one after the other, "
                "and give in image_of, for each of them, the index of its image."
            )
        require_images(images)
        indices = [operator.index(index) for index in image_of]
        if len(indices) != len(texts) or set(indices) != set(range(len(images))):
            raise ValueError(
                f"image_of has {len(indices)} indices of {len(set(indices))} different images, but there are "
                f"{len(texts)} texts and {len(images)} images. Pass the index of its image for each text, from 0 on; "
                "each image needs a text."
            )
        self.images, self.texts, self.image_of = list(images), list(texts), torch.tensor(indices)

    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode all images and texts, and measure.

        Args:
            model: Any Sentence Transformer that encodes images and texts.

        Returns:
            Metrics by name.
        """
        each = both_ways(model, self.images, self.texts, self.image_of, self.options)
        metrics = {name: float(values.mean()) for name, values in each.items()}
        metrics["mean_recall"] = mean_recall(metrics)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"images": len(self.images), "texts": len(self.texts)}


def both_ways(
    model: SentenceTransformer, images: Sequence[Any], texts: Sequence[str], image_of: Tensor, options: EvaluatorOptions
) -> dict[str, Tensor]:
    """Encode images and texts, rank both ways, and measure each query.

    Args:
        model: Any Sentence Transformer that encodes images and texts.
        images: Images.
        texts: Texts.
        image_of: ``(texts,)`` the index of each text's image.
        options: How to encode.

    Returns:
        Metrics of each query by name: ``text_to_image_...`` have a value for each text, ``image_to_text_...`` for each
        image.
    """
    image_rows = embed(model, images, "document", options, "images")
    text_rows = embed(model, [{"text": text} for text in texts], "query", options, "texts")
    owner = torch.arange(len(images))
    counts = torch.bincount(image_of, minlength=len(images))
    metrics: dict[str, Tensor] = {}
    for way, queries, candidates, query_group, candidate_group, relevant in (
        ("text_to_image", text_rows, image_rows, image_of, owner, torch.ones_like(image_of)),
        ("image_to_text", image_rows, text_rows, owner, image_of, counts),
    ):
        indices = top_k(queries, candidates, _DEPTH)[1]
        relevance = (indices >= 0) & (candidate_group[indices] == query_group[:, None])
        ideal = torch.arange(_DEPTH) < relevant[:, None]
        metrics |= {f"{way}_recall@{k}": recall_at(relevance, k) for k in RECALL_AT}
        metrics[f"{way}_mrr@{_DEPTH}"] = mrr_at(relevance, _DEPTH)
        metrics[f"{way}_ndcg@{_DEPTH}"] = ndcg_at(relevance, _DEPTH, ideal.int())
    return metrics


def mean_recall(metrics: dict[str, float]) -> float:
    """The mean of all recalls among metrics."""
    recalls = [value for name, value in metrics.items() if "recall@" in name]
    return sum(recalls) / len(recalls)
