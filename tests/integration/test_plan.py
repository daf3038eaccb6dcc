"""The estimate before a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.data import ImageTextPairs, from_records
from slq_embed.training import mine_negatives
from slq_embed.training.plan import Option, Plan, _levels, plan_prefixes
from tests.families import llava
from tests.families.building import write
from tests.training import toy_pairs, toy_train


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_bytes_are_those_of_the_run(encoder, tmp_path, where):
    folder = tmp_path / "prefixes" if where == "folder" else None
    pairs = toy_pairs(16)
    pairs = from_records(
        [(str(n), row["image"], [row["text"], f"again {n:02}"]) for n, row in enumerate(pairs.dataset)]
    )
    own = PrefixStore()
    encoder.prefix_store = own
    plan = plan_prefixes(encoder, pairs.dataset, epochs=5, folder=folder, levels=["keys_values"], sample=32)
    assert encoder.prefix_store is own
    assert len(own) == 0
    assert encoder.queries.grad is None
    store = PrefixStore(folder)
    assert len(store) == 0, "the sample leaves nothing behind"
    encoder.prefix_store = store
    toy_train(encoder, pairs, tmp_path, num_train_epochs=1, max_steps=-1)
    (_, keys_values) = plan.options
    assert keys_values.nbytes == pytest.approx(store.nbytes, rel=0.1)


def test_mined_negatives_share_what_they_repeat(encoder, tmp_path):
    pytest.importorskip("faiss")
    pairs = toy_pairs(8)
    pairs = from_records([(str(n), row["image"], [row["text"], f"again {n}"]) for n, row in enumerate(pairs.dataset)])
    mined = mine_negatives(encoder, pairs, num_negatives=2, duplicate_score=None).dataset
    plan = plan_prefixes(encoder, mined, epochs=2, levels=["keys_values"], sample=4)
    store = encoder.prefix_store = PrefixStore()
    toy_train(encoder, ImageTextPairs(mined, []), tmp_path, num_train_epochs=1, max_steps=-1)
    assert len(store) == 8 + 16
    assert plan.options[1].nbytes == pytest.approx(store.nbytes, rel=0.1)


def test_nothing_is_left_behind(checkpoint, monkeypatch):
    """No gradient, of no part; also where the work fails."""
    model = SLQEncoder.from_backbone(
        checkpoint(), num_queries=4, seed=0, device="cpu", projection=8, query_adapter=True, deep_queries=True
    ).eval()
    pairs = toy_pairs(4).dataset
    plan_prefixes(model, pairs, epochs=2)
    assert all(weight.grad is None for weight in model.parameters())
    monkeypatch.setattr(model, "preprocess", None)
    with pytest.raises(TypeError):
        plan_prefixes(model, pairs, epochs=2)
    assert not model.training
    assert model.prefix_store is None


def test_the_choice_follows_the_measurement_and_can_be_read(tmp_path):
    options = (
        Option(None, 0, 0.0, 100.0, 100.0),
        Option("keys_values", 41_000_000_000, 1.0, 110.0, 3.0),
        Option("vision", 4_000_000_000, 1.0, 101.0, 40.0),
    )
    plan = Plan(options, 5, tmp_path, 50_000_000_000, "exact")
    assert plan.choice.level == "keys_values"
    assert plan.speedup == pytest.approx(500 / 122)
    assert str(plan).startswith("5 epochs: 41 GB, 4.1x faster\n")
    assert "-> keys_values" in str(plan)
    store = plan.store()
    assert store is not None
    assert (store.level, store.budget, store.folder) == ("keys_values", 50_000_000_000, tmp_path)
    once = Plan(options, 1, None, 10**9, "exact")
    assert once.choice.level is None
    assert once.store() is None
    assert str(once).startswith("1 epochs: no store, 1.0x faster")


def test_a_level_that_cannot_be_had_is_no_choice(encoder, monkeypatch):
    pairs = toy_pairs(4).dataset
    levels = [option.level for option in plan_prefixes(encoder, pairs, epochs=2).options]
    assert levels == [None, "keys_values", "vision"]
    monkeypatch.setattr(encoder.transformer, "vision_refusal", "a reason")
    assert [option.level for option in plan_prefixes(encoder, pairs, epochs=2).options] == levels[:2]


def test_only_levels_that_keep_something_are_choices(encoder, checkpoint, tmp_path, monkeypatch):
    """Each of them would be refused by the store."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("measured with 5.23")
    other = SLQEncoder.from_backbone(write(tmp_path, llava.ovis2()), num_queries=2, seed=0, device="cpu")
    assert [option.level for option in plan_prefixes(other, toy_pairs(4), epochs=2).options] == [None, "keys_values"]
    video = {"video": np.zeros((4, 32, 32, 3), dtype=np.uint8)}
    assert _levels(encoder, {"video": [video], "text": ["a"]}) == ["keys_values"]
    assert _levels(encoder, {"text": ["a"]}) == ["keys_values", "vision"]
    devices = [torch.empty(0, device=device) for device in ("cpu", "meta")]
    monkeypatch.setattr(encoder.backbone, "parameters", lambda: devices)
    assert _levels(encoder, {"text": ["a"]}) == ["vision"]
    together = SLQEncoder.from_backbone(checkpoint(), num_queries=2, seed=0, device="cpu")
    together.transformer.schedule = "all_positions"
    assert [option.level for option in plan_prefixes(together, toy_pairs(4), epochs=2).options] == [None]


def test_a_small_budget_keeps_its_share(encoder):
    whole = plan_prefixes(encoder, toy_pairs(16).dataset, epochs=3, budget="1GB", levels=["keys_values"])
    half = plan_prefixes(
        encoder, toy_pairs(16).dataset, epochs=3, budget=whole.options[1].nbytes // 2, levels=["keys_values"]
    )
    assert half.options[1].kept == pytest.approx(0.5, abs=0.01)
    assert half.options[1].later > 0


def test_a_gradient_that_is_there_stays(encoder):
    encoder.queries.grad = torch.ones_like(encoder.queries)
    plan_prefixes(encoder, toy_pairs(4).dataset, epochs=2, levels=["keys_values"], sample=2)
    assert torch.equal(encoder.queries.grad, torch.ones_like(encoder.queries))


@pytest.mark.parametrize(
    ("options", "message"), [({"epochs": 0}, "epochs is 0"), ({"epochs": 2, "sample": 0}, "sample is 0")]
)
def test_numbers_below_one_are_refused(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        plan_prefixes(encoder, toy_pairs(4).dataset, **options)


def test_a_streamed_or_empty_dataset_is_refused(encoder):
    dataset = toy_pairs(4).dataset
    for refused in (dataset.to_iterable_dataset(), dataset.select([])):
        with pytest.raises(ValueError, match="streamed or empty"):
            plan_prefixes(encoder, refused, epochs=2)
