"""The query adapter: it acts at the latent queries alone, and the backbone has no trace of it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from slq_embed import PrefixStore, QueryAdapter, SLQEncoder
from slq_embed.backbone.families import decoder_of
from slq_embed.encoding.protocol import encoder_digest
from slq_embed.prefix.passes import run_all_positions
from tests import checkpoints
from tests.checkpoints import FAMILIES
from tests.parts import SMALL, build, furthest, offloading, on, same_weights, trained

ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
EVERY_FAMILY = pytest.mark.parametrize("kind", FAMILIES)


def with_adapter(checkpoint, kind="qwen3_vl", **options) -> SLQEncoder:
    return trained(build(checkpoint, kind, **{"query_adapter": SMALL, **options}))


@pytest.mark.parametrize("deep", [False, True])
@ATTENTION
@EVERY_FAMILY
def test_the_prefix_path_equals_all_positions_in_value_and_gradient(checkpoint, mixed, kind, attention, deep):
    encoder = with_adapter(checkpoint, kind, attn_implementation=attention, deep_queries=deep)
    module = encoder.transformer
    features = module.preprocess(mixed)
    weight = torch.randn(len(mixed), 32, generator=torch.Generator().manual_seed(1))
    embeddings, gradients = [], []
    for run in (lambda: module.query_states(module.prefix(features)), lambda: module.all_positions(features)):
        encoder.zero_grad()
        embedding = torch.nn.functional.normalize(run().mean(dim=1), dim=-1)
        (embedding * weight).sum().backward()
        embeddings.append(embedding.detach())
        gradients.append({name: value.grad.clone() for name, value in module.named_parameters()})
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-6
    assert len(gradients[0]) == 1 + deep + 2 * 2 * 7, "the queries, and two matrices for seven layers of two blocks"
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).norm() < 1e-5 * expected.norm(), name
        assert expected.norm() > 0, name


def by_peft(encoder: SLQEncoder, features) -> torch.Tensor:
    """States of the queries from peft's own activated LoRA, on a copy of the backbone, over whole sequences."""
    adapter, decoder = encoder.slq_config.query_adapter, copy.deepcopy(decoder_of(encoder.backbone))
    parts = encoder.transformer.query_adapter.items()
    count = len(encoder.queries)
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank,
        target_modules=[name.replace("/", ".") for name, _ in parts],
        alora_invocation_tokens=list(encoder.slq_config.tokens.ids),
    )
    reference = peft.get_peft_model(decoder, config).eval()
    with torch.no_grad():
        for name, layer in parts:
            theirs = reference.base_model.model.get_submodule(name.replace("/", "."))
            for matrix in ("lora_A", "lora_B"):
                getattr(theirs, matrix)["default"].weight.copy_(layer[matrix].weight)
    offsets = {"alora_offsets": [count] * len(features["input_ids"])}
    reference.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | offsets), with_kwargs=True)
    with torch.no_grad():
        return run_all_positions(reference, features, encoder.queries)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
@ATTENTION
@EVERY_FAMILY
def test_it_is_what_peft_calls_an_activated_lora(checkpoint, mixed, kind, attention):
    encoder = with_adapter(checkpoint, kind, attn_implementation=attention)
    module = encoder.transformer
    features = module.preprocess(mixed)
    with torch.no_grad():
        ours = module.query_states(module.prefix(features))
    theirs = by_peft(encoder, features)
    ours, theirs = (torch.nn.functional.normalize(states.mean(dim=1), dim=-1) for states in (ours, theirs))
    assert (ours - theirs).abs().max() < 1e-6


@ATTENTION
@EVERY_FAMILY
def test_an_embedding_depends_on_its_input_alone(checkpoint, mixed, kind, attention):
    encoder = with_adapter(checkpoint, kind, attn_implementation=attention)
    together = encoder.encode(mixed)
    alone = np.stack([encoder.encode(value) for value in mixed])
    backwards = encoder.encode(mixed[::-1], batch_size=4)[::-1]
    assert furthest(together, alone) < 1e-5
    assert furthest(together, backwards) < 1e-5
    assert furthest(together[0], together[1]) > 0.01


@EVERY_FAMILY
def test_a_fresh_adapter_is_as_if_it_were_not_there(checkpoint, mixed, kind):
    plain = build(checkpoint, kind)
    fresh = plain.with_queries(seed=0, query_adapter=True)
    assert furthest(fresh.encode(mixed), plain.encode(mixed)) < 1e-6
    assert furthest(on(plain, query_adapter=True).encode(mixed), plain.with_queries(seed=1).encode(mixed)) > 0.01


def test_the_seed_decides_the_start_and_leaves_the_generator_alone(checkpoint):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (build(checkpoint, query_adapter=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, second)
    assert not same_weights(first, build(checkpoint, query_adapter=True, seed=1))


@pytest.mark.parametrize("depth", [2, 4])
@EVERY_FAMILY
def test_only_linear_layers_of_the_language_model_get_an_update(checkpoint, kind, depth, tmp_path, monkeypatch):
    """From 20 layers on, peft matches the ends of names in place of names; parts of a vision tower end alike."""
    folder = checkpoint(kind)
    if depth != 2:
        monkeypatch.setitem(checkpoints.TEXT, "num_hidden_layers", depth)
        folder = checkpoints.build(tmp_path, kind)
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, query_adapter=True, device="cpu")
    twin = encoder.transformer.query_decoder
    adapted = {name for name, module in twin.named_modules() if isinstance(module, LoraLayer)}
    layers = {name.replace("/", ".") for name in encoder.transformer.query_adapter}
    assert adapted == layers
    assert len(layers) == depth * 7
    assert all(".layers." in name and "language_model" in name for name in layers)
    assert not any(isinstance(module, LoraLayer) for module in encoder.backbone.modules())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ("down_proj",)])
def test_targets_restrict_the_adapter(checkpoint, targets, tmp_path):
    encoder = with_adapter(checkpoint, query_adapter=QueryAdapter(rank=3, alpha=1.5, targets=targets))
    names = list(encoder.transformer.query_adapter)
    assert {name.rpartition("/")[2] for name in names} == set(targets)
    assert len(names) == 2 * len(targets)
    encoder.save_pretrained(tmp_path)
    again = SLQEncoder(tmp_path, device="cpu")
    assert same_weights(again, encoder)
    assert np.array_equal(again.encode("a"), encoder.encode("a"))


def test_alpha_scales_the_updates(checkpoint):
    plain = build(checkpoint)
    small, default, twice = (
        on(plain, query_adapter=QueryAdapter(rank=2, alpha=alpha)).encode("a") for alpha in (1e-6, None, 4)
    )
    assert np.array_equal(default, twice)
    assert furthest(small, plain.with_queries(seed=1).encode("a")) < 1e-5
    assert furthest(small, default) > 0.01


def test_the_digest_is_of_the_weights_and_the_scale(checkpoint):
    plain = build(checkpoint)
    adapters = [QueryAdapter(rank=2, alpha=alpha) for alpha in (None, 4, 1)]
    first, same, other = (encoder_digest(on(plain, query_adapter=adapter)) for adapter in adapters)
    assert first == same
    assert first != other
    assert first != encoder_digest(on(plain, query_adapter=adapters[0]).with_queries(query_adapter=adapters[0], seed=1))


@EVERY_FAMILY
def test_prefixes_are_shared_with_models_without_an_adapter(checkpoint, mixed, kind):
    plain = build(checkpoint, kind)
    others = [on(plain, seed, query_adapter=adapter) for seed, adapter in ((1, SMALL), (2, True))]
    expected = [other.encode(mixed) for other in others]
    plain.prefix_store = store = PrefixStore()
    plain.encode(mixed)
    computed = store.counts.computed
    assert computed == len(mixed)
    for number, other in enumerate(others):
        reused = store.counts.reused
        other.prefix_store = store
        assert furthest(other.encode(mixed), expected[number]) < 1e-6
        assert store.counts.computed == computed
        assert store.counts.reused - reused == len(mixed)
    assert furthest(*expected) > 0.01


def copied_by_pickle(model: SLQEncoder) -> SLQEncoder:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied_by_pickle])
def test_a_copy_gives_the_same_and_stands_alone(checkpoint, mixed, copy_of):
    encoder = with_adapter(checkpoint, projection=16)
    expected = encoder.encode(mixed)
    again = copy_of(encoder)
    assert np.array_equal(again.encode(mixed), expected)
    with torch.no_grad():
        for weight in (*again.parameters(), *again.backbone.parameters()):
            weight.mul_(1.5)
    assert furthest(again.encode(mixed), expected) > 0.01
    assert np.array_equal(encoder.encode(mixed), expected)
    encoder.load_state_dict(again.state_dict())
    encoder.backbone.load_state_dict(again.backbone.state_dict())
    assert np.array_equal(again.encode(mixed), encoder.encode(mixed)), "its twin has its own backbone's weights"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_a_half_precision_backbone_keeps_float32_updates(checkpoint, mixed, dtype, tolerance):
    encoder = with_adapter(checkpoint)
    expected = encoder.encode(mixed)
    loaded = build(checkpoint, query_adapter=SMALL, dtype=dtype)
    loaded.load_state_dict(encoder.state_dict())
    cast = encoder.to(dtype)
    for model in (cast, loaded):
        assert model.backbone.dtype == dtype
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert furthest(model.encode(mixed), expected) < tolerance
    assert furthest(cast.float().encode(mixed), expected) < tolerance


def test_a_device_map_is_left_in_charge(checkpoint, mixed):
    encoder = with_adapter(checkpoint)
    placed = build(checkpoint, query_adapter=SMALL, device_map={"": "cpu"})
    placed.load_state_dict(encoder.state_dict())
    assert furthest(placed.encode(mixed), encoder.encode(mixed)) < 1e-6


def test_layers_that_are_offloaded_are_refused(checkpoint, tmp_path):
    """peft would make the adapter where the weights are: nowhere."""
    with pytest.raises(
        ValueError,
        match=r"in memory, but 7 layers, such as language_model\.layers\.1\.self_attn\.q_proj, are offloaded",
    ):
        build(checkpoint, query_adapter=SMALL, **offloading(tmp_path))


def test_a_backbone_with_the_hooks_of_accelerate_works(checkpoint, mixed):
    from accelerate import dispatch_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    backbone = AutoModelForImageTextToText.from_pretrained(checkpoint())
    names = ["model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head"]
    names += ["model.language_model.rotary_emb", *(f"model.language_model.layers.{n}" for n in range(2))]
    dispatch_model(backbone, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    assert backbone.hf_device_map
    assert hasattr(backbone.model.language_model.layers[0], "_hf_hook")
    placed = SLQEncoder.from_backbone(
        backbone, AutoProcessor.from_pretrained(checkpoint()), num_queries=4, query_adapter=SMALL
    )
    encoder = with_adapter(checkpoint)
    placed.load_state_dict(encoder.state_dict())
    assert furthest(placed.encode(mixed), encoder.encode(mixed)) < 1e-6
