"""Image-text retrieval both ways, as COCO and Flickr30K are evaluated."""

from __future__ import annotations

import csv
import operator
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import Tensor

RECALL_AT = (1, 5, 10)


class ImageTextRetrievalEvaluator(SentenceEvaluator):
    """Recall at 1, 5 and 10 from text to image and back.

    From text to image, a hit is the text's image in the top k. From image to text, a hit is any of the image's texts
    in the top k. The primary metric is the mean of all six.

    Args:
        images: Images, in any form that the model encodes.
        texts: Texts.
        image_of: For each text, the index of its image in ``images``.
        name: Prefix of the metrics.
        batch_size: Inputs a batch.
        show_progress_bar: Whether to show one while encoding.
        write_csv: Whether to append the metrics to a file in the output path.

    Raises:
        ValueError: If ``image_of`` does not fit, or an image has no text.

    Source:
        The protocol of arXiv:2604.13710: any of an image's captions counts.
    """

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
    ) -> None:
        super().__init__()
        if isinstance(texts, str):
            raise ValueError(f"texts is the str {reprlib.repr(texts)}, but a list of texts is needed.")
        indices = [operator.index(index) for index in image_of]
        if len(indices) != len(texts) or set(indices) != set(range(len(images))):
            raise ValueError(
                f"image_of has {len(indices)} indices of {len(set(indices))} different images, but there are "
                f"{len(texts)} texts and {len(images)} images. Pass the index of its image for each text, from 0 on; "
                "each image needs a text."
            )
        self.images, self.texts, self.image_of = list(images), list(texts), torch.tensor(indices)
        self.name, self.batch_size, self.show_progress_bar = name, batch_size, show_progress_bar
        self.write_csv = write_csv
        self.primary_metric = "mean_recall"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Encode all images and texts, and measure.

        Args:
            model: Any Sentence Transformer that encodes images and texts.
            output_path: Folder of the CSV file.
            epoch: For the CSV file.
            steps: For the CSV file.

        Returns:
            Recalls by name, and their mean.
        """
        options: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": self.show_progress_bar}
        images = model.encode_document(self.images, convert_to_tensor=True, **options)
        texts = model.encode_query([{"text": text} for text in self.texts], convert_to_tensor=True, **options)
        owner = torch.arange(len(images))
        ranks = {
            "text_to_image": best_ranks(texts, images, self.image_of, owner),
            "image_to_text": best_ranks(images, texts, owner, self.image_of),
        }
        metrics = {
            f"{way}_recall@{k}": float((rank < k).double().mean()) for way, rank in ranks.items() for k in RECALL_AT
        }
        metrics["mean_recall"] = sum(metrics.values()) / len(metrics)
        if output_path is not None and self.write_csv:
            self._append(Path(output_path), {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _append(self, folder: Path, row: dict[str, float]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"image_text_retrieval{'_' + self.name if self.name else ''}_results.csv"
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"images": len(self.images), "texts": len(self.texts)}


def best_ranks(
    queries: Tensor, candidates: Tensor, query_group: Tensor, candidate_group: Tensor, block: int = 2048
) -> Tensor:
    """The rank of each query's best relevant candidate, 0 for the top.

    A candidate is relevant if it has the query's group. Candidates with equal scores rank in their order.
    Scores are computed block by block: memory grows with the block, not with queries times candidates.

    Args:
        queries: ``(queries, H)``.
        candidates: ``(candidates, H)``.
        query_group: ``(queries,)`` integers.
        candidate_group: ``(candidates,)`` integers; each query's group must be among them.
        block: Rows and columns of a block of scores.

    Returns:
        ``(queries,)`` integers, on the CPU.

    Example:
        >>> candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> best_ranks(candidates[:1], candidates, torch.tensor([1]), torch.arange(3))
        tensor([1])
    """
    device = queries.device
    query_group, candidate_group = query_group.to(device), candidate_group.to(device)
    starts = range(0, len(candidates), block)
    ranks = []
    for rows, groups in zip(queries.float().split(block), query_group.split(block), strict=True):
        best = torch.full((len(rows),), -torch.inf, device=device)
        position = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in starts:
            relevant = groups[:, None] == candidate_group[None, start : start + block]
            scores = (rows @ candidates[start : start + block].float().T).masked_fill(~relevant, -torch.inf)
            # Of equal scores, argmax may return any one, and the first one is needed.
            top = scores.amax(dim=1)
            first = (scores == top[:, None]).int().argmax(dim=1) + start
            better = top > best
            best, position = torch.where(better, top, best), torch.where(better, first, position)
        above = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in starts:
            scores = rows @ candidates[start : start + block].float().T
            order = torch.arange(start, start + scores.shape[1], device=device)
            # "Not at most" instead of "more than": then NaN counts as ahead, and never makes a hit.
            ahead = ~(scores <= best[:, None]) | ((scores == best[:, None]) & (order[None, :] < position[:, None]))
            above += ahead.sum(dim=1)
        ranks.append(above)
    return torch.cat(ranks).cpu()
