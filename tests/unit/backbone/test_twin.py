"""A twin has the weights of the original and a structure of its own."""

from __future__ import annotations

import functools
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from slq_embed.backbone.twin import twin_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.nothing = None
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(rows) * self.scale


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    shared = Block()
    return nn.Sequential(shared, nn.ModuleDict({"inner": Block(), "none": nn.Identity()}), shared)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


def test_every_module_is_another_and_every_weight_is_the_same(model):
    twin = twin_of(model)
    theirs, ours = dict(model.named_modules()), dict(twin.named_modules())
    assert list(ours) == list(theirs)
    assert [type(module) for module in ours.values()] == [type(module) for module in theirs.values()]
    assert not {id(module) for module in ours.values()} & {id(module) for module in theirs.values()}
    for kind in ("named_parameters", "named_buffers"):
        weights = dict(getattr(model, kind)())
        assert weights
        assert all(value is weights[name] for name, value in getattr(twin, kind)())


def test_a_module_that_occurs_twice_has_one_twin(model):
    twin = twin_of(model)
    assert twin[0] is twin[2]
    assert twin[0] is not model[0]


def test_modules_without_a_child_and_none_are_kept(model):
    model[0].register_module("absent", None)
    assert twin_of(model)[0].absent is None


def test_casting_the_original_casts_the_twin(model, rows):
    twin = twin_of(model)
    model.to(torch.float64)
    assert {value.dtype for value in twin.parameters()} == {torch.float64}
    assert twin[0].scale.dtype == torch.float64
    assert torch.equal(twin[0](rows.double()), model[0](rows.double()))
    assert twin[0].linear.weight is model[0].linear.weight


def test_weights_that_are_replaced_are_replaced_in_both(model):
    twin = twin_of(model)
    model[0].linear.weight = nn.Parameter(torch.zeros(3, 3))
    model[0].scale = torch.full((3,), 2.0)
    assert twin[0].linear.weight is model[0].linear.weight
    assert twin[0].scale is model[0].scale


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_belong_to_one_of_them(model, rows, register):
    called: list[str] = []
    getattr(model[0].linear, register)(lambda *_: called.append("before"))
    twin = twin_of(model)
    getattr(model[0].linear, register)(lambda *_: called.append("original"))
    getattr(twin[0].linear, register)(lambda *_: called.append("twin"))
    model[0](rows)
    assert called == ["before", "original"]
    called.clear()
    twin[0](rows)
    assert called == ["before", "twin"]


def test_replaced_submodules_and_attributes_do_not_leak(model, rows):
    twin = twin_of(model)
    expected = model[0](rows)
    before = model[0].linear
    twin[0].linear = nn.Linear(3, 3)
    twin[0].extra = nn.Linear(3, 3)
    twin[0].note = "twin"
    assert model[0].linear is before
    assert not hasattr(model[0], "extra")
    assert not hasattr(model[0], "note")
    assert torch.equal(model[0](rows), expected)
    assert not torch.equal(twin[0](rows), expected)
    model[1]["inner"] = nn.Identity()
    assert isinstance(twin[1]["inner"], Block)


def test_the_mode_belongs_to_one_of_them(model):
    model.eval()
    twin = twin_of(model).train()
    assert twin[0].training
    assert not model[0].training


def test_gradients_reach_the_shared_weights(model, rows):
    twin = twin_of(model)
    twin[0](rows).sum().backward()
    assert model[0].linear.weight.grad is not None


def scaled(module: Block, rows: torch.Tensor, times: float = 2.0) -> torch.Tensor:
    return times * module.linear(rows)


@pytest.mark.parametrize(
    ("replace", "times"),
    [
        (lambda block: MethodType(scaled, block), 2.0),
        (lambda block: functools.partial(scaled, block), 2.0),
        (lambda block: functools.partial(scaled, block, times=3.0), 3.0),
        (lambda block: functools.update_wrapper(functools.partial(scaled, block), block.forward), 2.0),
    ],
)
def test_a_forward_of_its_own_calls_the_twins_submodules(model, rows, replace, times):
    block = model[0]
    block.forward = replace(block)
    expected = block(rows)
    twin = twin_of(model)[0]
    assert torch.equal(twin(rows), expected)
    twin.linear = nn.Identity()
    assert torch.equal(twin(rows), times * rows)
    assert torch.equal(block(rows), expected)


class Shift(ModelHook):
    """Adds one to what comes in and notes the module that it came to."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(module)
        return (args[0] + 1,), kwargs


def test_the_hooks_of_accelerate_run_in_the_twin(model, rows):
    hook, block = Shift(), model[0]
    add_hook_to_module(block, hook)
    expected = block(rows)
    twin = twin_of(model)[0]
    assert torch.equal(twin(rows), expected)
    assert hook.seen == [block, twin]
    twin.linear = nn.Linear(3, 3)
    assert torch.equal(twin(rows), twin.linear(rows + 1))
    assert torch.equal(block(rows), expected)
    remove_hook_from_module(block)
    assert torch.equal(twin(rows), twin.linear(rows + 1)), "the twin keeps what it had"


def test_a_twin_of_a_twin_shares_the_same_weights(model):
    again = twin_of(twin_of(model))
    assert again[0].linear.weight is model[0].linear.weight
    assert again[0] is again[2]
