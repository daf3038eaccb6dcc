"""Training a head and an adapter: the host's losses, checkpoints, resuming, sweeps, query sets and forgetting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback

from slq_embed import PrefixStore, QueryAdapter, SLQEncoder, SymmetricInfoNCELoss
from slq_embed.data import ImageTextPairs
from slq_embed.training import learning_rate_mapping, sweep
from tests.contract.test_invariants import digest
from tests.integration.test_prefix_reuse import counting
from tests.integration.test_training import LOSSES, RESUMABLE, Kill, KilledError, history
from tests.parts import PARTS, SMALL, build, copy_of_weights, furthest, on, same_weights, trained
from tests.training import arguments, toy_pairs, toy_train

EVERY_PART = pytest.mark.parametrize("parts", PARTS)


def start(checkpoint, parts: str) -> SLQEncoder:
    torch.manual_seed(0)
    return build(checkpoint, **PARTS[parts])


@pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_all_parts_and_not_the_backbone(checkpoint, name, tmp_path):
    encoder = build(checkpoint, projection=True, query_adapter=SMALL)
    loss, weights = LOSSES[name](encoder), digest(encoder.backbone)
    before = copy_of_weights(encoder)
    toy_train(encoder, toy_pairs(), tmp_path, loss=loss, max_steps=2)
    after = encoder.state_dict()
    assert {key for key, value in before.items() if torch.equal(value, after[key])} == set()
    assert digest(encoder.backbone) == weights


@pytest.mark.parametrize("parts", ["head", "both"])
def test_training_computes_each_prefix_once_and_the_queries_alone_are_differentiated(checkpoint, parts, monkeypatch):
    encoder = start(checkpoint, parts).train()
    with counting(monkeypatch) as rows:
        features = encoder.preprocess(["a", "b", "a"], keyed=True)
        encoder(features)["sentence_embedding"].sum().backward()
    assert rows == {"run_prefix": 2}
    assert all(weight.grad is not None for weight in encoder.parameters())


def test_autocast_trains_float32_weights(checkpoint, tmp_path):
    encoder = start(checkpoint, "both")
    assert np.isfinite(history(toy_train(encoder, toy_pairs(), tmp_path, bf16=True))).all()
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


@EVERY_PART
def test_a_checkpoint_is_the_model(checkpoint, mixed, parts, tmp_path):
    encoder = start(checkpoint, parts)
    toy_train(encoder, toy_pairs(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    saved = SLQEncoder(tmp_path / "checkpoint-2", backbone=encoder.backbone)
    assert {
        key for key, value in saved.state_dict().items() if not torch.equal(value, encoder.state_dict()[key])
    } == set()
    assert saved.temperature == encoder.temperature
    assert np.array_equal(saved.encode(mixed), encoder.encode(mixed))


class Worse(BaseEvaluator):
    """Says that the model gets worse, and keeps the weights that it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.primary_metric, self.greater_is_better, self.asked = "score", True, []

    def __call__(self, model, *args, **kwargs):
        self.asked.append(copy_of_weights(model))
        return {"score": 1 / len(self.asked)}


@pytest.mark.parametrize("parts", ["head", "both"])
def test_the_best_model_comes_back_with_all_its_parts(checkpoint, parts, tmp_path):
    encoder, worse = start(checkpoint, parts), Worse()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}
    trainer = toy_train(encoder, toy_pairs(), tmp_path, evaluator=worse, **settings)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    now = encoder.state_dict()
    for name, value in worse.asked[0].items():
        assert torch.equal(now[name], value), name
        assert not torch.equal(worse.asked[1][name], value), name
    assert np.isfinite(encoder.encode("a")).all()


class DamageTheHead(TrainerCallback):
    """Destroys the heads of the checkpoints when training ends, before the best one is reloaded."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            for file in Path(args.output_dir).glob("checkpoint-*/*_Dense/model.safetensors"):
                file.write_bytes(b"damaged")


def test_a_best_model_with_a_damaged_head_is_not_taken_for_the_best(checkpoint, tmp_path):
    encoder = start(checkpoint, "both")
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}
    toy_train(encoder, toy_pairs(), tmp_path, evaluator=Worse(), callbacks=[DamageTheHead()], **settings)
    with pytest.raises(RuntimeError, match=r"best checkpoint .* could not be loaded"):
        encoder.encode("a")


def test_resuming_after_a_kill_gives_the_same_bits(checkpoint, tmp_path):
    parts, settings = "both", {**RESUMABLE, "max_steps": 4}
    whole = start(checkpoint, parts)
    expected = history(toy_train(whole, toy_pairs(), tmp_path / "whole", **settings))
    with pytest.raises(KilledError):
        toy_train(start(checkpoint, parts), toy_pairs(), tmp_path / "killed", callbacks=[Kill(3)], **settings)
    resumed = start(checkpoint, parts)
    trainer = toy_train(resumed, toy_pairs(), tmp_path / "killed", resume=True, **settings)
    assert history(trainer) == expected
    assert same_weights(resumed, whole)


VARIANTS = [
    {"seed": 1, "projection": 16},
    {"seed": 2, "query_adapter": SMALL, "learning_rate": 0.05},
    {"seed": 3, "num_queries": 2, "projection": True, "query_adapter": QueryAdapter(rank=3), "pooling": "last"},
    {"seed": 4, "num_queries": 6, "temperature": 0.2},
]


def test_each_variant_of_a_sweep_is_what_it_would_be_alone(checkpoint, tmp_path):
    encoder, pairs = build(checkpoint), toy_pairs()
    before = copy_of_weights(encoder)
    settings = {"max_steps": 4, "learning_rate": 0.01, "max_grad_norm": 0.5}
    result = sweep(encoder, arguments(tmp_path, **settings), pairs.dataset, VARIANTS)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in before.items())
    for given, variant in zip(VARIANTS, result.variants, strict=True):
        made = {"pooling": "mean"} | {k: v for k, v in given.items() if k not in ("learning_rate", "temperature")}
        alone = build(checkpoint, **made)
        own = settings | {"learning_rate": given.get("learning_rate", 0.01)}
        own["learning_rate_mapping"] = learning_rate_mapping(alone)
        loss = SymmetricInfoNCELoss(alone, given.get("temperature"))
        trainer = toy_train(alone, pairs, tmp_path, loss=loss, **own)
        weights = variant.encoder.state_dict()
        assert weights.keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            assert (weights[name] - value).abs().max() < 1e-5, name
        assert variant.loss == pytest.approx(trainer.state.log_history[-2]["loss"], rel=1e-4)
    result.best.encoder.save_pretrained(tmp_path / "best")
    again = SLQEncoder(tmp_path / "best", backbone=encoder.backbone)
    assert furthest(again.encode("hello"), result.best.encoder.encode("hello")) < 1e-6


def test_a_sweep_of_a_model_with_parts_inherits_or_drops_them(checkpoint, tmp_path):
    encoder = trained(build(checkpoint, **PARTS["both"]))
    variants = [{}, {"projection": False}, {"query_adapter": False}, {"projection": False, "query_adapter": False}]
    result = sweep(encoder, arguments(tmp_path, max_steps=1), toy_pairs().dataset, variants)
    parts = [variant.encoder.slq_config for variant in result.variants]
    assert [config.projection for config in parts] == [16, None, 16, None]
    assert [config.query_adapter for config in parts] == [SMALL, SMALL, None, None]
    assert "query_adapter" in str(result)


def test_query_sets_of_any_parts_and_widths_share_a_run(checkpoint, mixed, monkeypatch):
    plain = build(checkpoint)
    sets = {
        "plain": plain,
        "head": on(plain, 1, projection=16),
        "adapter": on(plain, 2, num_queries=2, query_adapter=SMALL),
        "both": on(plain, 3, num_queries=6, projection=5, query_adapter=QueryAdapter(rank=3), pooling="last"),
        "short": on(plain, 4, projection=24),
    }
    sets["short"].truncate_dim = 7
    for reader in (plain, sets["both"]):
        with counting(monkeypatch) as rows:
            together = reader.encode(mixed, query_sets=sets)
        assert rows == {"run_prefix": len(mixed)}
        assert [found.shape for found in together.values()] == [(6, width) for width in (32, 16, 32, 5, 7)]
        for name, encoder in sets.items():
            assert furthest(together[name], encoder.encode(mixed)) < 1e-6, name
    one = plain.encode(mixed[0], query_sets=sets)
    assert furthest(one["head"], sets["head"].encode(mixed[0])) < 1e-6
    assert [found.shape for found in plain.encode([], query_sets=sets).values()][1] == (0, 16)


def test_other_queries_have_the_parts_of_the_first_unless_told(checkpoint):
    first = trained(build(checkpoint, **PARTS["both"]))
    fresh = first.with_queries(6, seed=3)
    assert same_weights(fresh, build(checkpoint, num_queries=6, seed=3, **PARTS["both"])), "fresh, not trained"
    assert fresh.backbone is first.backbone
    other = first.with_queries(projection=8, query_adapter=QueryAdapter(rank=1))
    assert (other.slq_config.projection, other.slq_config.query_adapter) == (8, QueryAdapter(rank=1))
    none = first.with_queries(projection=False, query_adapter=False)
    assert [name for name, _ in none.named_parameters()] == ["0.bias.queries"]
    assert (first.slq_config.projection, first.slq_config.query_adapter) == (16, SMALL)


@pytest.mark.parametrize(("level", "parts"), [("keys_values", "head"), ("vision", "both")])
def test_forgetting_from_prefixes_computed_one_by_one_is_exact(checkpoint, tmp_path, level, parts):
    pairs = toy_pairs(6)
    kept = ImageTextPairs(pairs.dataset.select(range(2, 6)))

    def train(store, data):
        encoder = start(checkpoint, parts)
        encoder.prefix_store = store
        settings = {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 2}
        toy_train(encoder, data, tmp_path / "out", **settings)
        return encoder

    first = train(PrefixStore(tmp_path / "all", level=level, one_by_one=True), pairs)
    forgotten = pairs.dataset.select(range(2))
    assert first.forget(forgotten["image"]) == 2
    first.forget(forgotten["text"])
    after = train(first.prefix_store, kept)
    never = train(PrefixStore(level=level, one_by_one=True), kept)
    assert same_weights(after, never)
    assert not same_weights(after, first)
