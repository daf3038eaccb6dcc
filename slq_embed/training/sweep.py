"""Several query sets, trained together on the same batches and prefixes."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor, nn
from transformers import TrainerCallback

from slq_embed.encoder import SLQEncoder
from slq_embed.store.prefix_store import PrefixStore
from slq_embed.training.learning_rates import learning_rate_mapping
from slq_embed.training.losses import SymmetricInfoNCELoss

Settings = Mapping[str, Any]
LossOf = Callable[..., nn.Module]

_QUERY_SETTINGS = {"num_queries", "seed", "init", "pooling", "projection", "query_adapter", "deep_queries"}


@dataclass
class Variant:
    """A query set of a sweep.

    Args:
        settings: The settings, as :func:`sweep` got them.
        encoder: The trained encoder. All variants share one backbone.
        loss: Mean training loss over the last tenth of the steps.
        metrics: The evaluator's results.
    """

    settings: dict[str, Any]
    encoder: SLQEncoder
    loss: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Sweep:
    """The result of :func:`sweep`; its ``str`` is a table.

    Args:
        variants: The trained variants, in the order of the settings.
        primary_metric: The evaluator's primary metric; ``None`` without an evaluator.
        greater_is_better: Whether a larger value of that metric is better.
    """

    variants: list[Variant]
    primary_metric: str | None = None
    greater_is_better: bool = True

    @property
    def best(self) -> Variant:
        """The best variant by the primary metric, else by the training loss.

        Training losses can be compared only between variants of one temperature.
        """
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
        self.memory = model.transformer.source.memory
        self.losses = nn.ModuleList(losses)
        self.history: list[list[float]] = []

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        self.memory.clear()
        values = torch.stack([loss([dict(features) for features in columns], labels) for loss in self.losses])
        self.history.append(values.detach().tolist())
        return values.sum()


class _ClipEach(TrainerCallback):
    """Clips each variant's gradients, as if it were trained alone. The host clips those of its own model only."""

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
        model: The encoder whose backbone, instructions, image processing and prefix store are used. Its own queries do
            not change.
        args: For ``SentenceTransformerTrainer``. Nothing is saved or evaluated before the end.
        train_dataset: For the trainer; or image-text pairs.
        variants: A dict of settings for each query set: ``num_queries``, ``seed``, ``init``, ``pooling``, ``projection``,
            ``query_adapter``, ``deep_queries`` as in :meth:`~slq_embed.SLQEncoder.from_backbone` (by default as ``model`` has them);
            ``learning_rate``, which is that of the queries, or all rates by patterns as in the trainer's
            ``learning_rate_mapping``; and arguments of ``loss``, such as ``temperature``.
        loss: The class of the loss, or a function: it gets the encoder and the rest of the settings.
        evaluator: Measures every variant at the end.
        **trainer: Further arguments of the trainer.

    Returns:
        The trained variants; print it for a table.

    Raises:
        ValueError: If there is no variant, a variant is no dict, or several processes train.
        TypeError: If the loss has no argument of a setting's name.
    """
    all_settings = [variants] if isinstance(variants, Mapping) else list(variants)
    if isinstance(variants, Mapping) or not all(isinstance(settings, Mapping) for settings in all_settings):
        raise ValueError(
            f"variants is {reprlib.repr(variants)}, but a list of dicts is needed, such as [{{'num_queries': 20}}]."
        )
    if not all_settings:
        raise ValueError("A sweep needs at least one variant, such as {'num_queries': 20}.")
    if args.world_size > 1:
        raise ValueError(
            f"A sweep trains in one process, but there are {args.world_size}. Start it without a launcher."
        )
    trained = [Variant(dict(settings), _encoder(model, settings)) for settings in all_settings]
    losses = [_loss(loss, variant) for variant in trained]
    every = _EveryLoss(model, losses)
    rates: dict[str, float] = {}
    for number, variant in enumerate(trained):
        rate = variant.settings.get("learning_rate")
        by_pattern = rate if isinstance(rate, Mapping) else learning_rate_mapping(variant.encoder)
        if rate is None:  # then those of the arguments hold, for the parts that this variant has
            names = [name for name, _ in losses[number].named_parameters()]
            general = {part: value for part, value in args.learning_rate_mapping.items() if _matches(part, names)}
            by_pattern = {**by_pattern, **general}
        elif not isinstance(rate, Mapping):
            by_pattern = {"": rate, **by_pattern}
        rates |= {rf"^losses\.{number}\..*(?:{pattern})": value for pattern, value in by_pattern.items()}
    args = dataclasses.replace(args, save_strategy="no", eval_strategy="no", learning_rate_mapping=rates)
    memory = model.transformer.source.memory
    memory.shared = True
    try:
        rows = getattr(train_dataset, "dataset", train_dataset)
        host = SentenceTransformerTrainer(model, args, train_dataset=rows, loss=every, **trainer)
        host.add_callback(_ClipEach(losses))
        for variant in trained:  # the host does this to its own model
            variant.encoder.forward = host.accelerator.autocast()(variant.encoder.forward)
        host.train()
    finally:
        for variant in trained:
            variant.encoder.__dict__.pop("forward", None)
        memory.shared = False
        memory.clear()
    last = every.history[-max(1, len(every.history) // 10) :]
    for number, variant in enumerate(trained):
        variant.loss = sum(step[number] for step in last) / len(last)
        variant.encoder.model_card_data.set_losses([losses[number]])
    result = Sweep(trained)
    if evaluator is not None:
        _evaluate(model, result, evaluator)
    return result


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _encoder(model: SLQEncoder, settings: Settings) -> SLQEncoder:
    encoder = model.with_queries(**{key: value for key, value in settings.items() if key in _QUERY_SETTINGS})
    encoder.transformer.source = model.transformer.source
    return encoder


def _loss(loss: LossOf, variant: Variant) -> nn.Module:
    known = _QUERY_SETTINGS | {"learning_rate"}
    arguments = {key: value for key, value in variant.settings.items() if key not in known}
    try:
        return loss(variant.encoder, **arguments)
    except TypeError as error:
        raise TypeError(
            f"The variant {variant.settings} does not fit: {error}. A setting is one of {', '.join(sorted(known))}, or "
            "an argument of the loss."
        ) from error


def _evaluate(model: SLQEncoder, result: Sweep, evaluator: BaseEvaluator) -> None:
    before = model.prefix_store
    if before is None:
        model.prefix_store = PrefixStore()  # the first variant computes the prefixes, the others read them
    try:
        for variant in result.variants:
            metrics = evaluator(variant.encoder)
            variant.metrics = metrics if isinstance(metrics, dict) else {"score": float(metrics)}
    finally:
        model.prefix_store = before
    metrics = result.variants[0].metrics
    result.primary_metric = getattr(evaluator, "primary_metric", None) or next(iter(metrics))
    result.greater_is_better = bool(getattr(evaluator, "greater_is_better", True))
