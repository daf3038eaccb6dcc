"""The paper's loss: symmetric InfoNCE with a learnable temperature. Those of Sentence Transformers serve everything else."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor, nn

from slq_embed.encoder import SLQEncoder

logger = logging.getLogger(__name__)

INITIAL_TEMPERATURE = 0.07

Positives: TypeAlias = Literal["own", "all"]
"""Which rows of the other column are positives of a row: its own, or all with its label."""


class SymmetricInfoNCELoss(nn.Module):
    """Cross-entropy over the batch, from the first column to the second and back.

    ``loss = (CE(S / tau) + CE(S.T / tau)) / 2`` with cosine similarities ``S``. The parameter is ``log(tau)``: at
    the learning rates of latent queries (2e-2), ``tau`` itself would cross its whole range in a few steps.
    The parameter is part of the model, and so of its checkpoints. Several such losses of one model, as for several training sets,
    train this one parameter: the last loss that is made sets where it starts.

    Columns after the second are hard negatives, such as :func:`slq_embed.training.mine_negatives` finds. A row of the
    first column is compared with its own ones, not with those of other rows: among these may be its positives.

    Args:
        model: The encoder to train.
        temperature: Initial temperature; by default the temperature that the model was trained with, else 0.07.
        min_temperature: The temperature is clamped from below, which bounds the logits by its inverse.
        max_temperature: The temperature is clamped from above, too.
        gather_across_devices: Whether all processes share their negatives.
        positives: What rows with the same label are to each other. ``"own"``: left out. ``"all"``: positives, each with
            the same weight. A batch must then hold several rows of a label: ``batch_sampler="group_by_label"``.

    Raises:
        TypeError: If the model is no ``SLQEncoder``.
        ValueError: If the bounds are not ``0 < min <= max``, the temperature is outside of them, or ``positives`` is
            another word.

    Source:
        arXiv:2604.13710, initial temperature 0.07; the logarithm as in CLIP, arXiv:2103.00020, section 2.3. Several
        positives: supervised contrastive learning, arXiv:2004.11362, equation 2, from column to column.
    """

    def __init__(
        self,
        model: SLQEncoder,
        temperature: float | None = None,
        *,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        gather_across_devices: bool = False,
        positives: Positives = "own",
    ) -> None:
        super().__init__()
        if not isinstance(model, SLQEncoder):
            raise TypeError(
                f"The model is a {type(model).__name__}, but this loss trains an SLQEncoder. Load a saved model with "
                "SLQEncoder(folder), or use a loss of Sentence Transformers."
            )
        if positives not in get_args(Positives):
            raise ValueError(f"positives is {positives!r}, but one of {get_args(Positives)} is needed.")
        if not 0 < min_temperature <= max_temperature:
            raise ValueError(
                f"The temperature is bounded by {min_temperature} and {max_temperature}, but 0 < min_temperature <= "
                "max_temperature is needed."
            )
        learned = model.temperature
        if temperature is None and learned is not None:
            start = math.log(learned)  # not checked: at a bound, rounding may put it outside; forward clamps it
        else:
            initial = INITIAL_TEMPERATURE if temperature is None else temperature
            if not min_temperature <= initial <= max_temperature:
                raise ValueError(
                    f"temperature is {initial}, but a value from {min_temperature} to {max_temperature} is needed. Pass "
                    "another one, or other bounds: min_temperature=..., max_temperature=..."
                )
            start = math.log(initial)
        self._start = start
        self.model = model
        with torch.no_grad():
            self._log_temperature[0].fill_(start)
        self.bounds = (min_temperature, max_temperature)
        self.gather_across_devices = gather_across_devices
        self.positives = positives
        self._seen_a_batch = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "model" and isinstance(value, SLQEncoder):  # a trainer with model_init sets another one
            self._log_temperature = (value.transformer.require_log_temperature(self._start),)  # the model owns it

    @property
    def temperature(self) -> float:
        """The present temperature."""
        return math.exp(float(self._log_temperature[0].detach()))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            sentence_features: Features of two columns, such as image and text, and of any number of hard negatives.
            labels: ``(batch,)``. Two rows with the same label (captions of one image) are not each other's negatives.
                Without labels, all other rows are negatives.

        Returns:
            A scalar.

        Raises:
            ValueError: If the batch has fewer than two columns, or the positives need labels and there are none.
        """
        columns = self.checked(sentence_features, labels)
        outputs = [self.model(features) for features in columns]
        log_temperature = outputs[0].get("log_temperature", self._log_temperature[0])
        return self._of_embeddings((output["sentence_embedding"] for output in outputs), log_temperature, labels)

    def _of_embeddings(self, columns: Iterable[Tensor], log_temperature: Tensor, labels: Tensor | None) -> Tensor:
        """The loss of a batch's embeddings, ``(batch, H)`` for each column; the other arguments as for :meth:`forward`."""
        first, second, *negatives = (nn.functional.normalize(column, dim=-1) for column in columns)
        self.look_for_negatives(len(first), labels, bool(negatives))
        # In bfloat16, similarities have steps of 0.004, which small temperatures turn into large ones.
        with torch.autocast(first.device.type, enabled=False):
            return symmetric_info_nce(
                first, second, log_temperature.exp(), labels, self.gather_across_devices, negatives, self.positives
            )

    def checked(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> list[dict[str, Tensor]]:
        """Check a batch and clamp the temperature; arguments and errors as for :meth:`forward`."""
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"The loss compares two columns, but the batch has {len(columns)}. The dataset needs an anchor and a "
                "positive; columns after these are hard negatives."
            )
        if self.positives == "all" and labels is None:
            raise ValueError('positives="all" needs a column "label" in the dataset, but there is none.')
        with torch.no_grad():
            # Clamp the value, outside of autograd: a clamp inside has no gradient at a bound, and would stay there.
            self._log_temperature[0].clamp_(*map(math.log, self.bounds))
        return columns

    def look_for_negatives(self, rows: int, labels: Tensor | None, hard: bool) -> None:
        """Warn if the first training batch has nothing to tell its pairs from; a last batch may well be so small.

        ``rows`` is how many pairs this process has, and ``hard`` says whether there are hard negatives.
        """
        if self._seen_a_batch or not torch.is_grad_enabled():
            return
        self._seen_a_batch = True
        shared = self.gather_across_devices and torch.distributed.is_initialized()
        if hard or shared or (rows > 1 and (labels is None or len(labels.unique()) > 1)):
            return
        what = "is one pair" if rows == 1 else f"has {rows} pairs with one label"
        logger.warning(
            "The first batch %s, so it has no negatives, and nothing is learned from it. Put pairs of several images into "
            "a batch: raise per_device_train_batch_size, or check the column 'label'.",
            what,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "temperature": round(self.temperature, 6),
            "bounds": self.bounds,
            "gather_across_devices": self.gather_across_devices,
            "positives": self.positives,
        }

    @property
    def citation(self) -> str:
        """For the model card."""
        return "\n@misc{slq2026, title={SLQ: Bridging Modalities via Shared Latent Queries}, eprint={2604.13710}}\n"


def symmetric_info_nce(
    first: Tensor,
    second: Tensor,
    temperature: Tensor,
    labels: Tensor | None = None,
    gather: bool = False,
    negatives: Sequence[Tensor] = (),
    positives: Positives = "own",
) -> Tensor:
    """Symmetric InfoNCE of two normalised columns.

    Args:
        first: ``(batch, H)``.
        second: ``(batch, H)``; row ``i`` belongs to row ``i`` of ``first``.
        temperature: A positive scalar.
        labels: ``(batch,)`` or None. Rows with equal labels are siblings.
        gather: Whether to compare with the rows of all processes.
        negatives: Hard negatives, each ``(batch, H)``; row ``i`` is compared with row ``i`` of ``first`` only.
        positives: Whether siblings are left out (``"own"``) or are positives (``"all"``).

    Returns:
        A scalar, averaged over this process's rows and both directions.

    Example:
        >>> rows = torch.eye(2)
        >>> symmetric_info_nce(rows, rows, torch.tensor(1.0))  # log(1 + exp(-1))
        tensor(0.3133)
    """
    all_first, all_second, all_labels, offset = first, second, labels, 0
    if gather and torch.distributed.is_initialized():
        all_first, all_second = all_gather_with_grad(first), all_gather_with_grad(second)
        offset = torch.distributed.get_rank() * len(first)
        if labels is not None:
            all_labels = all_gather(labels.contiguous())
    target = torch.arange(len(first), device=first.device) + offset
    loss = first.new_zeros(())
    for rows, candidates, extra in ((first, all_second, negatives), (second, all_first, ())):
        logits = rows @ candidates.T
        siblings = torch.zeros_like(logits, dtype=torch.bool)
        if labels is not None and all_labels is not None:
            siblings = labels[:, None] == all_labels[None, :]
        siblings[torch.arange(len(rows)), target] = positives == "all"  # as a positive, each is its own sibling
        own = [(rows * negative).sum(dim=1, keepdim=True) for negative in extra]
        logits = torch.cat([logits, *own], dim=1) / temperature
        siblings = nn.functional.pad(siblings, (0, len(own)))
        if positives == "all":
            weights = siblings / siblings.sum(dim=1, keepdim=True)
            loss = loss + nn.functional.cross_entropy(logits, weights.to(logits.dtype))
        else:
            loss = loss + nn.functional.cross_entropy(logits.masked_fill(siblings, -torch.inf), target)
    return loss / 2
