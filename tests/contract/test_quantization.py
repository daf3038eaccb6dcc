"""A quantized backbone: it trains and encodes, saved folders give the same vectors, and its bits stay as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.backbone import check
from slq_embed.backbone.fingerprint import weights_digest
from slq_embed.backbone.quantization import is_packed, parts_of, pass_gradients, weight_bytes
from slq_embed.backbone.twin import twin_of
from tests.checkpoints import FAMILIES
from tests.parts import PARTS, furthest, structure, trained
from tests.training import toy_pairs, toy_train

torchao = pytest.importorskip("torchao.quantization")
from transformers import TorchAoConfig  # noqa: E402 - needs torchao

moves_weights = pytest.mark.skipif(
    not hasattr(SentenceTransformer, "_inference"),
    reason="encode of sentence-transformers before 6.2 moves weights in inference mode, which torchao refuses",
)
TOWERS = r"(model\.)?(visual|vision_tower|multi_modal_projector)"


def int8(**options) -> TorchAoConfig:
    return TorchAoConfig(torchao.Int8WeightOnlyConfig(), **options)


def int4() -> TorchAoConfig:
    """Four bits, with a byte for each: torchao's way on every device."""
    groups = torchao.granularity.PerGroup(32)
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))


def packed_int4() -> TorchAoConfig:
    """Two weights a byte, with kernels of a CPU."""
    prototype = pytest.importorskip("torchao.prototype.quantization.int4")
    return TorchAoConfig(prototype.PrototypeInt4WeightOnlyConfig(group_size=32))


def build(folder, config=None, **options) -> SLQEncoder:
    settings = {"num_queries": 4, "seed": 0, "device": "cpu", "quantization_config": config, **options}
    return SLQEncoder.from_backbone(folder, **settings)


def by_hand(folder, config) -> SLQEncoder:
    """On a model that the caller has quantized."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    torchao.quantize_(model.base_model, config)
    return SLQEncoder.from_backbone(model, AutoProcessor.from_pretrained(folder), num_queries=4, seed=0)


def gradients(model: SLQEncoder, inputs) -> dict[str, torch.Tensor]:
    model.train()
    model(model.preprocess(inputs))["sentence_embedding"][:, ::2].sum().backward()
    model.eval()
    return {name: weight.grad for name, weight in model.named_parameters()}


def least_cosine(first, second) -> float:
    return float((first * second).sum(axis=1).min())


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint()


@pytest.fixture(scope="module")
def quantized(folder) -> SLQEncoder:
    return build(folder, int8())


def test_the_weights_take_fewer_bytes_and_the_table_and_the_head_are_whole(folder, quantized):
    plain = build(folder)
    assert not is_packed(quantized.backbone.get_input_embeddings().weight)
    assert not is_packed(quantized.backbone.get_output_embeddings().weight)
    linear = [layer for layer in plain.backbone.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    # A row has int8 values, a float32 scale and an int8 zero point.
    saved = sum(layer.weight.nbytes - layer.weight.numel() - 5 * layer.out_features for layer in linear)
    assert weight_bytes(plain.backbone) - weight_bytes(quantized.backbone) == saved


def test_embeddings_are_close_to_the_unquantized_ones(folder, quantized, mixed):
    embeddings = quantized.encode(mixed)
    assert 1e-4 < furthest(embeddings, build(folder).encode(mixed)) < 0.1
    assert furthest(embeddings, quantized.encode(mixed, batch_size=1)) < 1e-5


@pytest.mark.parametrize("parts", [{}, PARTS["all"]], ids=["queries", "all"])
def test_training_changes_no_bit_of_the_backbone(folder, parts, tmp_path):
    model = build(folder, int8(), **parts)
    before, digest = structure(model.backbone), weights_digest(model.backbone)
    start = model.queries.detach().clone()
    toy_train(model, toy_pairs(), tmp_path)
    assert not torch.equal(model.queries, start)
    assert (weights_digest(model.backbone), structure(model.backbone)) == (digest, before)


def test_gradients_are_those_of_the_dense_weights(folder, mixed):
    def fresh() -> SLQEncoder:
        return trained(build(folder, int8(), query_adapter=True, deep_queries=True), scale=0.05)

    found, dense = gradients(fresh(), mixed), fresh()
    for layer in dense.transformer.query_decoder.modules():  # it shares the weights with the backbone
        if isinstance(layer, torch.nn.Linear) and is_packed(layer.weight):
            vars(layer).pop("forward")
            layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    expected = gradients(dense, mixed)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert (gradient - found[name]).norm() <= 1e-4 * gradient.norm(), name


def test_the_backward_pass_keeps_no_dense_weight():
    """torchao itself keeps a dense copy of each weight from the forward to the backward pass."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))).requires_grad_(False)
    torchao.quantize_(layers, torchao.Int8WeightOnlyConfig())

    def kept(model) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            model(torch.randn(2, 64, requires_grad=True))
        return sum(sizes)

    twin = twin_of(layers)
    assert pass_gradients(twin)
    assert kept(layers) >= 3 * 64 * 64 * 4
    assert kept(twin) == 0


@moves_weights
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("skipped", [None, ["model.visual", "model.vision_tower", "lm_head"], [TOWERS, "lm_head"]])
def test_a_saved_folder_gives_the_same_vectors_wherever_it_is_loaded(checkpoint, mixed, kind, skipped, tmp_path):
    if kind == "fast_vlm":
        pytest.importorskip("timm")
    model = build(checkpoint(kind), int8(modules_to_not_convert=skipped))
    expected = model.encode(mixed)
    model.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 5000
    assert furthest(SLQEncoder(tmp_path, device="cpu").encode(mixed), expected) < 1e-6
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert furthest(stock.encode(mixed), expected) < 1e-6


def test_the_unquantized_backbone_is_there_for_the_asking(folder, quantized, mixed, tmp_path):
    quantized.save_pretrained(tmp_path)
    plain = {"model_kwargs": {"quantization_config": None}, "device": "cpu"}
    expected = build(folder).encode(mixed)
    for model in (SLQEncoder(tmp_path, **plain), SentenceTransformer(str(tmp_path), **plain)):
        assert furthest(model.encode(mixed), expected) < 1e-6
    for form in ("adapter", "merged"):
        SLQEncoder(tmp_path, **plain).save_pretrained(tmp_path / form, form=form)
        assert json.loads((tmp_path / form / "slq_config.json").read_text())["quantization"] is None
        assert furthest(SLQEncoder(tmp_path / form, device="cpu").encode(mixed), expected) < 1e-6


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="adapters need transformers 5.23")
def test_a_folder_with_an_adapter_gives_the_same_vectors(folder, mixed, tmp_path):
    model = trained(build(folder, int8(), **PARTS["all"]))
    model.save_pretrained(tmp_path)
    assert furthest(SLQEncoder(tmp_path, device="cpu").encode(mixed), model.encode(mixed)) < 1e-6
    stock = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert furthest(stock.encode(mixed), model.encode(mixed)) < 1e-5


@moves_weights
def test_a_model_that_was_quantized_by_hand_works_and_its_folder_says_what_to_pass(folder, quantized, mixed, tmp_path):
    model = by_hand(folder, torchao.Int8WeightOnlyConfig())
    assert furthest(model.encode(mixed), quantized.encode(mixed)) < 1e-6
    assert gradients(model, mixed)["0.bias.queries"].norm() > 0
    model.slq_config.backbone = str(folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no file can say how it was quantized"):
        SLQEncoder(tmp_path, device="cpu")
    shared = SLQEncoder(tmp_path, backbone=model.backbone)
    named = SLQEncoder(tmp_path, device="cpu", model_kwargs={"quantization_config": int8()})
    for again in (shared, named):
        assert furthest(again.encode(mixed), model.encode(mixed)) < 1e-6


def test_a_checkpoint_that_is_quantized_itself_needs_no_record(folder, quantized, mixed, tmp_path):
    quantized.backbone.save_pretrained(tmp_path / "int8")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "int8")
    model = build(tmp_path / "int8")
    assert furthest(model.encode(mixed), quantized.encode(mixed)) < 1e-6
    model.save_pretrained(tmp_path / "slq")
    assert json.loads((tmp_path / "slq" / "slq_config.json").read_text())["quantization"] is None
    again = SLQEncoder(tmp_path / "slq", device="cpu")
    assert furthest(again.encode(mixed), quantized.encode(mixed)) < 1e-6
    with pytest.raises(
        RuntimeError, match="automatic conversion of the weights"
    ):  # transformers 5.23: no decoder alone
        SentenceTransformer(str(tmp_path / "slq"), device="cpu")


def test_stored_prefixes_are_not_shared_with_the_unquantized_backbone(folder, quantized, mixed, tmp_path):
    store, plain = PrefixStore(tmp_path), build(folder)
    expected = [model.encode(mixed) for model in (plain, quantized)]
    for model, vectors in zip((plain, quantized), expected, strict=True):
        model.prefix_store = store
        for _ in range(2):
            assert furthest(model.encode(mixed), vectors) < 1e-5
        model.prefix_store = None
    assert store.counts.computed == 2 * len(mixed)


def test_the_digest_reads_the_packed_values(folder):
    model = build(folder, int8()).backbone
    before = weights_digest(model)
    _, part = next(parts_of(model.model.language_model.layers[1].mlp.up_proj.weight))
    part[0, 0] += 1
    assert weights_digest(model) != before


def test_the_self_check_passes(folder, quantized):
    report = check(quantized.backbone, AutoProcessor.from_pretrained(folder))
    assert report.schedule == "prefix", report


def test_the_backbone_generates_as_transformers_alone_loads_it(folder, quantized):
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=int8())
    inputs = AutoProcessor.from_pretrained(folder).tokenizer("a red", return_tensors="pt")
    answers = [m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (model, quantized.backbone)]
    assert torch.equal(*answers)


def test_a_quantized_table_is_refused(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tables = {"filter_fn": lambda module, name: isinstance(module, torch.nn.Embedding)}
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(), **tables)
    with pytest.raises(ValueError, match=r"input embeddings are quantized.*Quantize linear layers only"):
        SLQEncoder.from_backbone(model, AutoProcessor.from_pretrained(folder))


def test_the_merged_form_is_refused(folder, quantized, tmp_path):
    for model in (quantized, by_hand(folder, torchao.Int8WeightOnlyConfig())):
        with pytest.raises(ValueError, match=r"cannot hold a quantized backbone.*load_state_dict"):
            model.save_pretrained(tmp_path, form="merged")
    merged = build(folder, form="merged")
    merged.load_state_dict(quantized.state_dict())
    merged.save_pretrained(tmp_path)  # the way that the message names


def test_a_backbone_without_free_rows_trains_quantized_and_is_saved_unquantized(checkpoint, mixed, tmp_path):
    """As docs/limits.md says it."""
    folder = checkpoint("internvl", spare=0)
    model = build(folder, int8(), form="merged")
    toy_train(model, toy_pairs(), tmp_path / "run")
    merged = build(folder, form="merged")
    merged.load_state_dict(model.state_dict())
    merged.save_pretrained(tmp_path / "slq")
    stock = SentenceTransformer(str(tmp_path / "slq"), device="cpu")
    assert furthest(stock.encode(mixed), merged.encode(mixed)) < 1e-5
    assert 1e-4 < furthest(merged.encode(mixed), model.encode(mixed)) < 0.1


def test_a_loaded_model_and_a_quantization_are_refused(folder, quantized, tmp_path):
    backbone, processor = quantized.backbone, AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="loaded already, so quantization_config came too late"):
        SLQEncoder.from_backbone(backbone, processor, quantization_config=int8())
    quantized.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loaded already, so quantization_config came too late"):
        SLQEncoder(tmp_path, backbone=backbone, model_kwargs={"quantization_config": int8()})


def test_without_the_package_the_error_names_it(folder, quantized, tmp_path, monkeypatch):
    quantized.save_pretrained(tmp_path)
    config = int8()
    monkeypatch.setattr("slq_embed.backbone.quantization.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchao, which is not installed.*slq-embed\[quantization\]"):
        build(folder, config)
    with pytest.raises(ImportError, match="torchao, which is not installed"):
        SLQEncoder(tmp_path, device="cpu")


@pytest.mark.parametrize("config", [int4, packed_int4])
def test_four_bits_encode_and_train(config, mixed, tmp_path):
    """In bfloat16: the CPU kernel of packed weights takes sixty times as long in float32."""
    name, options = pretrained("mllm-tiny"), {"dtype": torch.bfloat16}
    model, plain = build(name, config(), **options), build(name, **options)
    embeddings = model.encode(mixed)
    assert 0.9 < least_cosine(embeddings, plain.encode(mixed)) < 0.9999
    before = weights_digest(model.backbone)
    toy_train(model, toy_pairs(), tmp_path / "run")
    assert weights_digest(model.backbone) == before
    assert np.abs(model.encode(mixed) - embeddings).max() > 1e-4
    model.save_pretrained(tmp_path / "slq")
    same = {"model_kwargs": {"quantization_config": config(), **options}}
    assert furthest(SLQEncoder(tmp_path / "slq", device="cpu", **same).encode(mixed), model.encode(mixed)) < 1e-6


def test_packed_four_bits_have_the_gradient_of_their_own_values():
    """Their kernel has no backward pass of its own. It is linear, so differences give the gradient."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).requires_grad_(False)
    torchao.quantize_(layers, packed_int4().quant_type)
    twin = twin_of(layers)
    pass_gradients(twin)
    states = torch.randn(5, 64, requires_grad=True)
    outputs = twin(states)
    weights = torch.randn_like(outputs)
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), states)
    step = torch.randn_like(states)
    moved = (layers(states.detach() + step) - layers(states.detach())) * weights
    assert abs(float((gradient * step).sum() - moved.sum())) < 1e-3 * float(moved.abs().sum())


def test_a_cast_leaves_packed_weights_alone(folder):
    model = build(folder, int8())
    before = weights_digest(model.backbone)
    model.half()
    assert weights_digest(model.backbone) == before
    assert model.queries.dtype == torch.float32


def test_a_quantized_backbone_moves_with_its_queries(folder):
    """Its tensors know fewer operations than others. Here it moves to where nothing is kept, as no other device is at hand."""
    model = build(folder, int8())
    kinds = {name: type(weight) for name, weight in model.backbone.base_model.named_parameters()}
    model.to("meta")
    assert {weight.device.type for weight in [*model.backbone.parameters(), model.queries]} == {"meta"}
    assert {name: type(weight) for name, weight in model.backbone.base_model.named_parameters()} == kinds
