"""What acts at the latent queries, in layers shaped as vLLM's are; the rest is tested with vLLM: make test-vllm."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import save
from torch import nn
from transformers import LlavaConfig, LlavaModel

from vllm_slq.layers import QueryRows, _add, act_inside
from vllm_slq.record import ADAPTER_CONFIG_NAME, ADAPTER_NAME, DEEP_NAME, Record

WIDTH, IDS = 4, (7, 8, 9)
PROMPTS = torch.tensor([1, 2, 7, 8, 9, 3, 7, 8, 9, 5])  # one prompt after another, as vLLM has them


class Packed(nn.Linear):
    """A linear layer that holds three, and gives a tuple."""

    output_sizes = (WIDTH, 2, 2)

    def forward(self, states):
        return super().forward(states), None


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = Packed(WIDTH, sum(Packed.output_sizes), bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()

    def forward(self, positions, hidden_states, residual):
        packed, _ = self.self_attn.qkv_proj(hidden_states)
        return torch.cat([packed, self.self_attn.o_proj(hidden_states)], dim=-1), residual


class Text(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))


class Model(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 - as vLLM has it

    def __init__(self):
        super().__init__()
        self.visual, self.model = Text(5), Text()


def act(model, files, **parts):
    record = Record(IDS, "mean", None, **parts)
    return act_inside(model, record, files.__getitem__, layers=2, device=torch.device("cpu"))


def run(model, rows, layer=1, batched=False):
    states = torch.arange(40.0).reshape(10, WIDTH) / 40
    before = states.clone()
    rows.find(PROMPTS)
    rows.start()
    given = states[None] if batched else states
    output, _ = model.model.layers[layer](torch.arange(10), hidden_states=given, residual=None)
    rows.end()
    assert torch.equal(states, before), "vLLM's buffer was written to"
    return states, output[0] if batched else output


BATCHED = pytest.mark.parametrize("batched", [False, True], ids=["of vLLM", "of transformers"])


@BATCHED
def test_deep_queries_are_added_to_the_states_of_each_query(batched):
    vectors = torch.randn(2, 3, WIDTH)
    model = Model()
    plain = Model()
    plain.load_state_dict(model.state_dict())
    rows = act(model, {DEEP_NAME: save({"deep_queries": vectors})}, deep_queries=True)
    states, output = run(model, rows, batched=batched)
    for query, places in enumerate([(2, 6), (3, 7), (4, 8)]):
        states[list(places)] += vectors[1, query]
    expected, _ = plain.model.layers[1](None, states, None)
    assert torch.allclose(output, expected, atol=1e-6)


@BATCHED
@pytest.mark.parametrize(("own", "start", "width"), [("q_proj", 0, 4), ("v_proj", 6, 2), ("o_proj", 8, 4)])
def test_an_adapter_changes_its_own_part_of_a_packed_layer_at_the_queries(own, start, width, batched):
    model, name = Model(), f"base_model.model.language_model.layers.1.self_attn.{own}"
    first, second = torch.randn(2, WIDTH), torch.randn(width, 2)
    tensors = {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    files = {ADAPTER_NAME: save(tensors), ADAPTER_CONFIG_NAME: json.dumps({"r": 2, "lora_alpha": 6}).encode()}
    plain = Model()
    plain.load_state_dict(model.state_dict())
    rows = act(model, files, query_adapter=True)
    states, output = run(model, rows, batched=batched)
    expected, _ = plain.model.layers[1](None, states, None)
    places = torch.tensor([2, 3, 4, 6, 7, 8])
    expected[places, start : start + width] += 3 * states[places] @ first.T @ second.T
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize(("own", "start", "width"), [("q_proj", 0, 6), ("v_proj", 6, 2)])
def test_a_part_that_vllm_counts_as_several_has_its_own_place(own, start, width):
    """Qwen3.5: of queries, keys, values and gates, the first three are one layer in transformers."""
    model = Model()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "v_proj"]}
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.output_sizes = (2, 2, 2, 2)
    name = f"base_model.model.language_model.layers.1.self_attn.{own}"
    first, second = torch.randn(2, WIDTH), torch.randn(width, 2)
    tensors = {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    files = {ADAPTER_NAME: save(tensors), ADAPTER_CONFIG_NAME: b'{"r": 2, "lora_alpha": 2}'}
    plain = Model()
    plain.load_state_dict(model.state_dict())
    states, output = run(model, act(model, files, query_adapter=True))
    expected, _ = plain.model.layers[1](None, states, None)
    places = torch.tensor([2, 3, 4, 6, 7, 8])
    expected[places, start : start + width] += states[places] @ first.T @ second.T
    assert torch.allclose(output, expected, atol=1e-6)


def test_a_part_whose_place_is_not_known_is_refused():
    name = "base_model.model.layers.0.self_attn.k_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(2, WIDTH), f"{name}.lora_B.weight": torch.zeros(3, 2)}
    files = {ADAPTER_NAME: save(tensors), ADAPTER_CONFIG_NAME: b'{"r": 2, "lora_alpha": 2}'}
    with pytest.raises(ValueError, match=r"changes layers\.0\.self_attn\.k_proj, but Text of vLLM has no such layer"):
        act(Model(), files, query_adapter=True)


def test_a_layer_that_vllm_does_not_have_is_refused():
    name = "base_model.model.layers.0.mlp.gate_proj"
    tensors = {f"{name}.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    files = {ADAPTER_NAME: save(tensors), ADAPTER_CONFIG_NAME: b'{"r": 2, "lora_alpha": 2}'}
    with pytest.raises(ValueError, match=r"changes layers\.0\.mlp\.gate_proj, but Text of vLLM has no such layer"):
        act(Model(), files, query_adapter=True)


@pytest.mark.parametrize("shape", [(10, 2, WIDTH), (10, 2 * WIDTH)])
def test_states_of_another_shape_are_refused(shape):
    model = Model()
    rows = act(model, {DEEP_NAME: save({"deep_queries": torch.zeros(2, 3, WIDTH)})}, deep_queries=True)
    rows.find(PROMPTS)
    said = re.escape(f"Layer of vLLM has states of shape {shape}")
    with pytest.raises(ValueError, match=said):
        model.model.layers[0](None, torch.zeros(shape), None)


def test_deep_queries_are_added_to_each_stream_of_states():
    vectors, layer = torch.randn(2, 3, WIDTH), nn.Identity()
    rows = QueryRows(IDS)
    rows.find(PROMPTS)
    states = torch.randn(5, 10, WIDTH)
    layer.forward = lambda hidden_states: hidden_states
    layer.register_forward_pre_hook(partial(_add, rows=rows, vectors=vectors[1]), with_kwargs=True)
    expected = states.clone()
    expected[:, 2:5] += vectors[1]
    expected[:, 6:9] += vectors[1]
    assert torch.allclose(layer(states), expected)


def test_rows_beyond_the_tokens_stay_as_they_are():
    rows = QueryRows(IDS)
    rows.find(PROMPTS)
    layer, states = nn.Identity(), torch.randn(12, WIDTH)
    layer.forward = lambda hidden_states: hidden_states
    layer.register_forward_pre_hook(partial(_add, rows=rows, vectors=torch.ones(3, WIDTH)), with_kwargs=True)
    changed = (layer(states) != states).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [2, 3, 4, 6, 7, 8]


def test_an_adapter_on_states_of_another_shape_is_refused():
    name = "base_model.model.layers.0.self_attn.o_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(2, WIDTH), f"{name}.lora_B.weight": torch.zeros(WIDTH, 2)}
    files = {ADAPTER_NAME: save(tensors), ADAPTER_CONFIG_NAME: b'{"r": 2, "lora_alpha": 2}'}
    model = Model()
    act(model, files, query_adapter=True)
    with pytest.raises(ValueError, match=r"Linear of vLLM has states of shape \(2, 10, 4\)"):
        model.model.layers[0].self_attn.o_proj(torch.zeros(2, 10, WIDTH))


def test_a_model_without_such_a_language_model_is_refused():
    with pytest.raises(ValueError, match="finds no 2 layers in Text"):
        act(Text(3), {}, deep_queries=True)


def test_a_step_without_token_ids_is_known():
    rows = QueryRows(IDS)
    rows.start()
    assert not rows.acted
    places, _ = rows.of(torch.zeros(10, WIDTH))
    assert len(places) == 0
    rows.find(PROMPTS)
    rows.start()
    rows.end()
    assert rows.acted, "for the pooler, which comes after the step"
    rows.start()
    assert not rows.acted, "what was found belongs to one step"


def test_where_the_code_of_transformers_runs_the_language_model_is_found_beside_as_many_layers_for_images():
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlavaConfig(
        text_config={"model_type": "llama", **sizes, "vocab_size": 16, "num_key_value_heads": 1},
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 8},
    )
    model = nn.Module()
    model.model = LlavaModel(config)
    act(model, {DEEP_NAME: save({"deep_queries": torch.zeros(2, 3, 8)})}, deep_queries=True)
    changed = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert changed == ["model.language_model.layers.0", "model.language_model.layers.1"]


def adapter_files(name, first, second):
    tensors = {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    return {ADAPTER_NAME: save(tensors), ADAPTER_CONFIG_NAME: b'{"r": 2, "lora_alpha": 2}'}


def test_an_adapter_takes_the_order_of_rows_that_vllm_has():
    """Llama 4: vLLM turns the rows of queries and keys when it loads them."""
    model, plain, states = Model(), Model(), torch.randn(10, WIDTH)
    plain.load_state_dict(model.state_dict())
    model.permute_qk_weight_for_rotary = lambda name, weight: (name, weight.flip(0) if "q_proj" in name else weight)
    first, second = torch.randn(2, WIDTH), torch.randn(WIDTH, 2)
    rows = act(model, adapter_files("model.layers.1.self_attn.q_proj", first, second), query_adapter=True)
    rows.find(PROMPTS)
    found, expected = (one.model.layers[1].self_attn.qkv_proj(states)[0] for one in (model, plain))
    places = torch.tensor([2, 3, 4, 6, 7, 8])
    expected[places, :WIDTH] += states[places] @ first.T @ second.flip(0).T
    assert torch.allclose(found, expected, atol=1e-6)


def test_an_adapter_finds_the_convolutions_under_the_name_that_vllm_has():
    """LFM2."""
    model, states = Model(), torch.randn(10, WIDTH)
    model.model.layers[1].short_conv = nn.ModuleDict({"in_proj": nn.Linear(WIDTH, 3, bias=False)})
    first, second = torch.randn(2, WIDTH), torch.randn(3, 2)
    rows = act(model, adapter_files("model.layers.1.conv.in_proj", first, second), query_adapter=True)
    rows.find(PROMPTS)
    layer = model.model.layers[1].short_conv["in_proj"]
    places = torch.tensor([2, 3, 4, 6, 7, 8])
    expected = states @ layer.weight.T
    expected[places] += states[places] @ first.T @ second.T
    assert torch.allclose(layer(states), expected, atol=1e-6)
