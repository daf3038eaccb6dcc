"""Several processes that share a batch and its negatives: the gradients of one process with the whole batch."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from transformers import TrainerCallback

from slq_embed import SLQEncoder, SymmetricInfoNCELoss
from slq_embed.training import CachedSymmetricInfoNCELoss
from tests.forks import forked, needs_fork
from tests.training import toy_pairs, toy_train

RUNS: dict[str, tuple[int, Any, bool]] = {
    "one": (1, SymmetricInfoNCELoss, False),
    "two": (2, partial(CachedSymmetricInfoNCELoss, mini_batch_size=3), True),
    "four": (4, SymmetricInfoNCELoss, True),
    "alone": (2, SymmetricInfoNCELoss, False),
}
"""Number of processes, loss, and whether they share negatives."""


class KeepGradients(TrainerCallback):
    def __init__(self, model, file):
        self.model, self.file = model, file

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 1:  # adapters start at zero: not at the first step
            torch.save({name: weight.grad.clone() for name, weight in self.model.named_parameters()}, self.file)


def train(checkpoint, output, processes, loss, gather):
    torch.set_num_threads(1)  # the threads of the parent are not there
    model = SLQEncoder.from_backbone(
        checkpoint, num_queries=4, seed=0, device="cpu", projection=8, query_adapter=True, deep_queries=True
    )
    trainer = toy_train(
        model,
        toy_pairs(),
        output,
        loss=loss(model, gather_across_devices=gather),
        callbacks=[KeepGradients(model, f"{output}.pt")],
        per_device_train_batch_size=8 // processes,
        max_steps=2,
        dataloader_drop_last=True,
        max_grad_norm=0.0,
        learning_rate=1e-3,
    )
    assert trainer.args.world_size == processes


def launch(checkpoint, folder):
    warnings.simplefilter("ignore", FutureWarning)  # of the hosts: only what runs distributed gives them
    for name, (processes, loss, gather) in RUNS.items():
        debug_launcher(train, (checkpoint, f"{folder}/{name}", processes, loss, gather), num_processes=processes)


@pytest.fixture(scope="module")
def gradients(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with forked(launch, str(checkpoint()), str(folder)) as process:
        process.join()
    assert process.exitcode == 0
    return {name: torch.load(folder / f"{name}.pt") for name in RUNS}


@needs_fork
@pytest.mark.parametrize("name", ["two", "four"])
def test_gradients_are_those_of_the_whole_batch(gradients, name):
    assert set(gradients[name]) == set(gradients["one"])
    for parameter, expected in gradients["one"].items():
        assert expected.norm() > 0, parameter
        assert (gradients[name][parameter] - expected).norm() < 1e-5 * expected.norm(), parameter


@needs_fork
def test_without_shared_negatives_they_differ(gradients):
    """Else the test above would show nothing."""
    queries = next(name for name in gradients["one"] if name.endswith("queries"))
    assert (gradients["alone"][queries] - gradients["one"][queries]).norm() > 0.01 * gradients["one"][queries].norm()
