"""The states at the last positions of a prompt, which vLLM may compute in several steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_tail(kept: list[Tensor], states: Tensor, end: int, length: int, count: int) -> Tensor | None:
    """Keep what a step computed of the last positions; give all of them after the last step.

    Args:
        kept: What earlier steps kept of this prompt; changed in place. Emptied with the last step.
        states: ``(tokens, H)``, what this step computed.
        end: How many tokens of the prompt are computed after this step.
        length: How many tokens the prompt has.
        count: How many positions, counted from the last, are needed.

    Returns:
        ``(count, H)`` after the last step, and None before it. Fewer rows, if positions were never computed, because
        vLLM read them from its prefix cache.

    Example:
        >>> kept, prompt = [], torch.arange(5.0)[:, None]
        >>> keep_tail(kept, prompt[:4], end=4, length=5, count=2) is None
        True
        >>> keep_tail(kept, prompt[4:], end=5, length=5, count=2).flatten()
        tensor([3., 4.])
    """
    start, first = end - len(states), length - count
    if start <= first:
        kept.clear()  # a prompt that was put off begins anew
    if end > first:
        # A copy: the next step may overwrite the buffer.
        kept.append(states[max(first - start, 0) :].clone())
    if end < length:
        return None
    tail = torch.cat(kept)
    kept.clear()
    return tail


def ends_with(ids: Tensor, length: int, query_ids: Sequence[int]) -> bool:
    """Whether the first ``length`` of the token ids end with those of the queries."""
    return length >= len(query_ids) and ids[length - len(query_ids) : length].tolist() == list(query_ids)
