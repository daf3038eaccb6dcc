"""Several processes that share a batch and its negatives: the gradients of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from functools import partial
import torch
from accelerate import debug_launcher
from transformers import TrainerCallback
from slq_embed import SLQEncoder, SymmetricInfoNCELoss
from slq_embed.training import CachedSymmetricInfoNCELoss
from tests.training import toy_pairs, toy_train

class KeepGradients(TrainerCallback):
    def __init__(self, model, file):
        self.model, self.file = model, file

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 1:  # adapters start at zero: not at the first step
            torch.save({name: weight.grad.clone() for name, weight in self.model.named_parameters()}, self.file)

def train(checkpoint, output, processes, loss, gather):
    model = SLQEncoder.from_backbone(
        checkpoint, num_queries=4, seed=0, device="cpu", projection=8, query_adapter=True, deep_queries=True
    )
    trainer = toy_train(
        model, toy_pairs(), output, loss=loss(model, gather_across_devices=gather), callbacks=[KeepGradients(model, output + ".pt")],
        per_device_train_batch_size=8 // processes, max_steps=2, dataloader_drop_last=True, max_grad_norm=0.0,
        learning_rate=1e-3,
    )
    assert trainer.args.world_size == processes

if __name__ == "__main__":
    checkpoint, folder = sys.argv[1:]
    cached = partial(CachedSymmetricInfoNCELoss, mini_batch_size=3)
    for name, processes, loss, gather in [  # copies of this process: one import
        ("two", 2, SymmetricInfoNCELoss, True),
        ("four", 4, SymmetricInfoNCELoss, True),
        ("cached", 2, cached, True),
        ("alone", 2, SymmetricInfoNCELoss, False),
    ]:
        debug_launcher(train, (checkpoint, f"{folder}/{name}", processes, loss, gather), num_processes=processes)
    train(checkpoint, f"{folder}/one", 1, SymmetricInfoNCELoss, False)
"""


@pytest.fixture(scope="module")
def gradients(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    process = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(checkpoint()), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in ("one", "two", "four", "cached", "alone")}


@pytest.mark.parametrize("name", ["two", "four", "cached"])
def test_gradients_are_those_of_the_whole_batch(gradients, name):
    assert set(gradients[name]) == set(gradients["one"])
    for parameter, expected in gradients["one"].items():
        assert expected.norm() > 0, parameter
        assert (gradients[name][parameter] - expected).norm() < 1e-5 * expected.norm(), parameter


def test_without_shared_negatives_they_differ(gradients):
    """Else the test above would show nothing."""
    queries = next(name for name in gradients["one"] if name.endswith("queries"))
    assert (gradients["alone"][queries] - gradients["one"][queries]).norm() > 0.01 * gradients["one"][queries].norm()
