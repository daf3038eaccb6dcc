"""Learning rates by part: what the host's trainer makes of them."""

from __future__ import annotations

import pytest
from sentence_transformers import SentenceTransformerTrainer

from slq_embed import SymmetricInfoNCELoss
from slq_embed.training import learning_rate_mapping, sweep
from slq_embed.training.learning_rates import DEEP_QUERIES, PROJECTION, QUERY_ADAPTER
from tests.parts import PARTS, SMALL, build
from tests.training import arguments, toy_pairs


def rates(trainer) -> dict[str, float]:
    """Learning rate of each parameter of the loss, by name; each is in one group."""
    names = {id(weight): name for name, weight in trainer.loss.named_parameters()}
    found: dict[str, float] = {}
    for group in trainer.create_optimizer().param_groups:
        for weight in group["params"]:
            assert names[id(weight)] not in found
            found[names[id(weight)]] = group["lr"]
    assert found.keys() == set(names.values())
    return found


def expected(model, prefix: str, queries: float, projection: float, adapter: float) -> dict[str, float]:
    by_part = {"0.bias.deep": DEEP_QUERIES, "0.bias.": queries, "1.bias.": queries}
    by_part |= {"2.linear.": projection, "0.query_adapter.": adapter}
    return {
        prefix + name: next(rate for start, rate in by_part.items() if name.startswith(start))
        for name, _ in model.named_parameters()
    }


def test_queries_alone_need_no_mapping(encoder):
    assert learning_rate_mapping(encoder) == {}
    assert learning_rate_mapping(encoder, projection=1.0, query_adapter=1.0) == {}


@pytest.mark.parametrize("parts", PARTS)
def test_there_is_a_rate_for_each_part(checkpoint, parts):
    """Weights of the queries are of the queries' scale, and keep their rate."""
    assert len(learning_rate_mapping(build(checkpoint, **PARTS[parts]))) == len(PARTS[parts].keys() - {"pooling"})


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("given", [{}, {"projection": 0.3, "query_adapter": 0.4}])
def test_each_part_reaches_the_optimizer_with_its_rate(checkpoint, parts, given, tmp_path):
    encoder = build(checkpoint, **PARTS[parts])
    loss = SymmetricInfoNCELoss(encoder)
    mapping = learning_rate_mapping(encoder, **given)
    args = arguments(tmp_path, learning_rate=0.03, learning_rate_mapping=mapping)
    trainer = SentenceTransformerTrainer(encoder, args, train_dataset=toy_pairs().dataset, loss=loss)
    of_head, of_adapter = given.get("projection", PROJECTION), given.get("query_adapter", QUERY_ADAPTER)
    assert rates(trainer) == expected(encoder, "model.", 0.03, of_head, of_adapter)


@pytest.fixture
def swept(monkeypatch):
    """Runs a sweep of no step; returns the rates that its trainer would use."""

    def run(encoder, args, variants) -> tuple[dict[str, float], list]:
        found: list[dict[str, float]] = []

        def record(trainer) -> None:
            found.append(rates(trainer))
            trainer.loss.history.append([0.0] * len(variants))

        monkeypatch.setattr(SentenceTransformerTrainer, "train", record)
        result = sweep(encoder, args, toy_pairs().dataset, variants)
        return found[0], [variant.encoder for variant in result.variants]

    return run


def test_a_variant_uses_the_same_rates(checkpoint, swept, tmp_path):
    encoder = build(checkpoint)
    variants = [
        {"projection": 8, "query_adapter": SMALL},
        {"projection": 8, "learning_rate": 0.5},
        {"query_adapter": SMALL, "learning_rate": {r"\bqueries$": 0.6, r"lora_A": 0.7, r"lora_B": 0.8}},
        {"seed": 1},
    ]
    found, (both, head, patterns, plain) = swept(encoder, arguments(tmp_path, learning_rate=0.02), variants)
    every = expected(both, "losses.0.model.", 0.02, PROJECTION, QUERY_ADAPTER)
    every |= expected(head, "losses.1.model.", 0.5, PROJECTION, QUERY_ADAPTER)
    every |= expected(plain, "losses.3.model.", 0.02, 0, 0)
    for name, _ in patterns.named_parameters():
        rate = next((rate for part, rate in (("queries", 0.6), ("lora_A", 0.7), ("lora_B", 0.8)) if part in name), 0.02)
        every[f"losses.2.model.{name}"] = rate
    assert found == every


def test_the_rates_of_the_arguments_hold_for_every_variant(checkpoint, swept, tmp_path):
    encoder = build(checkpoint, projection=8)
    mapping = learning_rate_mapping(encoder, projection=0.3)
    args = arguments(tmp_path, learning_rate=0.02, learning_rate_mapping=mapping)
    found, (first, second) = swept(encoder, args, [{"seed": 1}, {"seed": 2, "projection": 16}])
    assert found == expected(first, "losses.0.model.", 0.02, 0.3, 0) | expected(second, "losses.1.model.", 0.02, 0.3, 0)


def test_the_rates_of_the_arguments_may_name_a_part_that_a_variant_lacks(checkpoint, swept, tmp_path):
    encoder = build(checkpoint, projection=8)
    args = arguments(tmp_path, learning_rate=0.02, learning_rate_mapping=learning_rate_mapping(encoder, projection=0.3))
    found, (head, plain) = swept(encoder, args, [{"seed": 1}, {"seed": 2, "projection": False}])
    assert found == expected(head, "losses.0.model.", 0.02, 0.3, 0) | expected(plain, "losses.1.model.", 0.02, 0, 0)
