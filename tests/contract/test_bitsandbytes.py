"""A backbone in the 4 bits of bitsandbytes, on a CPU. What needs CUDA is in tests/gpu."""

from __future__ import annotations

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.backbone import check
from slq_embed.backbone.fingerprint import weights_digest
from slq_embed.backbone.quantization import weight_bytes
from tests.parts import PARTS, furthest, trained
from tests.training import toy_pairs, toy_train

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; .ci/run installs it")


def nf4(nested: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)


def build(folder, config=None, **options) -> SLQEncoder:
    settings = {"num_queries": 4, "seed": 0, "device": "cpu", **options}
    return SLQEncoder.from_backbone(folder, quantization_config=config, **settings)


@pytest.fixture(scope="module")
def folder(checkpoint):
    return checkpoint()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("parts", [{}, PARTS["all"]], ids=["queries", "all"])
def test_it_trains_and_its_folder_gives_the_same_vectors(folder, mixed, nested, parts, tmp_path):
    model = trained(build(folder, nf4(nested), **parts))
    before, start = weights_digest(model.backbone), model.queries.detach().clone()
    toy_train(model, toy_pairs(), tmp_path / "run")
    assert not torch.equal(model.queries, start)
    expected = model.encode(mixed)
    assert weights_digest(model.backbone) == before
    model.save_pretrained(tmp_path / "slq")
    assert json.loads((tmp_path / "slq" / "slq_config.json").read_text())["quantization"]
    assert furthest(SLQEncoder(tmp_path / "slq", device="cpu").encode(mixed), expected) < 1e-6


def test_embeddings_are_close_to_the_unquantized_ones(mixed, tmp_path):
    """And so are those of stock loading. Some CPUs have a kernel there that rounds to bfloat16."""
    name = pretrained("mllm-tiny")
    model = build(name, nf4())
    embeddings = model.encode(mixed)
    assert 0.98 < (embeddings * build(name).encode(mixed)).sum(axis=1).min() < 0.9999
    model.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert (embeddings * stock.encode(mixed)).sum(axis=1).min() > 0.999


def test_the_self_check_passes_and_prefixes_can_be_kept(folder, mixed, tmp_path):
    model = build(folder, nf4())
    report = check(model.backbone, AutoProcessor.from_pretrained(folder))
    assert report.schedule == "prefix", report
    expected = model.encode(mixed)
    assert furthest(model.encode(mixed, batch_size=1), expected) < 1e-5
    model.prefix_store = PrefixStore(tmp_path)
    for _ in range(2):
        assert furthest(model.encode(mixed), expected) < 1e-5
    assert model.prefix_store.counts.reused > 0


def test_the_gradient_is_that_of_the_dense_weights(folder, mixed):
    def gradient(model: SLQEncoder) -> torch.Tensor:
        model.encode(mixed)  # a CPU's kernel for inference must not stay for training
        model(model.preprocess(mixed))["sentence_embedding"][:, ::2].sum().backward()
        return model.queries.grad

    quantized, dense = build(folder, nf4()), build(folder)
    with torch.no_grad():
        for name, layer in dense.backbone.base_model.named_modules():
            other = quantized.backbone.base_model.get_submodule(name)
            if isinstance(other, bitsandbytes.nn.Linear4bit):
                layer.weight.copy_(bitsandbytes.functional.dequantize_4bit(other.weight, other.weight.quant_state))
    found, expected = gradient(quantized), gradient(dense)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_scales_count_as_weights_and_belong_to_the_digest(folder):
    model, dense = build(folder, nf4()).backbone, build(folder).backbone
    linear = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    numbers = [layer.in_features * layer.out_features for layer in linear]
    # Half a byte for each number, 4 bytes for each block of 64, and a table of 16 values.
    saved = sum(4 * count - (count // 2 + 4 * -(-count // 64) + 64) for count in numbers)
    assert weight_bytes(dense) - weight_bytes(model) == saved
    before = weights_digest(model)
    linear[0].weight.quant_state.absmax[0] += 1
    assert weights_digest(model) != before


def test_a_model_whose_weights_were_packed_anew_is_refused():
    """As on a CPU with AVX512-BF16, at the first pass of the model that was loaded."""
    name = pretrained("mllm-tiny")
    model = AutoModelForImageTextToText.from_pretrained(name, quantization_config=nf4())
    layer = next(layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"bitsandbytes changed its 4-bit weights.*before its first use"):
        SLQEncoder.from_backbone(model, AutoProcessor.from_pretrained(name))


def test_a_quantization_with_which_a_vector_depends_on_its_batch_is_refused(folder):
    """LLM.int8 chooses the columns that it leaves alone by all rows of a batch."""
    with pytest.raises(ValueError, match="gives an input other embeddings in a batch than alone"):
        build(folder, BitsAndBytesConfig(load_in_8bit=True))
