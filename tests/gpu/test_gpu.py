"""What needs CUDA: the same promises on a GPU, in half precision, with flash attention where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import PrefixStore, SLQEncoder
from tests.checkpoints import FAMILIES
from tests.parts import PARTS, build, trained
from tests.training import toy_pairs, toy_train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def cosine(a, b) -> float:
    rows = torch.nn.functional.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b))
    return float(rows.min())


@pytest.mark.parametrize("kind", FAMILIES)
def test_cuda_float32_equals_cpu(checkpoint, mixed, kind):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    both = [SLQEncoder.from_backbone(checkpoint(kind), num_queries=4, seed=0, device=d) for d in ("cpu", "cuda")]
    assert cosine(*(model.encode(mixed) for model in both)) > 1 - 1e-5


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_trains_and_reloads(checkpoint, mixed, kind, parts, tmp_path):
    options = {"num_queries": 4, "seed": 0, "device": "cuda", "dtype": torch.bfloat16, **parts}
    model = SLQEncoder.from_backbone(checkpoint(kind), **options)
    toy_train(model, toy_pairs(), tmp_path / "run", use_cpu=False, bf16=True)
    assert all(weight.dtype == torch.float32 and weight.device.type == "cuda" for weight in model.parameters())
    model.save_pretrained(tmp_path / "slq")
    own_class = {"trust_remote_code": True} if parts.keys() - {"projection"} else {}
    stock = SentenceTransformer(
        str(tmp_path / "slq"), device="cuda", model_kwargs={"dtype": torch.bfloat16}, **own_class
    )
    assert cosine(stock.encode(mixed), model.encode(mixed)) > 0.99


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
def test_moving_takes_the_backbone_along(checkpoint, mixed, parts):
    model = trained(build(checkpoint, **parts))
    expected = model.encode(mixed)
    model.to("cuda")
    assert model.backbone.device.type == "cuda"
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    assert cosine(model.encode(mixed), expected) > 1 - 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_workers_read_ahead_and_give_the_same(checkpoint, mixed, kind):
    model = SLQEncoder.from_backbone(checkpoint(kind), num_queries=4, seed=0, device="cuda")
    model.num_workers = 0
    expected = model.encode(mixed * 4, batch_size=3)
    model.num_workers = 3
    assert cosine(model.encode(mixed * 4, batch_size=3), expected) > 1 - 1e-5


def test_a_pool_of_processes_encodes(checkpoint, mixed):
    model = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cuda")
    pool = model.start_multi_process_pool(["cuda:0", "cuda:0"])
    try:
        assert cosine(model.encode(mixed, pool=pool, chunk_size=2), model.encode(mixed)) > 1 - 1e-3
    finally:
        model.stop_multi_process_pool(pool)


@pytest.mark.parametrize("level", ["keys_values", "vision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_prefixes_give_the_same(checkpoint, mixed, tmp_path, level, dtype):
    model = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cuda", dtype=dtype)
    expected = model.encode(mixed)
    for store in (PrefixStore(level=level), PrefixStore(tmp_path, level=level)):
        model.prefix_store = store
        for _ in range(2):
            assert cosine(model.encode(mixed), expected) > (1 - 1e-5 if dtype == torch.float32 else 0.99)
        assert store.counts.reused > 0
    before = store.counts.computed
    toy_train(model, toy_pairs(), tmp_path / "run", num_train_epochs=3, max_steps=-1, use_cpu=False, bf16=True)
    assert store.counts.computed - before == (16 if level == "keys_values" else 8)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed")
def test_flash_attention(checkpoint, mixed, tmp_path):
    options = {"num_queries": 4, "seed": 0, "device": "cuda", "dtype": torch.bfloat16}
    flash = SLQEncoder.from_backbone(checkpoint(), attn_implementation="flash_attention_2", **options)
    plain = SLQEncoder.from_backbone(checkpoint(), **options)
    assert cosine(flash.encode(mixed), plain.encode(mixed)) > 0.99
    toy_train(flash, toy_pairs(), tmp_path, use_cpu=False, bf16=True)
