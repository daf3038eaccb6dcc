"""Several query sets in one training: each as if trained alone, for one run of the prefixes."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer import losses

from slq_embed import PrefixStore, SLQEncoder, SymmetricInfoNCELoss
from slq_embed.data import retrieval_set
from slq_embed.evaluation import ImageTextRetrievalEvaluator
from slq_embed.training import sweep
from slq_embed.training.sweep import Sweep, Variant
from tests.integration.test_prefix_reuse import counting
from tests.training import arguments, toy_pairs, toy_train

VARIANTS = [
    {"num_queries": 4, "seed": 1, "learning_rate": 0.05},
    {"num_queries": 2, "seed": 2, "learning_rate": 0.2, "temperature": 0.2},
    {"num_queries": 6, "seed": 3, "pooling": "last"},
    {"num_queries": 3, "seed": 4, "pooling": "weighted"},
]


@pytest.mark.parametrize(("stored", "bf16"), [(False, False), (True, False), (False, True)])
def test_each_variant_is_what_it_would_be_alone(encoder, tmp_path, monkeypatch, stored, bf16):
    pairs = toy_pairs()
    before = encoder.queries.detach().clone()
    if stored:
        encoder.prefix_store = PrefixStore(tmp_path / "prefixes")
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "bf16": bf16,
    }
    with counting(monkeypatch) as rows:
        result = sweep(
            encoder,
            arguments(tmp_path, **settings),
            pairs.dataset,
            VARIANTS,
            evaluator=ImageTextRetrievalEvaluator(*retrieval_set(pairs)),
        )
    assert torch.equal(before, encoder.queries)
    assert (encoder.prefix_store is not None) == stored
    # Without a store, each of the six steps runs its eight rows once for all; the evaluation, 16 rows once. With one, the evaluation
    # runs its eight images alone: they are undecoded, and so have other keys than those of the training.
    assert rows == {"run_prefix": 16 + 8 if stored else 6 * 8 + 16}
    for settings_of, variant in zip(VARIANTS, result.variants, strict=True):
        alone = SLQEncoder.from_backbone(
            encoder.backbone,
            backbone_name=encoder.slq_config.backbone,
            num_queries=settings_of["num_queries"],
            seed=settings_of["seed"],
            pooling=settings_of.get("pooling", "mean"),
        )
        loss = SymmetricInfoNCELoss(alone, settings_of.get("temperature"))
        own = {**settings, "learning_rate": settings_of.get("learning_rate", 0.01)}
        trainer = toy_train(alone, pairs, tmp_path, loss=loss, **own)
        weights, expected = variant.encoder.state_dict(), alone.state_dict()
        assert weights.keys() == expected.keys()
        assert all((weights[name] - expected[name]).abs().max() < 1e-5 for name in weights)
        assert variant.encoder.model_card_data.loss_name == "SymmetricInfoNCELoss"
        assert variant.encoder.temperature == pytest.approx(alone.temperature, rel=1e-5)
        assert variant.loss == pytest.approx(trainer.state.log_history[-2]["loss"], rel=1e-4)
    metric = result.primary_metric
    assert result.best.metrics[metric] == max(variant.metrics[metric] for variant in result.variants)
    table = str(result).splitlines()
    assert len(table) == 5
    assert table[0].split() == ["num_queries", "seed", "learning_rate", "temperature", "pooling", "loss", metric]
    assert sum(line.endswith(" *") for line in table) == 1
    result.best.encoder.save_pretrained(str(tmp_path / "best"))
    again = SLQEncoder(str(tmp_path / "best"))
    assert abs(again.encode("hello") - result.best.encoder.encode("hello")).max() < 1e-6


def test_a_cached_loss_sweeps_too(encoder, tmp_path, monkeypatch):
    def cached(model, mini_batch_size=2):
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)

    with counting(monkeypatch) as rows:
        result = sweep(
            encoder,
            arguments(tmp_path, max_steps=2),
            toy_pairs().dataset,
            [{"seed": 1}, {"seed": 2, "mini_batch_size": 4}],
            loss=cached,
        )
    assert rows == {"run_prefix": 16}
    assert result.primary_metric is None
    assert result.best.loss == min(variant.loss for variant in result.variants)


def test_a_sweep_of_nothing_is_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="at least one variant"):
        sweep(encoder, arguments(tmp_path), toy_pairs().dataset, [])


@pytest.mark.parametrize("variants", [{"num_queries": 4}, [4, 8]])
def test_variants_that_are_no_dicts_are_refused(encoder, tmp_path, variants):
    with pytest.raises(ValueError, match=r"variants is .*, but a list of dicts is needed"):
        sweep(encoder, arguments(tmp_path), toy_pairs().dataset, variants)


@pytest.mark.parametrize(("greater_is_better", "best"), [(True, 0.9), (False, 0.1)])
def test_the_best_of_a_metric_may_be_its_least(encoder, greater_is_better, best):
    variants = [Variant({}, encoder, metrics={"m": value}) for value in (0.5, 0.1, 0.9)]
    assert Sweep(variants, "m", greater_is_better).best.metrics["m"] == best


def test_a_sweep_in_several_processes_is_refused(encoder, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(
        ValueError, match=r"A sweep trains in one process, but there are 2\. Start it without a launcher"
    ):
        sweep(encoder, args, toy_pairs().dataset, VARIANTS)


def test_a_setting_that_nothing_takes_is_named(encoder, tmp_path):
    with pytest.raises(
        TypeError, match=r"The variant \{'lr': 0.1\} does not fit: .*'lr'.* one of deep_queries, init, learning_rate"
    ):
        sweep(encoder, arguments(tmp_path), toy_pairs().dataset, [{"lr": 0.1}])


def test_other_queries_read_their_inputs_alike(checkpoint, images, tmp_path):
    first = SLQEncoder.from_backbone(
        checkpoint(), num_queries=4, seed=0, max_pixels=1024, instructions={"text": "Say {text}."}, device="cpu"
    )
    first.save_pretrained(str(tmp_path / "first"))
    for model in (first, SLQEncoder(str(tmp_path / "first"))):
        other = model.with_queries(6, seed=5)
        assert other.backbone is model.backbone
        results = model.encode([images[0], "x"], query_sets={"other": other})["other"]
        assert abs(results - other.encode([images[0], "x"])).max() < 1e-6
        other.save_pretrained(str(tmp_path / "other"))
        assert abs(results - SLQEncoder(str(tmp_path / "other")).encode([images[0], "x"])).max() < 1e-6
