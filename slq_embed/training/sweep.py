"""Many query sets trained in one pass over the same prefixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn
from transformers import TrainerCallback

from slq_embed.encoder import SLQEncoder
from slq_embed.prefix.store import PrefixStore
from slq_embed.training.losses import SymmetricInfoNCELoss

Settings = Mapping[str, Any]
LossOf = Callable[..., nn.Module]

_QUERY_SETTINGS = {"num_queries", "seed", "init", "pooling"}


@dataclass
class Variant:
    """A query set of a sweep.

    Args:
        settings: What was asked for.
        encoder: The trained encoder; all of a sweep share one backbone.
        loss: Mean training loss over the last tenth of the steps.
        metrics: What the evaluator found.
    """

    settings: dict[str, Any]
    encoder: SLQEncoder
    loss: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Sweep:
    """The result of :func:`sweep`; its ``str`` is a table.

    Args:
        variants: In the order of the settings.
        primary_metric: The evaluator's, if there was one.
        greater_is_better: Whether that is to be large.
    """

    variants: list[Variant]
    primary_metric: str | None = None
    greater_is_better: bool = True

    @property
    def best(self) -> Variant:
        """By the evaluator's primary metric, else by the training loss (comparable at one temperature only)."""
        if self.primary_metric is None:
            return min(self.variants, key=lambda variant: variant.loss)
        sign = 1 if self.greater_is_better else -1
        name = self.primary_metric
        return max(self.variants, key=lambda variant: sign * variant.metrics[name])

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for variant in self.variants for name in variant.settings))
        head = [*names, "loss", *([self.primary_metric] if self.primary_metric else [])]
        lines = [head]
        for variant in self.variants:
            values = [str(variant.settings.get(name, "")) for name in names] + [f"{variant.loss:.4f}"]
            values += [f"{variant.metrics[self.primary_metric]:.4f}"] if self.primary_metric else []
            lines.append(values)
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        best = self.best
        marks = ["", *(" *" if variant is best else "" for variant in self.variants)]
        return "\n".join(
            "  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)) + mark
            for line, mark in zip(lines, marks, strict=True)
        )


class _EveryLoss(nn.Module):
    """The sum of the variants' losses on one batch, whose prefixes are computed once."""

    def __init__(self, model: SLQEncoder, losses: Sequence[nn.Module]) -> None:
        super().__init__()
        self.source = model.transformer.source
        self.losses = nn.ModuleList(losses)
        self.history: list[list[float]] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        self.source.memory.clear()
        found = [loss([dict(features) for features in columns], labels) for loss in self.losses]
        self.history.append(torch.stack([loss.detach() for loss in found]).tolist())
        return torch.stack(found).sum()


class _ClipEach(TrainerCallback):
    """The host clips the gradients of its own model: here each variant's, as if it were trained alone."""

    def __init__(self, losses: Sequence[nn.Module]) -> None:
        self.losses = losses

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            for loss in self.losses:
                torch.nn.utils.clip_grad_norm_(loss.parameters(), args.max_grad_norm)


def sweep(
    model: SLQEncoder,
    args: SentenceTransformerTrainingArguments,
    train_dataset: Any,
    variants: Iterable[Settings],
    *,
    loss: LossOf = SymmetricInfoNCELoss,
    evaluator: BaseEvaluator | None = None,
    **trainer: Any,
) -> Sweep:
    """Train several query sets on the same batches, each as if it were trained alone.

    Args:
        model: Gives backbone, instructions and image processing, and a prefix store if it has one; its own queries
            stay as they are.
        args: For the host's trainer. Nothing is saved on the way.
        train_dataset: For the host's trainer.
        variants: For each query set ``num_queries``, ``seed``, ``init``, ``pooling`` as in
            :meth:`~slq_embed.SLQEncoder.from_backbone` (by default as ``model`` has them), ``learning_rate``, and
            arguments of ``loss``, such as ``temperature``.
        loss: Makes a loss of an encoder and what is left of the settings.
        evaluator: Measures every variant at the end.
        **trainer: For the host's trainer.

    Returns:
        The trained variants; print it for a table.

    Raises:
        ValueError: If there is no variant, or several processes train.
    """
    made = [Variant(dict(settings), _encoder(model, settings)) for settings in variants]
    if not made:
        raise ValueError("A sweep needs at least one variant, such as {'num_queries': 20}.")
    if args.world_size > 1:
        raise ValueError(
            f"A sweep trains in one process, but there are {args.world_size}. Start it without a launcher."
        )
    losses = [loss(variant.encoder, **_loss_settings(variant.settings)) for variant in made]
    every = _EveryLoss(model, losses)
    rates = {rf"^losses\.{n}\.": variant.settings.get("learning_rate") for n, variant in enumerate(made)}
    args = dataclasses.replace(
        args,
        save_strategy="no",
        eval_strategy="no",
        learning_rate_mapping={pattern: rate for pattern, rate in rates.items() if rate is not None},
    )
    source = model.transformer.source
    source.shared = True
    try:
        host = SentenceTransformerTrainer(model, args, train_dataset=train_dataset, loss=every, **trainer)
        host.add_callback(_ClipEach(losses))
        for variant in made:  # the host does this to its own model
            variant.encoder.forward = host.accelerator.autocast()(variant.encoder.forward)
        host.train()
    finally:
        for variant in made:
            variant.encoder.__dict__.pop("forward", None)
        source.shared = False
        source.memory.clear()
    last = every.history[-max(1, len(every.history) // 10) :]
    for number, variant in enumerate(made):
        variant.loss = sum(step[number] for step in last) / len(last)
    result = Sweep(made)
    if evaluator is not None:
        _evaluate(model, result, evaluator)
    return result


def _encoder(model: SLQEncoder, settings: Settings) -> SLQEncoder:
    encoder = model.with_queries(**{key: value for key, value in settings.items() if key in _QUERY_SETTINGS})
    encoder.transformer.source = model.transformer.source
    return encoder


def _loss_settings(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _QUERY_SETTINGS | {"learning_rate"}}


def _evaluate(model: SLQEncoder, result: Sweep, evaluator: BaseEvaluator) -> None:
    before = model.prefix_store
    if before is None:
        model.prefix_store = PrefixStore()  # what the first variant computes, the others read
    try:
        for variant in result.variants:
            found = evaluator(variant.encoder)
            variant.metrics = found if isinstance(found, dict) else {"score": float(found)}
    finally:
        model.prefix_store = before
    metrics = result.variants[0].metrics
    result.primary_metric = getattr(evaluator, "primary_metric", None) or next(iter(metrics))
    result.greater_is_better = bool(getattr(evaluator, "greater_is_better", True))
