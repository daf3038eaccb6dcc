"""Rankings and metrics: by hand, against a plain sort, and against trec_eval."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slq_embed.evaluation.ranking import best_ranks, mrr_at, ndcg_at, order_own, recall_at, top_k


def simple_ranks(queries, candidates, query_group, candidate_group):
    ranks = []
    for query, group in zip(queries, query_group, strict=True):
        order = np.argsort(-(candidates @ query).numpy(), kind="stable")
        ranks.append(next(i for i, c in enumerate(order) if candidate_group[c] == group))
    return torch.tensor(ranks)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_ranks_equal_a_stable_sort_whatever_the_block(block):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (20, 4), generator=generator).float()  # small integers: many ties, exact scores
    candidates = torch.randint(-2, 3, (31, 4), generator=generator).float()
    groups = torch.cat([torch.arange(10), torch.randint(0, 10, (21,), generator=generator)])
    query_groups = torch.randint(0, 10, (20,), generator=generator)
    assert torch.equal(
        best_ranks(queries, candidates, query_groups, groups, block),
        simple_ranks(queries, candidates, query_groups, groups),
    )


def test_a_score_that_is_no_number_is_no_hit():
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    no_numbers = torch.full((3, 2), torch.nan)
    ranks = best_ranks(no_numbers, candidates, torch.arange(3), torch.arange(3))
    assert (ranks > 0).all()
    assert (top_k(no_numbers, candidates, 2)[1] == -1).all()
    assert order_own(no_numbers, candidates, [[0, 1]] * 3) == [[], [], []]
    candidates[1] = torch.nan
    assert top_k(torch.ones(1, 2), candidates, 3)[1].tolist() == [[2, 0, -1]]
    assert order_own(torch.ones(1, 2), candidates, [[1, 0, 2]]) == [[2, 1]]


@pytest.mark.parametrize("count", [2, 5, 6, 10, 21])
def test_a_candidate_that_comes_twice_ranks_where_it_comes_first(count):
    """MMEB lists some answers twice. A matrix product rounds the last rows in another way than the others."""
    generator = torch.Generator().manual_seed(2)
    queries, candidates = (torch.randn(n, 896, generator=generator) for n in (50, count))
    own = [[n % count, *range(count)] for n in range(50)]
    orders = order_own(queries, candidates, own)
    assert all(order.index(0) < order.index(1 + row[0]) for order, row in zip(orders, own, strict=True))


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("k", [1, 5, 31, 40])
def test_the_top_k_equals_a_stable_sort_whatever_the_block(block, k):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(-2, 3, (20, 4), generator=generator).float()
    candidates = torch.randint(-2, 3, (31, 4), generator=generator).float()
    exclude = [torch.randint(0, 31, (n % 4,), generator=generator).tolist() for n in range(20)]
    scores, indices = top_k(queries, candidates, k, exclude=exclude, block=block)
    assert scores.shape == indices.shape == (20, k)
    for row, query in enumerate(queries):
        all_scores = (candidates @ query).numpy()
        order = [c for c in np.argsort(-all_scores, kind="stable") if c not in exclude[row]][:k]
        assert indices[row].tolist() == order + [-1] * (k - len(order))
        assert scores[row, : len(order)].tolist() == all_scores[order].tolist()
        assert (scores[row, len(order) :] == -torch.inf).all()


def test_each_query_itself_can_be_left_out():
    rows = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert top_k(rows, rows, 1, block=4)[1][:, 0].tolist() == list(range(9))
    without = top_k(rows, rows, 8, exclude=torch.arange(9)[:, None], block=4)[1]
    assert all(sorted(row) == [n for n in range(9) if n != i] for i, row in enumerate(without.tolist()))


def test_no_matrix_of_all_scores_is_made(monkeypatch):
    """The largest tensor has the size of a block and the results, however many candidates there are."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                part.numel()
                for part in (result if isinstance(result, tuple | list) else [result])
                if isinstance(part, torch.Tensor) and part.untyped_storage().nbytes() > 0
            )
            return result

    queries, candidates = torch.randn(300, 2), torch.randn(500, 2)
    with Watch():
        top_k(queries, candidates, 5, exclude=torch.arange(300)[:, None], block=10)
    assert max(sizes) <= 300 * 5
    with pytest.raises(ValueError, match="k is 0 and block is 10, but both must be at least 1"):
        top_k(queries, candidates, 0, block=10)
    with pytest.raises(ValueError, match="exclude has 1 rows, but there are 300 queries"):
        top_k(queries, candidates, 1, exclude=[[0]])


def test_metrics_by_hand():
    """Query 0 finds its two candidates at ranks 2 and 4, query 1 finds none of one, query 2 its best one first."""
    relevance = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [3, 0, 1, 0]])
    ideal = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 3, 2]])
    assert recall_at(relevance, 1).tolist() == [0, 0, 1]
    assert recall_at(relevance, 2).tolist() == [1, 0, 1]
    assert recall_at(relevance, 2, torch.tensor([2, 1, 3])).tolist() == pytest.approx([1 / 2, 0, 1 / 3])
    assert mrr_at(relevance, 4).tolist() == [1 / 2, 0, 1]
    assert mrr_at(relevance, 1).tolist() == [0, 0, 1]
    two = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    three = (3 + 1 / np.log2(4)) / (3 + 2 / np.log2(3) + 1 / np.log2(4))
    assert ndcg_at(relevance, 4, ideal).tolist() == pytest.approx([two, 0, three])
    assert ndcg_at(relevance, 1, ideal).tolist() == [0, 0, 1]
    assert ndcg_at(torch.zeros(1, 3), 3, torch.zeros(1, 2)).tolist() == [0]


def test_metrics_equal_those_of_trec_eval():
    """On random scores and graded relevance."""
    trec = pytest.importorskip("pytrec_eval")
    generator = torch.Generator().manual_seed(3)
    queries, candidates = torch.randn(40, 8, generator=generator), torch.randn(60, 8, generator=generator)
    grades = torch.randint(0, 4, (40, 60), generator=generator) * (torch.rand(40, 60, generator=generator) < 0.1)
    grades[:, 0] = 1  # each query has at least one
    scores, indices = top_k(queries, candidates, 10, block=16)
    relevance = grades.gather(1, indices)
    judged = {str(q): {str(c): int(g) for c, g in enumerate(row)} for q, row in enumerate(grades)}
    run = {
        str(q): {str(int(c)): float(s) for c, s in zip(indices[q], scores[q], strict=True)} for q in range(len(scores))
    }
    measured = trec.RelevanceEvaluator(judged, {"recall.5,10", "success.1,5,10", "recip_rank", "ndcg_cut.5,10"})
    expected = measured.evaluate(run)

    def of(name):
        return pytest.approx([expected[str(q)][name] for q in range(40)], abs=1e-6)

    for k in (5, 10):
        assert recall_at(relevance, k, (grades > 0).sum(dim=1)).tolist() == of(f"recall_{k}")
        assert recall_at(relevance, k).tolist() == of(f"success_{k}")
        assert ndcg_at(relevance, k, grades).tolist() == of(f"ndcg_cut_{k}")
    assert mrr_at(relevance, 10).tolist() == of("recip_rank")
    whole = [np.argsort(-(candidates @ query).numpy())[:10].tolist() for query in queries]
    assert indices.tolist() == whole
