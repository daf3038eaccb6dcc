"""Zero-shot classification: a class is the mean embedding of some prompts with its name."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from slq_embed.evaluation.encoding import EvaluatorOptions, embed, require_images
from slq_embed.evaluation.evaluator import Evaluator
from slq_embed.evaluation.ranking import recall_at, top_k

_ACCURACY_AT = (1, 5)


class ZeroShotClassificationEvaluator(Evaluator):
    """Top-1 and top-5 accuracy of images by the names of their classes.

    Each template makes a text of each class name. The normalised embeddings of a class's texts are averaged and
    normalised again. The primary metric is ``accuracy@1``.

    Args:
        images: Images.
        labels: For each image, the index of its class.
        class_names: Names of the classes.
        templates: Texts with ``{}`` where the name belongs.
        **options: See :class:`~slq_embed.evaluation.EvaluatorOptions`.

    Raises:
        ValueError: If a label is no index of a class, or a template has no ``{}``.

    Source:
        Prompt ensembles of CLIP, arXiv:2103.00020, section 3.1.4.
    """

    kind, metric = "zero_shot_classification", "accuracy@1"

    def __init__(
        self,
        images: Sequence[Any],
        labels: Sequence[int],
        class_names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        **options: Any,
    ) -> None:
        super().__init__(EvaluatorOptions(**options))
        require_images(images)
        if (name := next((label for label in labels if isinstance(label, str)), None)) is not None:
            raise ValueError(
                f"labels has the str {name!r}, but the index of a class is needed. Pass "
                "[class_names.index(label) for label in labels]."
            )
        labels = [operator.index(label) for label in labels]
        if len(images) != len(labels) or not labels or not set(labels) <= set(range(len(class_names))):
            raise ValueError(
                f"There are {len(images)} images, {len(labels)} labels from {min(labels, default=None)} to "
                f"{max(labels, default=None)}, and {len(class_names)} classes. Pass for each image the index of its "
                "class, from 0 on."
            )
        if isinstance(templates, str) or not templates or any("{}" not in template for template in templates):
            raise ValueError(f"templates is {templates!r}, but a list of texts with {{}} for the name is needed.")
        self.images, self.labels = list(images), torch.tensor(labels)
        self.class_names, self.templates = list(class_names), list(templates)

    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode all images and prompts, and measure.

        Args:
            model: Any Sentence Transformer that encodes images and texts.

        Returns:
            Accuracies by name.
        """
        # Not str.format: a name may hold braces.
        prompts = [template.replace("{}", name) for name in self.class_names for template in self.templates]
        texts = embed(model, [{"text": prompt} for prompt in prompts], "query", self.options, "prompts")
        classes = normalize(
            normalize(texts, dim=1).unflatten(0, (len(self.class_names), len(self.templates))).mean(dim=1), dim=1
        )
        images = embed(model, self.images, "document", self.options, "images")
        hits = top_k(images, classes, _ACCURACY_AT[-1])[1] == self.labels[:, None]
        return {f"accuracy@{k}": float(recall_at(hits, k).mean()) for k in _ACCURACY_AT}

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"images": len(self.images), "classes": len(self.class_names), "templates": self.templates}
