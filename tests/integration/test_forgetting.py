"""Forgetting: what training from the rest of a store gives."""

from __future__ import annotations

import pytest
import torch

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.data import ImageTextPairs
from tests.training import toy_pairs, toy_train


def build(checkpoint):
    return SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")


def test_what_was_encoded_with_processing_kwargs_is_forgotten_with_them(checkpoint, images):
    encoder = build(checkpoint)
    encoder.prefix_store = PrefixStore()
    larger = {"image": {"size": {"shortest_edge": 1024, "longest_edge": 4096}}}
    encoder.encode(images[:1], processing_kwargs=larger)
    assert encoder.forget(images[:1]) == 0
    assert encoder.forget(images[:1], processing_kwargs=larger) == 1
    assert len(encoder.prefix_store) == 0


@pytest.mark.parametrize("level", ["keys_values", "vision"])
def test_forgetting_from_prefixes_computed_one_by_one_is_exact(checkpoint, tmp_path, level):
    """Bit for bit as if what was forgotten had never been there, after every step."""
    pairs = toy_pairs(12)
    kept = ImageTextPairs(pairs.dataset.select(range(5, 12)))

    def train(store, data):
        encoder = build(checkpoint)
        encoder.prefix_store = store
        toy_train(encoder, data, tmp_path / "out", num_train_epochs=4, max_steps=-1, per_device_train_batch_size=3)
        return encoder

    first = train(PrefixStore(tmp_path / "all", level=level, one_by_one=True), pairs)
    forgotten = pairs.dataset.select(range(5))
    first.forget(forgotten["image"])
    first.forget(forgotten["text"])
    after = train(first.prefix_store, kept)
    never = train(PrefixStore(level=level, one_by_one=True), kept)
    assert torch.equal(after.queries, never.queries)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_forgotten_examples_leave_no_trace(checkpoint, tmp_path, where):
    """Training from what is left is bit-identical to that store without them, and near to never having seen them."""
    pairs = toy_pairs()
    forgotten, kept = pairs.dataset.select(range(3)), pairs.dataset.select(range(3, 8))

    def retrain(store, data):
        encoder = build(checkpoint)
        encoder.prefix_store = store
        toy_train(encoder, ImageTextPairs(data), tmp_path / "out", num_train_epochs=3, max_steps=-1)
        return encoder

    def store_of(name):
        return PrefixStore(tmp_path / name if where == "folder" else None)

    first = retrain(store_of("all"), pairs.dataset)
    store = first.prefix_store
    without = PrefixStore()
    keys = first.transformer.prefix_keys([*kept["image"], *kept["text"]])
    without._entries.write(store._entries.read(keys), without.budget)
    assert first.forget(forgotten["image"]) == 3
    assert first.forget(forgotten["text"]) == 3
    assert first.forget(forgotten["text"]) == 0
    assert len(store) == 10
    computed = store.counts.computed
    after = retrain(store, kept).queries.detach()
    assert store.counts.computed == computed, "each epoch costs what a later epoch costs"
    assert torch.equal(after, retrain(without, kept).queries.detach())
    assert (after - retrain(None, kept).queries.detach()).abs().max() < 1e-5
    assert (after - first.queries.detach()).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no prefix store"):
        build(checkpoint).forget(["x"])
