"""The paper's loss: symmetric InfoNCE with a learnable temperature. The host's losses serve everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.util import all_gather_with_grad
from torch import Tensor, nn

from slq_embed.encoder import SLQEncoder

INITIAL_TEMPERATURE = 0.07


class SymmetricInfoNCELoss(nn.Module):
    """Cross-entropy over the batch, from the first column to the second and back.

    ``loss = (CE(S / tau) + CE(S.T / tau)) / 2`` with cosine similarities ``S``. The parameter is ``log(tau)``: at
    the learning rates of latent queries (2e-2), ``tau`` itself would cross its whole range in a few steps.
    The parameter is part of the model, and so of its checkpoints.

    Args:
        model: The encoder to train.
        temperature: Initial temperature; by default the temperature that the model was trained with, else 0.07.
        min_temperature: The temperature is clamped from below, which bounds the logits by its inverse.
        max_temperature: The temperature is clamped from above, too.
        gather_across_devices: Whether all processes share their negatives.

    Raises:
        ValueError: If the bounds are not ``0 < min <= max``, or the temperature is outside of them.

    Source:
        arXiv:2604.13710, initial temperature 0.07; the logarithm as in CLIP, arXiv:2103.00020, section 2.3.
    """

    def __init__(
        self,
        model: SLQEncoder,
        temperature: float | None = None,
        *,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
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
        self.model = model
        self._log_temperature = (model.transformer.require_log_temperature(start),)  # the model owns it
        with torch.no_grad():
            self._log_temperature[0].fill_(start)
        self.bounds = (min_temperature, max_temperature)
        self.gather_across_devices = gather_across_devices

    @property
    def temperature(self) -> float:
        """The present temperature."""
        return math.exp(float(self._log_temperature[0].detach()))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            sentence_features: Features of two columns, such as image and text.
            labels: ``(batch,)``. Two rows with the same label (captions of one image) are not each other's negatives.
                Without labels, all other rows are negatives.

        Returns:
            A scalar.

        Raises:
            ValueError: If the batch does not have two columns.
        """
        with torch.no_grad():
            # Clamp the value, outside of autograd: a clamp inside has no gradient at a bound, and would stay there.
            self._log_temperature[0].clamp_(*map(math.log, self.bounds))
        outputs = [self.model(features) for features in sentence_features]
        if len(outputs) != 2:
            raise ValueError(
                f"The loss compares two columns, but the batch has {len(outputs)}. Leave two columns in the dataset, or "
                "use a loss of Sentence Transformers."
            )
        first, second = (nn.functional.normalize(output["sentence_embedding"], dim=-1) for output in outputs)
        temperature = outputs[0].get("log_temperature", self._log_temperature[0]).exp()
        return symmetric_info_nce(first, second, temperature, labels, self.gather_across_devices)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "temperature": round(self.temperature, 6),
            "bounds": self.bounds,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """For the model card."""
        return "\n@misc{slq2026, title={SLQ: Bridging Modalities via Shared Latent Queries}, eprint={2604.13710}}\n"


def symmetric_info_nce(
    first: Tensor, second: Tensor, temperature: Tensor, labels: Tensor | None = None, gather: bool = False
) -> Tensor:
    """Symmetric InfoNCE of two normalised columns.

    Args:
        first: ``(batch, H)``.
        second: ``(batch, H)``; row ``i`` belongs to row ``i`` of ``first``.
        temperature: A positive scalar.
        labels: ``(batch,)`` or None. Pairs of two rows with equal labels are left out.
        gather: Whether to compare with the rows of all processes.

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
            gathered = [torch.empty_like(labels) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(gathered, labels.contiguous())
            all_labels = torch.cat(gathered)
    target = torch.arange(len(first), device=first.device) + offset
    loss = first.new_zeros(())
    for rows, candidates in ((first, all_second), (second, all_first)):
        logits = rows @ candidates.T / temperature
        if labels is not None and all_labels is not None:
            siblings = labels[:, None] == all_labels[None, :]
            siblings[torch.arange(len(rows)), target] = False
            logits = logits.masked_fill(siblings, -torch.inf)
        loss = loss + nn.functional.cross_entropy(logits, target)
    return loss / 2
