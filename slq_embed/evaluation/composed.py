"""Composed retrieval: an image and a text that says what to change, as CIRR and FashionIQ are evaluated."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from slq_embed.evaluation.encoding import EvaluatorOptions, embed, require_images
from slq_embed.evaluation.evaluator import Evaluator
from slq_embed.evaluation.ranking import order_own, recall_at, top_k

_CIRR_AT, _CIRR_SUBSET_AT, _FASHION_IQ_AT = (1, 5, 10, 50), (1, 2, 3), (10, 50)


def _require_equal(counts: dict[str, int]) -> None:
    if len(set(counts.values())) > 1 or 0 in counts.values():
        numbers = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(f"Each query needs one of each, but there are other numbers ({numbers}).")


def _indices(name: str, indices: Sequence[int], count: int) -> list[int]:
    """Indices of images, of any integer type, as int."""
    numbers = [operator.index(index) for index in indices]
    if bad := [number for number in numbers if not 0 <= number < count]:
        raise ValueError(f"{name} holds {bad[0]}, but there are {count} images: pass indices from 0 to {count - 1}.")
    return numbers


class CIRREvaluator(Evaluator):
    """Recall at 1, 5, 10 and 50 among all images but the reference, and at 1, 2 and 3 among the query's own subset.

    The query is the reference image with the text, encoded as one input. The primary metric is recall at 5; with
    subsets, ``mean_recall`` is the mean of recall at 5 and subset recall at 1, as the data set's authors report it.

    Args:
        images: Images to search in.
        references: For each query, the index of its reference image.
        texts: For each query, what to change.
        targets: For each query, the index of its target; ``None`` where that is not published (the test split).
        subsets: For each query, the indices of its subset of similar images, with or without the reference.
        names: The name of each image, for :meth:`submissions`.
        pair_ids: The ``pairid`` of each query, for :meth:`submissions`.
        **options: See :class:`~slq_embed.evaluation.EvaluatorOptions`.

    Raises:
        ValueError: If the lists do not fit each other.

    Source:
        CIRR, arXiv:2108.04024, and the protocol of arXiv:2604.13710.
    """

    kind, metric = "cirr", "recall@5"

    def __init__(
        self,
        images: Sequence[Any],
        references: Sequence[int],
        texts: Sequence[str],
        targets: Sequence[int] | None = None,
        subsets: Sequence[Sequence[int]] | None = None,
        names: Sequence[str] | None = None,
        pair_ids: Sequence[int | str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(EvaluatorOptions(**options))
        require_images(images)
        lists = {"references": references, "texts": texts, "targets": targets, "subsets": subsets, "pair_ids": pair_ids}
        _require_equal({name: len(values) for name, values in lists.items() if values is not None})
        if names is not None and len(names) != len(images):
            raise ValueError(f"There are {len(names)} names, but {len(images)} images. Pass one name an image.")
        self.images, self.texts = list(images), list(texts)
        self.references = _indices("references", references, len(images))
        self.targets = None if targets is None else _indices("targets", targets, len(images))
        self.subsets = None
        if subsets is not None:
            self.subsets = [
                [index for index in _indices("subsets", subset, len(images)) if index != reference]
                for subset, reference in zip(subsets, self.references, strict=True)
            ]
        self.names, self.pair_ids = names, pair_ids

    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode all images and queries, and measure.

        Args:
            model: Any Sentence Transformer that encodes images with texts.

        Returns:
            Metrics by name.

        Raises:
            ValueError: If the targets are not known.
        """
        if self.targets is None:
            raise ValueError("The targets are not known, so nothing can be measured: write the submissions instead.")
        top, subset_top = self._rank(model)
        hits = top == torch.tensor(self.targets)[:, None]
        metrics = {f"recall@{k}": float(recall_at(hits, k).mean()) for k in _CIRR_AT}
        if subset_top is not None:
            for k in _CIRR_SUBSET_AT:
                right = [target in row[:k] for target, row in zip(self.targets, subset_top, strict=True)]
                metrics[f"subset_recall@{k}"] = sum(right) / len(right)
            metrics["mean_recall"] = (metrics["recall@5"] + metrics["subset_recall@1"]) / 2
        return metrics

    def submissions(self, model: SentenceTransformer) -> dict[str, dict[str, Any]]:
        """What the data set's test server takes, a JSON file for each metric.

        Args:
            model: Any Sentence Transformer that encodes images with texts.

        Returns:
            ``"recall"``: ``{"version": "rc2", "metric": "recall", pairid: [names of the best 50], ...}``. With subsets
            also ``"recall_subset"``, with the best 3 of each.

        Raises:
            ValueError: If the names or the pair ids are not known.
        """
        if self.names is None or self.pair_ids is None:
            raise ValueError("A submission needs names and pair_ids: pass both.")
        top, subset_top = self._rank(model)
        ranked = {"recall": [[index for index in row if index >= 0] for row in top.tolist()]}
        if subset_top is not None:
            ranked["recall_subset"] = [row[: _CIRR_SUBSET_AT[-1]] for row in subset_top]
        files: dict[str, dict[str, Any]] = {}
        for metric, rows in ranked.items():
            files[metric] = {"version": "rc2", "metric": metric}
            for pair_id, row in zip(self.pair_ids, rows, strict=True):
                files[metric][str(pair_id)] = [self.names[index] for index in row]
        return files

    def _rank(self, model: SentenceTransformer) -> tuple[Tensor, list[list[int]] | None]:
        """Indices of the best 50 images ``(queries, 50)``, and of each subset, without the reference."""
        images = embed(model, self.images, "document", self.options, "images")
        inputs = _composed(self.images, self.references, self.texts)
        queries = embed(model, inputs, "query", self.options, "queries")
        top = top_k(queries, images, _CIRR_AT[-1], exclude=torch.tensor(self.references)[:, None])[1]
        if self.subsets is None:
            return top, None
        orders = order_own(queries, images, self.subsets)
        return top, [[own[at] for at in order] for own, order in zip(self.subsets, orders, strict=True)]

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"images": len(self.images), "queries": len(self.texts)}


def _composed(images: Sequence[Any], references: Sequence[int], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"image": images[n], "text": text} for n, text in zip(references, texts, strict=True)]


class FashionIQEvaluator(Evaluator):
    """Recall at 10 and 50 in each category, and their means over the categories.

    A query has two captions. They are joined in both orders, the reference image is encoded with each, and the two
    embeddings are added. The reference stays in the ranking. The primary metric, ``mean_recall``, is the mean of
    ``mean_recall@10`` and ``mean_recall@50``.

    Args:
        images: Images to search in; an image that stands in two categories is there twice.
        image_categories: The category of each image.
        references: For each query, the index of its reference image.
        captions: For each query, its two captions.
        targets: For each query, the index of its target.
        categories: The category of each query.
        **options: See :class:`~slq_embed.evaluation.EvaluatorOptions`.

    Raises:
        ValueError: If the lists do not fit each other, or a target is of another category than its query.

    Source:
        Fashion IQ, arXiv:1905.12794, and the protocol of arXiv:2604.13710, which adds before it normalises; here, each
        of the two is a normalised embedding.
    """

    kind, metric = "fashion_iq", "mean_recall"

    def __init__(
        self,
        images: Sequence[Any],
        image_categories: Sequence[str],
        references: Sequence[int],
        captions: Sequence[Sequence[str]],
        targets: Sequence[int],
        categories: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(EvaluatorOptions(**options))
        require_images(images)
        lists = {"references": references, "captions": captions, "targets": targets, "categories": categories}
        _require_equal({name: len(values) for name, values in lists.items()})
        _require_equal({"images": len(images), "image_categories": len(image_categories)})
        for number, both in enumerate(captions):
            if isinstance(both, str) or len(both) != 2:
                raise ValueError(f"Query {number} has the captions {both!r}, but a list of two is needed.")
        self.references = _indices("references", references, len(images))
        self.targets = _indices("targets", targets, len(images))
        for number, (target, category) in enumerate(zip(self.targets, categories, strict=True)):
            if image_categories[target] != category:
                raise ValueError(
                    f"Query {number} is of the category {category!r}, but its target of {image_categories[target]!r}."
                )
        self.images, self.image_categories = list(images), list(image_categories)
        self.captions, self.categories = [list(both) for both in captions], list(categories)

    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode all images and queries, and measure.

        Args:
            model: Any Sentence Transformer that encodes images with texts.

        Returns:
            Metrics by name.
        """
        images = embed(model, self.images, "document", self.options, "images")
        texts = [join_captions(order) for both in self.captions for order in (both, both[::-1])]
        twice = [reference for reference in self.references for _ in range(2)]
        both_orders = embed(model, _composed(self.images, twice, texts), "query", self.options, "queries")
        queries = both_orders[0::2] + both_orders[1::2]
        metrics: dict[str, float] = {}
        names = list(dict.fromkeys(self.categories))
        for category in names:
            gallery = [n for n, own in enumerate(self.image_categories) if own == category]
            rows = [n for n, own in enumerate(self.categories) if own == category]
            top = top_k(queries[rows], images[gallery], _FASHION_IQ_AT[-1])[1]
            position = {image: n for n, image in enumerate(gallery)}
            hits = top == torch.tensor([position[self.targets[row]] for row in rows])[:, None]
            metrics |= {f"{category}_recall@{k}": float(recall_at(hits, k).mean()) for k in _FASHION_IQ_AT}
        for k in _FASHION_IQ_AT:
            metrics[f"mean_recall@{k}"] = sum(metrics[f"{category}_recall@{k}"] for category in names) / len(names)
        metrics["mean_recall"] = sum(metrics[f"mean_recall@{k}"] for k in _FASHION_IQ_AT) / len(_FASHION_IQ_AT)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"images": len(self.images), "queries": len(self.captions)}


def join_captions(captions: Sequence[str]) -> str:
    """Join the captions of a FashionIQ query, without the marks at their ends.

    Example:
        >>> join_captions(["is darker.", " has no sleeves"])
        'is darker, has no sleeves'
    """
    return ", ".join(caption.strip(".?, ") for caption in captions)
