"""The paper's loss on batches that do not fit: embeddings of the whole batch, gradients chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator
from torch import Tensor

from slq_embed.encoder import SLQEncoder
from slq_embed.training.losses import SymmetricInfoNCELoss


@dataclass
class _Step:
    """The temperature in one step: a copy of its logarithm, the chunks that share its gradient, how the loss is scaled."""

    log_temperature: Tensor
    chunks: int = 0
    scale: float | Tensor = 1.0

    def set_scale(self, gradient: Tensor) -> None:
        self.scale = gradient


class _Column(dict[str, Any]):
    """Features of a column, and their step: other batches may come between its two passes."""

    def __init__(self, features: dict[str, Tensor], step: _Step) -> None:
        super().__init__(features)
        self.step = step


class _Attach(torch.autograd.Function):
    """Embeddings as they are; in the backward pass, a parameter gets a gradient that is known already."""

    # DDP passes all outputs of a forward pass through one node of autograd: both gradients must come in one backward pass.
    # Hosts before 6.2 synchronise after each chunk, and not after the last alone: so each chunk brings its share.

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.saved_tensors[0], None


class CachedSymmetricInfoNCELoss(CachedLossMixin, SymmetricInfoNCELoss):
    """:class:`SymmetricInfoNCELoss` with the memory of a chunk: the same value and gradients for any batch.

    The batch is embedded chunk by chunk without gradients. The loss over all its embeddings gives their gradients. Then
    each chunk is embedded again with gradients. Only one chunk of keys and values is differentiated at a time. Prefixes of
    the first pass serve the second one as far as memory allows; see :class:`~slq_embed.prefix.step_memory.StepMemory`.

    Args:
        model: As for :class:`SymmetricInfoNCELoss`.
        temperature: As for :class:`SymmetricInfoNCELoss`.
        mini_batch_size: Rows of a chunk. It changes memory and time, and not what is learned.
        show_progress_bar: Whether to show the chunks of each step.
        **options: ``min_temperature``, ``max_temperature``, ``gather_across_devices`` and ``positives``, as for
            :class:`SymmetricInfoNCELoss`.

    Raises:
        ValueError: If ``mini_batch_size`` is below 1, or a temperature does not fit.

    Source:
        GradCache, arXiv:2101.06983, as Sentence Transformers has it; the loss of arXiv:2604.13710.
    """

    def __init__(
        self,
        model: SLQEncoder,
        temperature: float | None = None,
        *,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size is {mini_batch_size}, but at least 1 is needed.")
        super().__init__(model, temperature, **options)
        self.mini_batch_size, self.show_progress_bar = mini_batch_size, show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch; arguments and errors as in :meth:`SymmetricInfoNCELoss.forward`."""
        columns = self.checked(sentence_features, labels)
        # The host takes gradients of the embeddings before the outer backward pass. This loss does the same with that of the
        # temperature, from a copy, and hands it to the parameter in the second pass: see embed_minibatch.
        step = self._step = _Step(self._log_temperature[0].detach().clone().requires_grad_())
        loss: Tensor = super().forward_cached([_Column(features, step) for features in columns], labels)
        if not torch.is_grad_enabled():
            return loss
        scaled = loss * 1.0  # a node before the host's, which learns first how the loss is scaled
        scaled.register_hook(step.set_scale)
        return scaled

    def embed_minibatch(self, sentence_feature: _Column, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Embed a chunk; called by Sentence Transformers. In the second pass each chunk takes its share of the temperature's gradient.

        The share goes to the temperature as the model gave it out: in several processes, DDP waits for it there.
        """
        outputs: list[dict[str, Tensor]] = []
        handle = self.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            embeddings, random_state = super().embed_minibatch(sentence_feature, *args, **kwargs)
        finally:
            handle.remove()
        step = sentence_feature.step
        if not embeddings.requires_grad:
            step.chunks += 1
            return embeddings, random_state
        gradient = step.log_temperature.grad
        assert gradient is not None
        share = step.scale * gradient / step.chunks
        return _Attach.apply(embeddings, outputs[0]["log_temperature"], share), random_state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of all embeddings; called by Sentence Transformers between its two passes.

        Args:
            reps: For each column its embeddings, ``(chunk, H)`` a chunk.
            labels: As for ``forward``.
            with_backward: Whether to backpropagate to the embeddings.

        Returns:
            A scalar.
        """
        log_temperature = self._step.log_temperature.clone()
        if with_backward:
            weight = self._weight_of(reps[0][0].shape[-1])
            log_temperature.register_hook(lambda gradient: weight * gradient)
        loss = self._of_embeddings(map(torch.cat, reps), log_temperature, labels)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()

    def _weight_of(self, width: int) -> float:
        """The weight of embeddings of this width. MatryoshkaLoss wraps ``calculate_loss``, and weighs their gradients only."""
        wrapped: Any = self.calculate_loss
        if not isinstance(wrapped, CachedLossDecorator):
            return 1.0
        return dict(zip(wrapped.matryoshka_dims, wrapped.matryoshka_weights, strict=True))[width]

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}
