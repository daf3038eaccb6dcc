"""Image-text retrieval both ways, as COCO and Flickr30K are evaluated."""

from __future__ import annotations

import csv
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

    From text to image, a text finds its own image. From image to text, a hit is any of the image's texts in
    the top k. The primary metric is the mean of all six.

    Args:
        images: Images, in any form the model encodes.
        texts: Texts.
        image_of: For each text, the place of its image in ``images``.
        name: Prefix of the metrics.
        batch_size: For encoding.
        show_progress_bar: While encoding.
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
        if len(image_of) != len(texts) or set(image_of) != set(range(len(images))):
            raise ValueError(
                f"image_of gives {len(set(image_of))} images for {len(image_of)} texts, but there are {len(texts)} "
                f"texts and {len(images)} images. Give each text the place of its image; each image needs a text."
            )
        self.images, self.texts, self.image_of = list(images), list(texts), torch.tensor(image_of)
        self.name, self.batch_size, self.show_progress_bar = name, batch_size, show_progress_bar
        self.write_csv = write_csv
        self.primary_metric = "mean_recall"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Encode everything and measure; see the class."""
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
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"images": len(self.images), "texts": len(self.texts)}


def best_ranks(
    queries: Tensor, candidates: Tensor, query_group: Tensor, candidate_group: Tensor, block: int = 2048
) -> Tensor:
    """The rank of each query's best right candidate, 0 for the top.

    A candidate is right if it has the query's group. Equal scores are ranked by the candidates' order, always.
    Scores are computed block by block, so memory grows with the block, not with queries times candidates.

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
        place = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in starts:
            right = groups[:, None] == candidate_group[None, start : start + block]
            scores = (rows @ candidates[start : start + block].float().T).masked_fill(~right, -torch.inf)
            # Of equal scores, argmax may give any: the first one is wanted.
            top = scores.amax(dim=1)
            first = (scores == top[:, None]).int().argmax(dim=1) + start
            better = top > best
            best, place = torch.where(better, top, best), torch.where(better, first, place)
        above = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in starts:
            scores = rows @ candidates[start : start + block].float().T
            order = torch.arange(start, start + scores.shape[1], device=device)
            # "Not at most" and not "more than": a score that is no number must not make a query a hit.
            ahead = ~(scores <= best[:, None]) | ((scores == best[:, None]) & (order[None, :] < place[:, None]))
            above += ahead.sum(dim=1)
        ranks.append(above)
    return torch.cat(ranks).cpu()
