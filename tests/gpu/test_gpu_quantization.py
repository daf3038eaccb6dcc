"""What needs CUDA: backbones in 4 and 8 bits, by bitsandbytes and by torchao."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.backbone.fingerprint import weights_digest
from tests.gpu.device import DEVICE, MISSING, ON_DEVICE
from tests.parts import PARTS, furthest
from tests.training import toy_pairs, toy_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING, reason="there is no CUDA device")]


def nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def llm_int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


def torchao_int4():
    torchao = pytest.importorskip("torchao.quantization")
    pytest.importorskip("mslk")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int4WeightOnlyConfig(group_size=32))


CONFIGS = pytest.mark.parametrize("config", [nf4, llm_int8, torchao_int8, torchao_int4])


def build(config, **options) -> SLQEncoder:
    settings = {"num_queries": 4, "seed": 0, "device": DEVICE, "dtype": torch.bfloat16, **options}
    return SLQEncoder.from_backbone(pretrained("mllm-tiny"), quantization_config=config, **settings)


@CONFIGS
@pytest.mark.parametrize("parts", [{}, PARTS["all"]], ids=["queries", "all"])
def test_a_quantized_backbone_trains_saves_and_loads(config, parts, mixed, tmp_path):
    config = config()
    model = build(config, **parts)
    cosine = (model.encode(mixed) * build(None, **parts).encode(mixed)).sum(axis=1).min()
    assert cosine > 0.9, f"least cosine to the unquantized backbone: {cosine:.5f}"
    before, start = weights_digest(model.backbone), model.queries.detach().clone()
    toy_train(model, toy_pairs(), tmp_path / "run", **ON_DEVICE)
    assert weights_digest(model.backbone) == before
    assert not torch.equal(model.queries, start)
    model.save_pretrained(tmp_path / "slq")
    again = SLQEncoder(tmp_path / "slq", device=DEVICE, model_kwargs={"dtype": torch.bfloat16})
    assert furthest(again.encode(mixed), model.encode(mixed)) < 2e-2


@CONFIGS
def test_stored_prefixes_of_a_quantized_backbone(config, mixed, tmp_path):
    model = build(config())
    expected = model.encode(mixed)
    model.prefix_store = PrefixStore(tmp_path)
    for _ in range(2):
        assert furthest(model.encode(mixed), expected) < 2e-2
    assert model.prefix_store.counts.reused > 0
