"""What needs CUDA: the same promises on a GPU, in half precision, with flash attention where it is installed."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import PrefixStore, SLQEncoder, SymmetricInfoNCELoss
from slq_embed.data import retrieval_set
from slq_embed.evaluation import ImageTextRetrievalEvaluator
from slq_embed.generation import answer
from slq_embed.prefix.vision_check import vision_refusal
from slq_embed.training import CachedSymmetricInfoNCELoss, sweep
from tests.checkpoints import FAMILIES
from tests.gpu.device import DEVICE, MISSING, ON_DEVICE, STAND_IN
from tests.parts import PARTS, build, trained
from tests.training import WORDS, arguments, toy_pairs, toy_train
from tests.untouched import rerankable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING, reason="there is no CUDA device")]


def cosine(a, b) -> float:
    rows = torch.nn.functional.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b))
    return float(rows.min())


@pytest.mark.parametrize("kind", FAMILIES)
def test_float32_equals_cpu(checkpoint, mixed, kind):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    both = [SLQEncoder.from_backbone(checkpoint(kind), num_queries=4, seed=0, device=d) for d in ("cpu", DEVICE)]
    assert cosine(*(model.encode(mixed) for model in both)) > 1 - 1e-5


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_trains_and_reloads(checkpoint, mixed, kind, parts, tmp_path):
    options = {"num_queries": 4, "seed": 0, "device": DEVICE, "dtype": torch.bfloat16, **parts}
    model = SLQEncoder.from_backbone(checkpoint(kind), **options)
    toy_train(model, toy_pairs(), tmp_path / "run", **ON_DEVICE)
    assert all(weight.dtype == torch.float32 and weight.device.type == DEVICE for weight in model.parameters())
    model.save_pretrained(tmp_path / "slq")
    own_class = {"trust_remote_code": True} if parts.keys() - {"projection"} else {}
    stock = SentenceTransformer(
        str(tmp_path / "slq"), device=DEVICE, model_kwargs={"dtype": torch.bfloat16}, **own_class
    )
    assert cosine(stock.encode(mixed), model.encode(mixed)) > 0.99


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
def test_moving_takes_the_backbone_along(checkpoint, mixed, parts):
    model = trained(build(checkpoint, **parts))
    expected = model.encode(mixed)
    model.to(DEVICE)
    assert model.backbone.device.type == DEVICE
    assert {weight.device.type for weight in model.parameters()} == {DEVICE}
    assert cosine(model.encode(mixed), expected) > 1 - 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_workers_read_ahead_and_give_the_same(checkpoint, mixed, kind):
    model = SLQEncoder.from_backbone(checkpoint(kind), num_queries=4, seed=0, device=DEVICE)
    model.num_workers = 0
    expected = model.encode(mixed * 4, batch_size=3)
    model.num_workers = 3
    assert cosine(model.encode(mixed * 4, batch_size=3), expected) > 1 - 1e-5


@pytest.mark.skipif(STAND_IN, reason="the stand-in is a device of one process")
def test_a_pool_of_processes_encodes(checkpoint, mixed):
    model = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device=DEVICE)
    pool = model.start_multi_process_pool(["cuda:0", "cuda:0"])
    try:
        assert cosine(model.encode(mixed, pool=pool, chunk_size=2), model.encode(mixed)) > 1 - 1e-3
    finally:
        model.stop_multi_process_pool(pool)


@pytest.mark.parametrize("level", ["keys_values", "vision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_prefixes_give_the_same(checkpoint, mixed, tmp_path, level, dtype):
    model = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device=DEVICE, dtype=dtype)
    if level == "vision" and vision_refusal(model.transformer) is not None:
        pytest.skip("this version of transformers takes no vision features")
    expected = model.encode(mixed)
    for store in (PrefixStore(level=level), PrefixStore(tmp_path, level=level)):
        model.prefix_store = store
        for _ in range(2):
            assert cosine(model.encode(mixed), expected) > (1 - 1e-5 if dtype == torch.float32 else 0.99)
        assert store.counts.reused > 0
    before = store.counts.computed
    toy_train(model, toy_pairs(), tmp_path / "run", num_train_epochs=3, max_steps=-1, **ON_DEVICE)
    assert store.counts.computed - before == (16 if level == "keys_values" else 8)


LOSSES = {"plain": SymmetricInfoNCELoss, "cached": partial(CachedSymmetricInfoNCELoss, mini_batch_size=2)}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_killed_run_goes_on(checkpoint, tmp_path, loss):
    def run(folder, **settings) -> SLQEncoder:
        model = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device=DEVICE, **PARTS["all"])
        toy_train(model, toy_pairs(), tmp_path / folder, loss=LOSSES[loss](model), **ON_DEVICE, **settings)
        return model

    saved = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    run("killed", max_steps=2, **saved)
    resumed, whole = run("killed", max_steps=4, resume=True, **saved), run("whole", max_steps=4, **saved)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert mine.device.type == DEVICE
        assert (mine - theirs).abs().max() < 2e-3


def test_several_query_sets_train_and_are_measured(checkpoint, tmp_path):
    model, pairs = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device=DEVICE), toy_pairs()
    measure = ImageTextRetrievalEvaluator(*retrieval_set(pairs))
    variants = [{"num_queries": 4, "seed": 1}, {"num_queries": 2, "pooling": "weighted"}]
    result = sweep(model, arguments(tmp_path, **ON_DEVICE), pairs.dataset, variants, evaluator=measure)
    encoders = {str(number): variant.encoder for number, variant in enumerate(result.variants)}
    together = model.encode(WORDS, query_sets=encoders, convert_to_tensor=True)
    for number, encoder in encoders.items():
        assert together[number].device.type == DEVICE
        alone = encoder.encode(WORDS, convert_to_tensor=True)
        assert torch.nn.functional.cosine_similarity(together[number], alone).min() > 1 - 1e-3


def test_the_backbone_answers_and_ranks_while_it_embeds(checkpoint, images):
    both = [SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device=d) for d in ("cpu", DEVICE)]
    pairs = [("red", images[0]), (images[1], "a longer text"), ("red", {"text": "blue", "image": images[2]})]
    scores, answers = [], []
    for model in both:
        model.encode(["red"])
        scores.append(rerankable(model).predict(pairs))
        answers.append(answer(model, "what?", images[0], do_sample=False, max_new_tokens=4))
    assert abs(scores[0] - scores[1]).max() < 1e-2
    assert isinstance(answers[1], str)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed")
def test_flash_attention(checkpoint, mixed, tmp_path):
    options = {"num_queries": 4, "seed": 0, "device": DEVICE, "dtype": torch.bfloat16}
    flash = SLQEncoder.from_backbone(checkpoint(), attn_implementation="flash_attention_2", **options)
    plain = SLQEncoder.from_backbone(checkpoint(), **options)
    assert cosine(flash.encode(mixed), plain.encode(mixed)) > 0.99
    toy_train(flash, toy_pairs(), tmp_path, **ON_DEVICE)
