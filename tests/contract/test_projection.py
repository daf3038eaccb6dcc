"""The projection head: it starts as if it were not there, and a saved one is the host's own module."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from slq_embed import SLQEncoder
from slq_embed.encoding.protocol import encoder_digest
from slq_embed.index import EmbeddingIndex
from tests.checkpoints import FAMILIES
from tests.contract.test_saved_folder import MEAN, ROOT
from tests.parts import build, files, furthest, same_weights, trained


def unnumbered(names) -> set[str]:
    """Names of files, without the number of the module that a folder starts with."""
    return {name[2:] if name[:1].isdigit() else name for name in names}


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fresh_head_is_the_identity(checkpoint, mixed, kind, pooling):
    plain = build(checkpoint, kind, pooling=pooling)
    expected = plain.encode(mixed)
    whole, short = (plain.with_queries(seed=0, projection=projection) for projection in (True, 16))
    assert furthest(whole.encode(mixed), plain.with_queries(seed=0).encode(mixed)) < 1e-7
    assert furthest(whole.encode(mixed), expected) < 1e-6
    first = plain.encode(mixed, truncate_dim=16, normalize_embeddings=True)
    assert furthest(short.encode(mixed), first) < 1e-6


def test_a_head_of_the_backbones_width_is_what_true_means(checkpoint):
    for projection in (True, 32):
        encoder = build(checkpoint, projection=projection)
        assert encoder.slq_config.projection == 32
        assert encoder[2].linear.weight.shape == (32, 32)
    for projection in (None, False):
        assert len(build(checkpoint, projection=projection)) == 3


def test_the_embedding_has_the_heads_width(checkpoint):
    encoder = build(checkpoint, projection=12)
    assert encoder.encode("a").shape == (12,)
    assert encoder.get_embedding_dimension() == 12
    assert encoder.encode([]).shape[0] == 0
    for wanted, found in ((8, 8), (24, 12)):
        encoder.truncate_dim = wanted
        assert encoder.get_embedding_dimension() == found
        assert encoder.encode("a").shape == (found,)
    assert EmbeddingIndex(encoder).dimension == 12


def test_embeddings_are_normalised_after_the_head(checkpoint, mixed):
    rows = trained(build(checkpoint, projection=12)).encode(mixed)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-6


def test_the_head_is_trained_beside_the_queries_and_nothing_else(checkpoint):
    encoder = build(checkpoint, projection=12)
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert shapes == {"0.bias.queries": (4, 32), "2.linear.weight": (12, 32), "2.linear.bias": (12,)}


@pytest.mark.parametrize("dim", [32, 16])
@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
def test_reloading_gives_the_same_bits(checkpoint, mixed, pooling, form, dim, tmp_path):
    encoder = trained(build(checkpoint, pooling=pooling, projection=dim))
    encoder.save_pretrained(tmp_path / "slq", form=form)
    again = SLQEncoder(tmp_path / "slq", device="cpu")
    assert same_weights(again, encoder)
    assert again.slq_config.pooling == pooling
    assert np.array_equal(again.encode(mixed), encoder.encode(mixed))
    again.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "slq")
    assert same_weights(SLQEncoder(tmp_path / "again", device="cpu"), encoder)


def test_the_folder_holds_one_stock_module_more(checkpoint, tmp_path):
    encoder = trained(build(checkpoint, projection=16))
    encoder.save_pretrained(tmp_path)
    assert unnumbered(files(tmp_path)) == ROOT | unnumbered(MEAN) | {
        "adapter_config.json",
        "adapter_model.safetensors",
        "Dense/config.json",
        "Dense/model.safetensors",
    }
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert json.loads((tmp_path / "slq_config.json").read_text())["format_version"] == 2
    weights = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors") if "WordWeights" not in str(path))
    assert weights < 1_000_000
    assert weights < 4 * (4 * 32 + 16 * 32 + 16) + 1000


def test_an_adapter_saved_from_a_merged_model_keeps_the_head(checkpoint, mixed, tmp_path):
    encoder = trained(build(checkpoint, projection=16))
    encoder.save_pretrained(tmp_path / "merged", form="merged")
    SLQEncoder(tmp_path / "merged", device="cpu").save_pretrained(tmp_path / "adapter", form="adapter")
    again = SLQEncoder(tmp_path / "adapter", device="cpu")
    assert same_weights(again, encoder)
    assert np.array_equal(again.encode(mixed), encoder.encode(mixed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_half_precision_backbone_keeps_a_float32_head(checkpoint, mixed, dtype, tolerance, tmp_path):
    encoder = trained(build(checkpoint, projection=16))
    encoder.save_pretrained(tmp_path)
    expected = encoder.encode(mixed)
    cast, loaded = encoder.to(dtype), SLQEncoder(tmp_path, device="cpu", model_kwargs={"dtype": dtype})
    for model in (cast, loaded):
        assert model.backbone.dtype == dtype
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        found = model.encode(mixed)
        assert found.dtype == np.float32
        assert furthest(found, expected) < tolerance


def test_autocast_leaves_the_head_in_float32(checkpoint):
    encoder = trained(build(checkpoint, projection=16))
    states = {"sentence_embedding": torch.randn(3, 32)}
    expected = encoder[2](dict(states))["sentence_embedding"]
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder[2](dict(states))["sentence_embedding"], expected)


def test_an_index_notices_another_head(checkpoint, tmp_path):
    encoder = trained(build(checkpoint, projection=16))
    index = EmbeddingIndex(encoder)
    index.add(["a red circle", "two green stars"], ["a", "b"])
    index.save(tmp_path / "index")
    before = encoder_digest(encoder)
    EmbeddingIndex.load(tmp_path / "index", encoder)
    with torch.no_grad():
        encoder[2].linear.bias[3] += 0.5
    assert encoder_digest(encoder) != before
    with pytest.raises(ValueError, match="made with another model"):
        EmbeddingIndex.load(tmp_path / "index", encoder)


@pytest.mark.parametrize("options", [{}, {"projection": 16}, {"query_adapter": True}])
def test_the_digest_is_that_of_the_saved_model_after_training_too(checkpoint, options, tmp_path):
    encoder = trained(build(checkpoint, **options))
    encoder.transformer.require_log_temperature(-2.5)
    encoder.save_pretrained(tmp_path)
    assert encoder_digest(SLQEncoder(tmp_path, device="cpu")) == encoder_digest(encoder)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_model_card_names_the_head(checkpoint, form, tmp_path):
    build(checkpoint).save_pretrained(tmp_path / "without", form=form)
    encoder = build(checkpoint, projection=16)
    encoder.save_pretrained(tmp_path / "with", form=form)
    without, card = ((tmp_path / name / "README.md").read_text() for name in ("without", "with"))
    assert f"| Parameters trained | {4 * 32 + 16 * 32 + 16} |" in card
    assert "16 dimensions" in card
    assert "projection" in card.lower()
    assert "projection" not in without.lower()
