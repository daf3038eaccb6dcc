"""A guide of a loss gets the batch of the model that it guides: it reads what that has read, and takes nothing for its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.toy import caption, render, sample_scenes
from tests.untouched import load

SCENES = sample_scenes(6, "train")
COLUMNS = [[caption(scene) for scene in SCENES], [render(scene) for scene in SCENES]]


@pytest.fixture
def model(checkpoint) -> SLQEncoder:
    return load(checkpoint())


@pytest.fixture
def other(checkpoint) -> SLQEncoder:
    """Other weights in the same shapes, as those of a fine-tuned backbone, and more queries."""
    backbone = AutoModelForImageTextToText.from_pretrained(checkpoint())
    with torch.no_grad():
        for weight in backbone.model.language_model.layers.parameters():
            weight.mul_(1.1)
    processor = AutoProcessor.from_pretrained(checkpoint())
    return SLQEncoder.from_backbone(backbone, processor, num_queries=6, seed=1, device="cpu")


def guided(
    model: SLQEncoder, guide: SLQEncoder, monkeypatch: Any, kind: Any = GISTEmbedLoss, **options: Any
) -> list[Any]:
    """What the guide makes of both columns in a training step."""
    loss = kind(model, guide, **options)
    loss.must_retokenize = False
    found: list[torch.Tensor] = []
    forward = guide.forward
    with monkeypatch.context() as patch:
        patch.setattr(guide, "forward", lambda features: found.append(forward(features)) or found[-1])
        model.train()
        loss([model.preprocess(column) for column in COLUMNS], torch.zeros(6)).backward()
    return [output["sentence_embedding"] for output in found]


def as_alone(found: list[Any], guide: SLQEncoder) -> bool:
    expected = [guide.encode(column, convert_to_tensor=True) for column in COLUMNS]
    return all((ours - alone).abs().max() < 1e-5 for ours, alone in zip(found, expected, strict=True))


def test_a_guide_reads_images(model, other, monkeypatch):
    """Without ``must_retokenize = False``, the host decodes the tokens of a model with other query tokens: no image comes through."""
    assert GISTEmbedLoss(model, other).must_retokenize
    assert as_alone(guided(model, other, monkeypatch), other)


@pytest.mark.parametrize("kind", [GISTEmbedLoss, CachedGISTEmbedLoss])
def test_a_guide_keeps_nothing_of_a_step(model, other, monkeypatch, kind):
    """No pass with gradients would end the step: all prefixes of a run would stay in memory."""
    assert other.transformer.training, "as each encoder is that was just built"
    guided(model, other, monkeypatch, kind)
    assert not other.transformer.source.memory.rows


def test_a_guide_keeps_nothing_under_the_keys_of_another_model(model, other, tmp_path, monkeypatch):
    """Those of a model without a store do not say whose weights computed a prefix."""
    other.prefix_store = PrefixStore(tmp_path)
    assert as_alone(guided(model, other, monkeypatch), other)
    assert len(other.prefix_store) == 12, "of encode, under keys of its own"


def test_a_guide_shares_the_store_of_its_model(model, other, monkeypatch):
    model.prefix_store = PrefixStore()
    guide = model.with_queries(6, seed=2)
    with pytest.raises(RuntimeError, match=r"guide\.prefix_store = model\.prefix_store"):
        guided(model, guide, monkeypatch)
    guide.prefix_store = other.prefix_store = model.prefix_store
    for _ in range(2):
        assert as_alone(guided(model, guide, monkeypatch), guide)
    assert model.prefix_store.counts.computed == 12
    with pytest.raises(RuntimeError, match="the same backbone and the same store"):
        guided(model, other, monkeypatch)
