"""Experts are read as vLLM lays them out, whichever way they were saved."""

from types import SimpleNamespace

import pytest
import torch

from vllm_slq.experts import turn_experts

PUBLISHED = {
    "layers.0.mlp.experts.gate_up_proj": torch.randn(2, 8, 6),
    "layers.0.mlp.experts.down_proj": torch.randn(2, 3, 8),
    "layers.0.self_attn.q_proj.weight": torch.randn(8, 6),
}
TURNED = {name: weight.transpose(1, 2) if weight.ndim == 3 else weight for name, weight in PUBLISHED.items()}


def text(kind="qwen3_vl_moe_text", inner=3):
    return SimpleNamespace(model_type=kind, hidden_size=8, moe_intermediate_size=inner)


@pytest.mark.parametrize("saved", [PUBLISHED, TURNED], ids=["published", "turned"])
def test_the_layout_is_the_published_one(saved):
    found = dict(turn_experts(saved.items(), text()))
    assert found.keys() == PUBLISHED.keys()
    assert all(torch.equal(found[name], weight) for name, weight in PUBLISHED.items())


def test_other_families_stay_as_they_are():
    found = dict(turn_experts(TURNED.items(), text("qwen3_5_moe_text")))
    assert all(found[name] is weight for name, weight in TURNED.items())


@pytest.mark.parametrize("inner", [4, 8])
def test_a_shape_that_tells_nothing_is_refused(inner):
    saved = {"experts.gate_up_proj": torch.randn(2, 8, 2 * inner), "experts.down_proj": torch.randn(2, inner, 8)}
    with pytest.raises(ValueError, match="does not tell how it is laid out"):
        dict(turn_experts(saved.items(), text(inner=inner)))
