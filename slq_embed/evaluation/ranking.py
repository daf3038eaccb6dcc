"""Rankings that never hold all scores at once, and what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2048


def top_k(
    queries: Tensor,
    candidates: Tensor,
    k: int,
    *,
    exclude: Tensor | Sequence[Sequence[int]] | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best candidates of each query by dot product.

    Candidates with equal scores rank in their order. Equal candidates may get scores that differ in the last bit: a matrix product
    rounds by the shape of the block and the place in it. A score that is no number (NaN) never ranks. Scores are computed
    block by block: memory grows with the block and with ``k``, not with queries times candidates.

    Args:
        queries: ``(queries, H)``, any floating dtype; scores are computed in float32.
        candidates: ``(candidates, H)``.
        k: How many results, at least 1.
        exclude: Candidates that a query must not get: ``(queries, n)`` integers with -1 for none, or a list of indices
            for each query. ``torch.arange(n)[:, None]`` leaves out each query itself.
        block: Rows and columns of a block of scores.

    Returns:
        Scores ``(queries, k)`` in float32 and indices ``(queries, k)``, the best first, on the CPU. Where a query has
        fewer than ``k`` candidates, the score is ``-inf`` and the index -1.

    Raises:
        ValueError: If ``k`` or ``block`` is below 1, or ``exclude`` has another length than ``queries``.

    Example:
        >>> scores, indices = top_k(torch.eye(2), torch.tensor([[0.5, 0.0], [1.0, 1.0], [1.0, 0.0]]), 2)
        >>> indices.tolist()
        [[1, 2], [1, 0]]
    """
    if k < 1 or block < 1:
        raise ValueError(f"k is {k} and block is {block}, but both must be at least 1.")
    left_out = _padded(exclude, len(queries))
    scores = torch.full((len(queries), k), -torch.inf)
    indices = torch.full((len(queries), k), -1)
    for first in range(0, len(queries), block):
        rows = queries[first : first + block].float()
        hidden = left_out[first : first + block].to(rows.device)
        best = torch.full((len(rows), k), -torch.inf, device=rows.device)
        index = torch.full((len(rows), k), -1, device=rows.device)  # the first of all equal -inf, so no other stays
        for start in range(0, len(candidates), block):
            part = candidates[start : start + block].to(rows.device).float()
            part_scores = (rows @ part.T).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
            row, column = torch.nonzero((hidden >= start) & (hidden < start + len(part)), as_tuple=True)
            part_scores[row, hidden[row, column] - start] = -torch.inf
            if not bool((part_scores > best[:, -1:]).any()):
                continue  # an equal score that comes later ranks lower
            order = torch.arange(start, start + len(part), device=rows.device).expand(len(rows), -1)
            best, index = _first_best(torch.cat([best, part_scores], dim=1), torch.cat([index, order], dim=1), k)
        scores[first : first + block] = best.cpu()
        indices[first : first + block] = index.cpu()
    return scores, indices


def _padded(exclude: Tensor | Sequence[Sequence[int]] | None, count: int) -> Tensor:
    if exclude is None:
        return torch.empty(count, 0, dtype=torch.long)
    if not isinstance(exclude, Tensor):
        longest = max((len(row) for row in exclude), default=0)
        exclude = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in exclude], dtype=torch.long)
    if len(exclude) != count:
        raise ValueError(f"exclude has {len(exclude)} rows, but there are {count} queries. Pass one row a query.")
    return exclude.reshape(count, -1)


def _first_best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of more than ``k`` scores a row, of equal ones the first; ``torch.topk`` may return any."""
    highest, columns = scores.topk(k + 1, dim=1)
    columns = columns[:, :k]
    tied = torch.nonzero(highest[:, k - 1] == highest[:, k])[:, 0]  # which of these were taken is left to chance
    if len(tied):
        rows, lowest = scores[tied], highest[tied, k - 1 : k]
        above, level = rows > lowest, rows == lowest
        chosen = above | (level & (level.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
        columns[tied] = torch.nonzero(chosen)[:, 1].view(len(tied), k)
    columns = columns.sort(dim=1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, indices.gather(1, columns).gather(1, order)


def order_own(
    queries: Tensor, candidates: Tensor, own: Sequence[Sequence[int] | NDArray[np.integer[Any]]]
) -> list[list[int]]:
    """Rank the candidates that belong to each query.

    Args:
        queries: ``(queries, H)``.
        candidates: ``(candidates, H)``.
        own: For each query, the indices of its candidates.

    Returns:
        For each query, positions in its row of ``own``, the best first. Of equal scores the earlier position comes
        first; a position whose score is no number is left out.

    Example:
        >>> order_own(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.2, 0.0], [0.9, 0.0], [0.5, 0.0]]), [[0, 2]])
        [[1, 0]]
    """
    orders = []
    for query, row in zip(queries.float(), own, strict=True):
        rows = candidates[torch.as_tensor(row, dtype=torch.long, device=candidates.device)].float()
        scores = (rows * query).sum(dim=1)  # not a matrix product: it may round the same row in two ways
        order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices
        orders.append(order[~scores[order].isnan()].tolist())
    return orders


def recall_at(relevance: Tensor, k: int, relevant: Tensor | None = None) -> Tensor:
    """Recall at ``k`` of each query.

    Args:
        relevance: ``(queries, n)`` relevance of each result, the best result first; 0 is not relevant.
        k: How many results count.
        relevant: ``(queries,)`` number of relevant candidates. With it, recall is the share of them that is in the
            top ``k``. Without it, recall is 1 where any is: so image-text retrieval is measured.

    Returns:
        ``(queries,)`` float64.
    """
    hits = (relevance[:, :k] > 0).double()
    return hits.amax(dim=1) if relevant is None else hits.sum(dim=1) / relevant.double()


def mrr_at(relevance: Tensor, k: int) -> Tensor:
    """Reciprocal rank of each query's first relevant result; 0 if none is in the top ``k``.

    Args:
        relevance: As for :func:`recall_at`.
        k: How many results count.

    Returns:
        ``(queries,)`` float64; their mean is MRR at ``k``.
    """
    hits = (relevance[:, :k] > 0).double()
    return (hits / torch.arange(1, hits.shape[1] + 1, device=hits.device)).amax(dim=1)


def ndcg_at(relevance: Tensor, k: int, ideal: Tensor) -> Tensor:
    """Normalised discounted cumulative gain at ``k`` of each query.

    Args:
        relevance: As for :func:`recall_at`; graded or binary.
        k: How many results count.
        ideal: ``(queries, n)`` relevance of all relevant candidates of the query in any order, padded with 0.

    Returns:
        ``(queries,)`` float64; 0 for a query without a relevant candidate.

    Source:
        Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques" (2002), with the gain ``relevance``
        and the discount ``log2(rank + 1)``, as in trec_eval.
    """
    best = _dcg(ideal.sort(dim=1, descending=True).values[:, :k])
    return torch.where(best > 0, _dcg(relevance[:, :k]) / best, 0.0)


def _dcg(relevance: Tensor) -> Tensor:
    discount = torch.arange(2, relevance.shape[1] + 2, device=relevance.device).double().log2()
    return (relevance.double() / discount).sum(dim=1)


def best_ranks(
    queries: Tensor, candidates: Tensor, query_group: Tensor, candidate_group: Tensor, block: int = BLOCK
) -> Tensor:
    """The rank of each query's best relevant candidate, 0 for the top.

    A candidate is relevant if it has the query's group. Candidates with equal scores rank in their order.
    Scores are computed block by block: memory grows with the block, not with queries times candidates.

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
        position = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in starts:
            relevant = groups[:, None] == candidate_group[None, start : start + block]
            scores = (rows @ candidates[start : start + block].float().T).masked_fill(~relevant, -torch.inf)
            # Of equal scores, argmax may return any one, and the first one is needed.
            top = scores.amax(dim=1)
            first = (scores == top[:, None]).int().argmax(dim=1) + start
            better = top > best
            best, position = torch.where(better, top, best), torch.where(better, first, position)
        above = torch.zeros(len(rows), dtype=torch.long, device=device)
        for start in starts:
            scores = rows @ candidates[start : start + block].float().T
            order = torch.arange(start, start + scores.shape[1], device=device)
            # "Not at most" instead of "more than": then NaN counts as ahead, and never makes a hit.
            ahead = ~(scores <= best[:, None]) | ((scores == best[:, None]) & (order[None, :] < position[:, None]))
            above += ahead.sum(dim=1)
        ranks.append(above)
    return torch.cat(ranks).cpu()
