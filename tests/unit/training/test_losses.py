from __future__ import annotations

import logging
import math

import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import SymmetricInfoNCELoss
from slq_embed.modules import LatentQueryPooling
from slq_embed.training import CachedSymmetricInfoNCELoss
from slq_embed.training.losses import symmetric_info_nce


def normal(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_it_equals_a_hand_computed_loss():
    first, second = normal([1, 0], [0, 1]), normal([1, 0], [1, 1])
    s = [[1.0, math.sqrt(0.5)], [0.0, math.sqrt(0.5)]]
    tau = 0.5

    def cross_entropy(rows):
        terms = [math.log(sum(math.exp(v / tau) for v in row)) - row[i] / tau for i, row in enumerate(rows)]
        return sum(terms) / len(terms)

    expected = (cross_entropy(s) + cross_entropy(list(map(list, zip(*s, strict=True))))) / 2
    assert symmetric_info_nce(first, second, torch.tensor(tau)).item() == pytest.approx(expected, abs=1e-6)


def test_similarities_are_exact_where_a_trainer_computes_in_half_precision(encoder):
    """At the smallest temperature, gradients of bfloat16 similarities were a quarter off."""
    loss = SymmetricInfoNCELoss(encoder, temperature=0.01)
    columns = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)) + torch.ones(32)
    exact = loss._of_embeddings(columns, loss._log_temperature[0], None)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss._of_embeddings(columns, loss._log_temperature[0], None).item() == exact.item()


def test_a_sibling_caption_is_no_negative():
    first = normal([1.0, 0.1], [1.0, 0.2], [0.0, 1.0])
    second = normal([1.0, 0.0], [0.9, 0.1], [0.1, 1.0])
    siblings = symmetric_info_nce(first, second, torch.tensor(0.1), torch.tensor([7, 7, 8]))
    rows = [0, 2], [1, 2]
    apart = [symmetric_info_nce(first[r], second[r], torch.tensor(0.1)) for r in rows]
    assert siblings < symmetric_info_nce(first, second, torch.tensor(0.1))
    assert siblings < sum(apart)
    # Row 0 sees candidates 0 and 2, exactly as without its sibling.
    logits = (first @ second.T / 0.1).masked_fill(torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool(), -torch.inf)
    target = torch.arange(3)
    both = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    assert siblings.item() == pytest.approx(both.item(), abs=1e-6)


def test_it_is_the_hosts_symmetric_loss_at_the_same_scale(encoder, images):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    both = ("query_to_doc", "doc_to_query")
    host = MultipleNegativesRankingLoss(encoder, scale=1 / 0.07, directions=both, partition_mode="per_direction")

    def features():
        return [encoder.preprocess(images[:3]), encoder.preprocess(["a", "bb", "ccc"])]

    ours = SymmetricInfoNCELoss(encoder)(features(), torch.arange(3))
    assert ours.item() == pytest.approx(host(features(), None).item(), rel=1e-5)


def test_the_temperature_starts_at_007_is_clamped_and_lives_in_the_model(encoder):
    loss = SymmetricInfoNCELoss(encoder)
    assert encoder.temperature == pytest.approx(0.07)
    names = [name for name, _ in loss.named_parameters()]
    assert names == ["model.0.bias.queries", "model.0.bias.log_temperature"]
    with torch.no_grad():
        encoder.transformer.log_temperature.fill_(-30)
    loss([encoder.preprocess(["a", "b"]), encoder.preprocess(["cc", "dd"])]).backward()
    assert loss.temperature == pytest.approx(0.01)
    assert SymmetricInfoNCELoss(encoder).temperature == pytest.approx(0.01), "trained to the bound, it trains on"
    assert encoder.transformer.log_temperature.grad != 0, "a clamped temperature must be able to come back"
    assert SymmetricInfoNCELoss(encoder, 0.2).temperature == pytest.approx(0.2)
    assert loss.temperature == pytest.approx(0.2), "all losses of a model share it"
    assert SymmetricInfoNCELoss(encoder).temperature == pytest.approx(0.2)
    for outside in (5, 0.0):
        with pytest.raises(ValueError, match=f"temperature is {outside}"):
            SymmetricInfoNCELoss(encoder, outside)


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.0), (-1.0, 1.0), (0.5, 0.1)])
def test_bounds_that_do_not_fit_are_refused(encoder, least, most):
    """Else the clamp of the logarithm ends in a math domain error, or in a temperature outside of the bounds."""
    with pytest.raises(ValueError, match=f"bounded by {least} and {most}"):
        SymmetricInfoNCELoss(encoder, 0.2, min_temperature=least, max_temperature=most)


def test_hard_negatives_join_the_candidates_of_their_own_row():
    first, second, negative = normal([1, 0], [0, 1]), normal([1, 0], [1, 1]), normal([1, 1], [1, 0])
    tau, root = 0.5, math.sqrt(0.5)

    def cross_entropy(rows):
        terms = [math.log(sum(math.exp(v / tau) for v in row)) - row[i] / tau for i, row in enumerate(rows)]
        return sum(terms) / len(terms)

    there = [[1.0, root, root], [0.0, root, 0.0]]  # the last: row 0 with negative 0, row 1 with negative 1
    back = [[1.0, 0.0], [root, root]]
    expected = (cross_entropy(there) + cross_entropy(back)) / 2
    loss = symmetric_info_nce(first, second, torch.tensor(tau), negatives=[negative])
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    siblings = symmetric_info_nce(first, second, torch.tensor(tau), torch.tensor([7, 7]), negatives=[negative])
    expected = (cross_entropy([[1.0, root]]) - math.log(1 / (1 + math.exp(-root / tau)))) / 2 / 2
    assert siblings.item() == pytest.approx(expected, abs=1e-6), "siblings stay out, negatives stay in"


def test_all_siblings_can_be_positives():
    """Equation 2 of arXiv:2004.11362, from column to column: the mean over a row's positives, then over rows."""
    first, second = normal([1.0, 0.1], [1.0, 0.2], [0.0, 1.0]), normal([1.0, 0.0], [0.9, 0.1], [0.1, 1.0])
    negative, tau, positives = normal([1, 1], [1, 2], [1, 3]), 0.1, [[0, 1], [0, 1], [2]]

    def supervised(similarities, extra):
        total = 0.0
        for i, row in enumerate(similarities.tolist()):
            log_sum = math.log(sum(math.exp(v / tau) for v in [*row, *extra[i]]))
            total -= sum(row[p] / tau - log_sum for p in positives[i]) / len(positives[i])
        return total / len(similarities)

    own = (first * negative).sum(dim=1, keepdim=True).tolist()
    expected = (supervised(first @ second.T, own) + supervised(second @ first.T, [[]] * 3)) / 2
    loss = symmetric_info_nce(first, second, torch.tensor(tau), torch.tensor([7, 7, 8]), False, [negative], "all")
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    alone = symmetric_info_nce(first, second, torch.tensor(tau), torch.arange(3), positives="all")
    assert alone.item() == pytest.approx(symmetric_info_nce(first, second, torch.tensor(tau)).item(), abs=1e-6)


def test_columns_and_positives_that_do_not_fit_are_refused(encoder):
    with pytest.raises(ValueError, match="compares two columns, but the batch has 1"):
        SymmetricInfoNCELoss(encoder)([encoder.preprocess(["a"])])
    with pytest.raises(ValueError, match="positives is 'some', but one of"):
        SymmetricInfoNCELoss(encoder, positives="some")
    with pytest.raises(ValueError, match='needs a column "label" in the dataset'):
        SymmetricInfoNCELoss(encoder, positives="all")([encoder.preprocess(["a"]) for _ in range(2)])
    assert SymmetricInfoNCELoss(encoder, positives="all").get_config_dict()["positives"] == "all"


BATCHES = {
    "one pair": ([["a"], ["b"]], None, "is one pair"),
    "captions of one image": ([["a", "a"], ["b", "c"]], torch.tensor([5, 5]), "has 2 pairs with one label"),
    "two images": ([["a", "a"], ["b", "c"]], torch.tensor([5, 6]), None),
    "no labels": ([["a", "a"], ["b", "c"]], None, None),
    "hard negatives": ([["a"], ["b"], ["c"]], None, None),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", [SymmetricInfoNCELoss, CachedSymmetricInfoNCELoss])
def test_a_first_batch_without_negatives_is_said_once(encoder, caplog, kind, batch):
    """Its loss is 0 whatever the embeddings are, and a run would end as if all were well."""
    columns, labels, problem = BATCHES[batch]
    loss = kind(encoder)

    def step(columns, labels):
        loss([encoder.preprocess(column) for column in columns], labels)

    with caplog.at_level(logging.WARNING):
        with torch.no_grad():
            step([["a"], ["b"]], None)  # an evaluation may have such a batch
        assert not caplog.messages
        step(columns, labels)
        step([["a"], ["b"]], None)  # as the last batch of an epoch may be
    assert len(caplog.messages) == (problem is not None)
    assert problem is None or f"The first batch {problem}, so it has no negatives" in caplog.messages[0]


def test_negatives_that_other_processes_share_are_negatives(encoder, caplog, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    loss = SymmetricInfoNCELoss(encoder, gather_across_devices=True)
    with caplog.at_level(logging.WARNING):
        loss.look_for_negatives(1, None, hard=False)
        assert not caplog.messages
        SymmetricInfoNCELoss(encoder).look_for_negatives(1, None, hard=False)  # here they do not share
    assert len(caplog.messages) == 1


def test_a_plain_sentence_transformer_is_refused(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model is a SentenceTransformer, but .* SLQEncoder\(folder\)"):
        SymmetricInfoNCELoss(SentenceTransformer(str(tmp_path), device="cpu"))


def test_the_last_query_can_be_pooled_alone():
    states = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(LatentQueryPooling(4, "last")({"token_embeddings": states})["sentence_embedding"], states[:, -1])
    with pytest.raises(ValueError, match="pooling is 'max'"):
        LatentQueryPooling(4, "max")


def test_queries_can_have_learned_weights():
    """They start equal. Then they are a softmax: only differences of the scores count."""
    pooling, states = LatentQueryPooling(4, "weighted", num_queries=3), torch.randn(2, 3, 4)
    mean = LatentQueryPooling(4)({"token_embeddings": states})["sentence_embedding"]
    assert torch.allclose(pooling({"token_embeddings": states})["sentence_embedding"], mean, atol=1e-6)
    pooling.load_state_dict({"bias.scores": torch.tensor([0.0, math.log(2), -math.inf]) + 5})
    found = pooling.half()({"token_embeddings": states})["sentence_embedding"]  # the scores stay float32
    assert torch.allclose(found, states[:, 0] / 3 + states[:, 1] * 2 / 3, atol=1e-6)
    found.sum().backward()
    assert pooling.bias["scores"].grad.dtype == torch.float32
    with pytest.raises(ValueError, match="num_queries is None: a score for each query"):
        LatentQueryPooling(4, "weighted")


def test_a_pooling_alone_is_not_saved_without_its_weights(tmp_path):
    with pytest.raises(RuntimeError, match="saved by SLQEncoder"):
        LatentQueryPooling(4, "weighted", num_queries=3).save(str(tmp_path))
