"""The self-check: which schedules are exact on a backbone, found by running it.

A backbone that no table knows is tried on a few small inputs. The reference runs each input alone, prefix and queries as one
sequence. The prefix path must agree with it in value and gradient, alone and in a left-padded batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from slq_embed.backbone.families import embedding_table, refusal, usable_rows
from slq_embed.backbone.lock import lock_of
from slq_embed.backbone.query_tokens import free_rows
from slq_embed.backbone.report import Finding, Report, Schedule
from slq_embed.backbone.twin import twin_of

logger = logging.getLogger(__name__)

VALUE, GRADIENT = 1e-5, 1e-4
"""What unit vectors may always differ by, and gradients by their size."""
_MOST = (0.1, 0.5)  # a difference of this size is none of rounding, whatever the precision
_QUERIES = 3
_LONG_S = 10.0  # a check that takes longer is announced
_WHOLE = 4  # times as long as its reference


def check(model: PreTrainedModel, processor: Any) -> Report:
    """Find out by running it whether latent queries work on a backbone, and how fast they can be trained.

    Args:
        model: A multimodal LLM, or a language model.
        processor: Its processor, or its tokenizer; copied.

    Returns:
        The report. Nothing is raised where the backbone cannot work: the report says why.
    """
    from slq_embed.saving.assembly import QuerySettings, build_modules
    from slq_embed.saving.loading import LoadedBackbone

    started = time.monotonic()
    rows = max(free_rows(processor, usable_rows(model))) if refusal(model.config) is None else 0
    try:
        loaded = LoadedBackbone(model, processor, model.name_or_path, None, model.device)
        settings = QuerySettings(_QUERIES, seed=0)
        modules, _ = build_modules(loaded, settings, "merged", None, 8192, None, None, checked=True)
        return examine(modules[0])
    except ValueError as error:  # of the architecture, the chat template, the embedding table
        reason = refusal(model.config) or f"gives an error: {error}"
        seconds = time.monotonic() - started
        return Report(model.config.model_type, _dtype(model), None, reason, rows, seconds)


def examine(transformer: Any) -> Report:
    """Compare the schedules of a :class:`slq_embed.modules.LatentQueryTransformer` on a few inputs.

    What agrees up to the precision's own error is the same. Where ``VALUE`` or ``GRADIENT`` is exceeded, that error is estimated
    from every input: how far values and gradients move if each number that enters the backbone moves by one rounding, times twice
    the square root of the number of layers. The queries are such numbers: with more of them it is likelier that one comes close
    to zero before a norm, which then divides by little, and rounding grows.
    """
    started, backbone = time.monotonic(), transformer.backbone
    comparison, schedule, reason = _Comparison(transformer), None, None
    try:
        with lock_of(backbone):
            schedule = comparison.fastest_schedule()
    except _UnusableError as error:
        reason = str(error)
    rows = max(free_rows(transformer.processor, usable_rows(backbone)))
    kind, seconds = backbone.config.model_type, time.monotonic() - started
    return Report(kind, _dtype(backbone), schedule, reason, rows, seconds, tuple(comparison.findings))


def samples(reads_images: bool) -> list[Any]:
    """Inputs of different lengths and shapes: texts, and where it reads them images, alone and with a text."""
    texts = ["hello", "a much longer text about red circles and blue squares, so that there is padding"]
    if not reads_images:
        return [*texts, "x"]
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Image.Image:
        return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator).byte().numpy())

    # Two of one shape: they differ in their pixels alone, which a backbone could leave out.
    return [*texts, image(64, 48), image(64, 48), {"image": image(40, 72), "text": "now in blue"}]


class _UnusableError(Exception):
    """Why no schedule is exact: one sentence that starts with a verb."""


class _Comparison:
    """Compares the schedules on a few inputs; :attr:`findings` has what was compared so far.

    Args:
        transformer: A :class:`slq_embed.modules.LatentQueryTransformer`.
    """

    def __init__(self, transformer: Any) -> None:
        self.findings: list[Finding] = []
        self._transformer = transformer
        self._inputs = samples(transformer.reader.reads_images)

    def fastest_schedule(self) -> Schedule:
        """The fastest schedule that is exact.

        Raises:
            _UnusableError: If there is none.
        """
        self._run_reference()
        self._look_at_later_tokens()
        self._tell_inputs_apart()
        schedule = self._choose()
        self._pad_without_positions()
        return schedule

    def _note(self, name: str, ok: bool, difference: float | None, allowed: float, error: str | None = None) -> bool:
        self.findings.append(Finding(name, ok, difference, allowed, error))
        return ok

    def _run_reference(self) -> None:
        transformer, started = self._transformer, time.monotonic()
        try:
            self._alone = [features_of(transformer, [value]) for value in self._inputs]
            self._together = features_of(transformer, self._inputs)
            reference = [_run(transformer, one, transformer.all_positions) for one in self._alone]
        except Exception as error:
            self._note("input and queries as one sequence", False, None, 0.0, first_line(error))
            raise _UnusableError(f"fails on a sample input ({first_line(error)})") from error
        self._values, self._gradient = torch.cat([value for value, _ in reference]), _total(reference)
        if (estimate := _WHOLE * (time.monotonic() - started)) > _LONG_S:
            logger.warning(
                "The self-check of this %s takes about %.0f s here. It runs once: a saved model records its result.",
                transformer.backbone.config.model_type,
                estimate,
            )

    @cached_property
    def _limits(self) -> tuple[float, float]:
        """How far values and gradients may be apart, as far as rounding alone takes them."""
        transformer = self._transformer
        moved = [_run(transformer, one, lambda features: _rounded(transformer, features)) for one in self._alone]
        roundings = 2 * math.sqrt(transformer.backbone.config.get_text_config().num_hidden_layers)
        value, slope = _furthest(moved, self._values), _relative(_total(moved), self._gradient)
        return min(max(VALUE, roundings * value), _MOST[0]), min(max(GRADIENT, roundings * slope), _MOST[1])

    def _look_at_later_tokens(self) -> None:
        ends = self._alone[0], self._alone[-1]
        seen = max(_influence_of_later_tokens(self._transformer, one) for one in ends)
        if not self._note("earlier tokens do not see later ones", seen == 0.0, seen, 0.0):
            raise _UnusableError("lets earlier tokens see later ones, so its inputs would see the queries")
        size = float(self._gradient.norm())
        if not self._note("the queries act", math.isfinite(size) and size > 0, size, 0.0):
            raise _UnusableError("does not let the rows of its embedding table act as queries")

    def _tell_inputs_apart(self) -> None:
        pairs = [(0, 1)] + ([(2, 3)] if self._transformer.reader.reads_images else [])
        apart = min(_apart(self._values[a], self._values[b]) for a, b in pairs)
        if not self._note("different inputs differ", apart > VALUE, apart, VALUE):
            raise _UnusableError(
                "gives different inputs the same embedding: the processor may be that of another backbone"
            )

    def _choose(self) -> Schedule:
        transformer = self._transformer

        def prefix(features: Any) -> Tensor:
            states: Tensor = transformer.query_states(transformer.source.prefix(features))
            return states

        if self._agrees("prefix path alone", self._alone, prefix) and self._agrees(
            "prefix path in a batch", [self._together], prefix
        ):
            return "prefix"
        if self._agrees("all positions in a batch", [self._together], transformer.all_positions):
            return "all_positions"
        failed = next(one for one in self.findings if not one.ok and one.name.startswith("all positions"))
        measured = failed.error or f"{failed.difference:.1e}, and at most {failed.allowed:.1e} is exact"
        raise _UnusableError(f"gives an input other embeddings in a batch than alone ({failed.name}: {measured})")

    def _agrees(self, name: str, features: Sequence[Any], run: Callable[[Any], Tensor]) -> bool:
        """Whether a way to run all inputs gives the values and gradients of the reference."""
        try:
            results = [_run(self._transformer, one, run) for one in features]
        except Exception as error:
            return self._note(name, False, None, 0.0, first_line(error))
        difference, grown = _furthest(results, self._values), _relative(_total(results), self._gradient)
        value, slope = (VALUE, GRADIENT) if difference <= VALUE and grown <= GRADIENT else self._limits
        ok = self._note(f"{name}: value", difference <= value, difference, value)
        return self._note(f"{name}: gradient", grown <= slope, grown, slope) and ok

    def _pad_without_positions(self) -> None:
        name, texts = "padding, where no positions are given", self._inputs[:2]
        try:
            moved = _apart(_without_positions(self._transformer, texts), self._values[: len(texts)])
        except Exception as error:
            self._note(name, False, None, 0.0, first_line(error))
            raise _UnusableError(
                f"fails without positions, which plain Sentence Transformers does not give ({first_line(error)})"
            ) from error
        allowed = VALUE if moved <= VALUE else self._limits[0]
        untold = allowed == _MOST[0]  # rounding alone may be as large
        if not self._note(name, moved <= allowed or untold, moved, allowed):
            raise _UnusableError(
                "embeds a text otherwise in a padded batch than alone where no positions are given, as plain Sentence Transformers "
                "gives none"
            )


def features_of(transformer: Any, inputs: list[Any]) -> Any:
    """Features of inputs, on the device of the backbone."""
    device = embedding_table(transformer.backbone).device
    features = transformer.preprocess(inputs, keyed=False)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}


def _run(transformer: Any, features: Any, run: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Unit vectors ``(batch, H)``, and the gradient ``(Q, H)`` of a weighted sum of them."""
    queries: nn.Parameter = transformer.queries
    with torch.enable_grad():
        states = run(features).float()
        vectors = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
        (gradient,) = torch.autograd.grad((vectors @ _weights(vectors)).sum(), queries)
    return vectors.detach().cpu(), gradient.cpu()


def _weights(vectors: Tensor) -> Tensor:
    """Of a sum of vectors. The plain sum of what leaves a LayerNorm is constant, whatever entered it."""
    return torch.randn(vectors.shape[-1], generator=torch.Generator().manual_seed(1)).to(vectors.device)


def _without_positions(transformer: Any, texts: list[str]) -> Tensor:
    """Unit vectors ``(batch, H)`` of a padded batch where no positions are given, as plain Sentence Transformers gives none."""
    from slq_embed.prefix.passes import run_all_positions

    decoder = twin_of(transformer.query_decoder)  # some keep what they find of positions for the next pass
    features = features_of(transformer, texts)
    with torch.no_grad():
        states = run_all_positions(decoder, features, transformer.query_inputs(), give_positions=False)
    return torch.nn.functional.normalize(states.float().mean(dim=1), dim=-1).cpu()


def _influence_of_later_tokens(transformer: Any, features: Any) -> float:
    """How much the state of one vector after an input changes with the vector that follows it."""
    from slq_embed.prefix.passes import run_all_positions

    with torch.enable_grad():
        if (queries := transformer.query_inputs()).ndim == 2:
            vectors = queries.detach().repeat(2, 1)[:2].requires_grad_()
            states = run_all_positions(transformer.query_decoder, features, vectors)
        else:  # token ids give the vectors, so there are as many as there are queries
            vectors, states = transformer.queries, transformer.all_positions(features)
        (gradient,) = torch.autograd.grad((states[:, 0].float() @ _weights(states)).sum(), vectors)
    return float(gradient[1:].abs().sum())


def _rounded(transformer: Any, features: Any) -> Tensor:
    """States of the queries where each token embedding, pixel and query is off by a rounding of the backbone's precision."""
    from slq_embed.prefix.features import lay_out
    from slq_embed.prefix.passes import run_all_positions

    features = lay_out(features)
    decoder, table = twin_of(transformer.query_decoder), embedding_table(transformer.backbone)
    generator = torch.Generator().manual_seed(2)

    def signs(*shape: int) -> Tensor:
        return (torch.randint(2, shape, generator=generator) * 2 - 1).to(table.device)

    def off(values: Tensor, signs: Tensor) -> Tensor:
        return (values.float() * (1 + torch.finfo(table.dtype).eps * signs)).to(values.dtype)

    # By token: a backbone finds the places of an image by comparing embeddings with that of the image's token.
    by_token = signs(64, table.shape[1])
    decoder.get_input_embeddings().register_forward_hook(
        lambda layer, args, output: off(output, by_token.to(output.device)[args[0] % 64])
    )
    queries = transformer.query_inputs()
    if queries.ndim == 2:  # else they come from the layer above
        queries = off(queries, signs(*queries.shape))
    pixels = {
        key: off(value, signs(*value.shape).to(value.device))
        for key, value in features.items()
        if key.startswith("pixel_values") and value.is_floating_point()
    }
    return run_all_positions(decoder, {**features, **pixels}, queries)


def _total(results: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((gradient for _, gradient in results), torch.zeros(()))


def _furthest(results: Sequence[tuple[Tensor, Tensor]], values: Tensor) -> float:
    return _apart(torch.cat([value for value, _ in results]), values)


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm().clamp(min=1e-30))


def first_line(error: Exception) -> str:
    """An error in short."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
