"""Heads and adapters that do not fit: one error that says what is needed, and nothing half made is left."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slq_embed import QueryAdapter, SLQEncoder
from slq_embed.saving.assembly import QuerySettings
from tests.families import others
from tests.families.building import write
from tests.parts import SMALL, build, files, structure, trained


@pytest.fixture
def encoder(checkpoint) -> SLQEncoder:
    return trained(build(checkpoint, projection=16, query_adapter=SMALL))


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "slq")
    return tmp_path / "slq"


def head_of(folder):
    return next(folder.glob("*_Dense")) / "model.safetensors"


@pytest.mark.parametrize("projection", [0, -3, 33, "64", 2.5])
def test_a_head_of_that_width_is_refused(checkpoint, projection):
    plain = build(checkpoint)
    before, expected = structure(plain.backbone), plain.encode("a")
    needed = rf"projection is {projection!r}, but True or a width from 1 to 32"
    for make in (lambda: build(checkpoint, projection=projection), lambda: plain.with_queries(projection=projection)):
        with pytest.raises(ValueError, match=needed):
            make()
    assert structure(plain.backbone) == before
    assert np.array_equal(plain.encode("a"), expected)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (QueryAdapter(rank=0), r"rank is 0, but a rank from 1 to 16"),
        (QueryAdapter(rank=17, targets=["q_proj", "k_proj"]), r"rank is 17, but a rank from 1 to 16"),
        (QueryAdapter(rank=999), r"rank is 999, but a rank from 1 to 16"),
        (QueryAdapter(rank="8"), r"rank is '8', but a rank from 1 to 16"),
        (QueryAdapter(rank=2.5), r"rank is 2\.5, but a rank from 1 to 16"),
        (QueryAdapter(alpha="16"), r"alpha is '16'"),
        (QueryAdapter(targets=3), r"targets are 3, but a list of linear layers"),
        (QueryAdapter(targets={"q_proj"}), r"targets are \{'q_proj'\}, but a list of linear layers"),
        (8, r"query_adapter is 8, but .*QueryAdapter"),
        ({"rank": 8}, r"query_adapter is \{'rank': 8\}, but .*QueryAdapter"),
        (QueryAdapter(targets="q_proj"), r"targets are 'q_proj', but a list .*q_proj, k_proj, v_proj, o_proj"),
        (QueryAdapter(targets=["q_proj", "query"]), r"\['q_proj', 'query'\], but .*has q_proj, k_proj, v_proj, o_proj"),
        (QueryAdapter(targets=["lm_head"]), r"\['lm_head'\], but a list of linear layers of the language model"),
        (QueryAdapter(targets=["qkv"]), r"\['qkv'\], but a list of linear layers of the language model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(checkpoint, adapter, message):
    plain = build(checkpoint)
    before, expected = structure(plain.backbone), plain.encode("a")
    for make in (lambda: build(checkpoint, query_adapter=adapter), lambda: plain.with_queries(query_adapter=adapter)):
        with pytest.raises(ValueError, match=message):
            make()
    assert structure(plain.backbone) == before
    assert np.array_equal(plain.encode("a"), expected)


def test_layers_that_peft_refuses_are_named(tmp_path):
    """A state-space model computes with the weights of out_proj, and does not call it: an update would do nothing."""
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    folder = write(tmp_path, others.text_only("falcon_h1", head_dim=8, **sizes))
    every, some = QueryAdapter(rank=2), QueryAdapter(rank=2, targets=["q_proj", "v_proj"])
    with pytest.raises(
        ValueError, match=r"into gate_proj, .*of this falcon_h1: .*out_proj.* Name other targets: QueryAda"
    ):
        SLQEncoder.from_backbone(folder, num_queries=4, query_adapter=every, device="cpu")
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, query_adapter=some, device="cpu")
    assert np.isfinite(encoder.encode("a")).all()


@pytest.mark.parametrize("part", [{"query_adapter": True}, {"deep_queries": True}])
def test_queries_with_a_token_type_take_no_parts_that_act_in_the_layers(encoder, part):
    """As PaliGemma's. One class of its own loads such a model, and another one loads these parts."""
    slq_config = replace(encoder.slq_config, query_token_type=1, query_adapter=None)
    QuerySettings(4, projection=8).record(slq_config, 32)
    assert slq_config.projection == 8
    with pytest.raises(ValueError, match=r"have a token type of their own.* Use a projection head"):
        QuerySettings(4, **part).record(slq_config, 32)


def test_a_merged_folder_without_the_weights_of_its_adapter_is_refused(encoder, tmp_path):
    encoder.save_pretrained(tmp_path, form="merged")
    (tmp_path / "query_adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"weights of the query adapter are missing: the folder holds no query_adapter/adapter_model"
    ):
        SLQEncoder(tmp_path, device="cpu")


@pytest.mark.parametrize("what", ["weights", "record"])
def test_a_head_for_another_width_is_refused(folder, what):
    if what == "weights":
        save_file({"linear.weight": torch.zeros(12, 32), "linear.bias": torch.zeros(12)}, head_of(folder))
    else:
        record = json.loads((folder / "slq_config.json").read_text())
        (folder / "slq_config.json").write_text(json.dumps(record | {"projection": 12}))
    with pytest.raises(ValueError, match=r"(?s)do not fit its slq_config\.json.*2\.linear\.weight"):
        SLQEncoder(folder, device="cpu")


def test_a_missing_head_is_named(folder):
    head = head_of(folder)
    head.unlink()
    with pytest.raises(ValueError, match=rf"projection head are missing.*{head.relative_to(folder)}"):
        SLQEncoder(folder, device="cpu")


def test_a_damaged_head_is_named(folder):
    head_of(folder).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"projection head in .*{head_of(folder).relative_to(folder)} cannot be read"):
        SLQEncoder(folder, device="cpu")


@pytest.mark.parametrize("change", ["one layer", "one matrix", "all", "one too many", "another rank"])
def test_adapter_weights_that_miss_a_layer_are_refused(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    lora = sorted(name for name in weights if ".lora_" in name)
    dropped = {"one layer": lora[:2], "one matrix": lora[:1], "all": lora}.get(change, [])
    weights = {name: value for name, value in weights.items() if name not in dropped}
    if change == "one too many":
        weights[lora[0].replace("layers.0", "layers.7")] = weights[lora[0]].clone()
    elif change == "another rank":
        weights[lora[0]] = weights[lora[0]][:1].clone()
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"(?s)do not fit its slq_config\.json.*query_adapter.*lora_"):
        SLQEncoder(folder, device="cpu")


@pytest.mark.parametrize("change", ["no queries", "another tensor"])
def test_adapter_weights_without_the_queries_are_named(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    (queries,) = (name for name in weights if "trainable_tokens" in name)
    if change == "no queries":
        del weights[queries]
    else:
        weights["another"] = torch.zeros(2)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"latent queries.*adapter_model\.safetensors"):
        SLQEncoder(folder, device="cpu")


def test_an_adapter_without_a_name_for_its_backbone_is_not_saved(checkpoint, tmp_path):
    encoder = build(checkpoint, query_adapter=True)
    encoder.slq_config.backbone = ""
    with pytest.raises(ValueError, match="has no name"):
        encoder.save_pretrained(tmp_path / "slq")
    assert not files(tmp_path / "slq")
