"""What the benchmarks do that is needed where a run is short and may not come again: on a GPU.

A row that fails costs itself only, results are written as they come, and what was measured holds no memory.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.scripts import ROOT

TEXT = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
VISION |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A benchmark as a module, on a small backbone, with the options of its command line."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str, *options: object):
        monkeypatch.setitem(importlib.import_module("shapes").SHAPES, "design", {"text": TEXT, "vision": VISION})
        more = ("--image-size", "64", "64", "--json", str(tmp_path / "result.json"))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options), *more])
        return importlib.import_module(name)

    return load


@pytest.fixture
def result(tmp_path):
    return lambda: json.loads((tmp_path / "result.json").read_text())


@pytest.fixture
def built(script, monkeypatch):
    """The backbones that were built and are held, by weak references. Only the benchmark collects what is in cycles."""
    training = script("training")
    build, references = training.build_backbone, []

    def remembered(*arguments):
        backbone = build(*arguments)
        references.append(weakref.ref(backbone))
        return backbone

    monkeypatch.setattr(training, "build_backbone", remembered)
    gc.disable()
    yield references
    gc.enable()


def test_the_rounds_leave_nothing_behind_when_peaks_are_measured(script, built, monkeypatch, result):
    """As much as a GPU holds is left to each method; and its results are written by then."""
    methods = ["encode", "prefix_stored", "query_adapter", "all_positions", "lora", "full_finetuning"]
    training = script("training", "--quick", "--rounds", 1, "--batch", 2, "--methods", *methods)

    def measure(*arguments):
        assert set(result()["seconds_per_step"]) == set(methods)
        assert len(built) == 3, "one for all that leave it as it is"
        assert not any(backbone() for backbone in built)
        yield "encode", [7]
        assert result()["peak_bytes_above_weights"] == {"encode": 7}
        yield "prefix_stored", [8]

    monkeypatch.setattr(training, "measure_peaks", measure)
    training.main()
    assert result()["peak_bytes_above_weights"] == {"encode": 7, "prefix_stored": 8}


def test_a_peak_in_this_process_leaves_the_memory_to_the_next(script, built, monkeypatch):
    training = script("training")
    held = []
    monkeypatch.setattr(training, "peak_above_weights", lambda *_: held.append(sum(one() is not None for one in built)))
    options = {"device": "cpu", "dtype": "float32", "shape": "design", "image_size": (64, 64), "checkpointing": False}
    for batch in (2, 1):
        training.peak_here(argparse.Namespace(**options), "full_finetuning", batch, None)
    assert held == [1, 1]


def test_a_method_that_fails_costs_its_own_row(script, monkeypatch, result):
    training = script("training", "--quick", "--rounds", 1, "--batch", 2, "--methods", "encode", "lora", "prefix")
    build = training.build_step

    def broken(method, *arguments):
        if method == "lora":
            raise torch.OutOfMemoryError("no memory")
        return build(method, *arguments)

    def peak(args, method, *arguments):
        if method == "encode":
            raise RuntimeError("killed")
        return 5

    monkeypatch.setattr(training, "build_step", broken)
    monkeypatch.setattr(training, "peak_elsewhere", peak)
    with pytest.raises(SystemExit, match="failed: lora, peak of encode"):
        training.main()
    assert set(result()["seconds_per_step"]) == {"encode", "prefix"}
    assert result()["peak_bytes_above_weights"] == {"lora": 5, "prefix": 5}
    assert result()["errors"] == {"lora": "OutOfMemoryError: no memory", "peak of encode": "RuntimeError: killed"}


COMPILED = ("compiled", "--quick", "--rounds", "1")


def test_a_compiled_form_that_goes_wrong_after_its_first_step_is_seen(script, monkeypatch, result, capsys):
    """As a CUDA graph would whose first run only records. The batch that is printed and written is the one that ran."""
    compiled = script(*COMPILED)

    @contextmanager
    def wrong_from_the_second_step_on(layers, options):
        calls = []

        def hook(layer, inputs, output):
            calls.append(1)
            return output.roll(1, -1) if options and len(calls) > 1 else output

        handle = layers[-1].register_forward_hook(hook)
        yield
        handle.remove()

    monkeypatch.setattr(compiled, "compiled", wrong_from_the_second_step_on)
    compiled.main()
    assert result()["difference"]["eager"] == 0
    assert result()["difference"]["compiled"] > 0.1
    assert result()["batch"] == 2
    assert "batch 2," in capsys.readouterr().out


def test_a_form_that_cannot_be_compiled_costs_its_own_row(script, monkeypatch, result):
    def no_compiler(graph, inputs):
        raise RuntimeError("there is no compiler")

    compiled = script(*COMPILED)
    forms = {"eager": None, "broken": {"backend": no_compiler}, "other": {"backend": "eager"}}
    monkeypatch.setattr(compiled, "FORMS", forms)
    with pytest.raises(SystemExit, match="failed: broken"):
        compiled.main()
    assert set(result()["seconds"]) == set(result()["difference"]) == {"eager", "other"}
    assert "there is no compiler" in result()["errors"]["broken"]


class Numbered(nn.Module):
    """A layer that knows its number, as those of a language model do: each is compiled anew."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.number


def test_all_layers_are_compiled(script):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layers, value = [Numbered(number) for number in range(20)], torch.zeros(2)
    torch.compiler.reset()
    with script("compiled").compiled(layers, {"dynamic": False, "backend": backend}):
        for layer in layers:
            value = layer(value)
    assert value.tolist() == [190, 190]
    assert len(graphs) == 20


def test_the_rounds_so_far_are_written(script, monkeypatch, result):
    """A run that is stopped within its rounds keeps those before."""
    training, rounds = script("training", "--rounds", 2, "--batch", 2, "--methods", "encode"), []

    def timed(call, device):
        rounds.append(call)
        if len(rounds) > 2:  # the first one warms up
            raise KeyboardInterrupt
        return 5.0

    monkeypatch.setattr(importlib.import_module("common"), "timed", timed)
    with pytest.raises(KeyboardInterrupt):
        training.main()
    assert result()["all_seconds"] == {"encode": [5.0]}
