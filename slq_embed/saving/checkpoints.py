"""The trainer's checkpoints: what it reloads at the end of training, and a reload that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from slq_embed.saving.weights import TEMPERATURE, read_folder


def checkpoint_state(folder: str | Path) -> Any:
    """What stands in for the second model that the trainer builds from a checkpoint, only to copy its ``state_dict()``.

    Raises:
        ValueError: If the folder is no SLQ model, or its weights are missing or damaged.
    """
    slq_config, state = read_folder(folder)
    if slq_config.log_temperature is not None:
        state[TEMPERATURE] = torch.tensor(slq_config.log_temperature)
    return SimpleNamespace(state_dict=lambda: state)


def expect_reload(model: Any, checkpoint: str) -> None:
    """Note that a model is about to take over a checkpoint's state; until that is there, it refuses to be used."""

    def done(module: nn.Module, incompatible_keys: Any) -> None:
        model.failed_checkpoint = None
        handle.remove()

    model.failed_checkpoint = checkpoint
    handle = model.register_load_state_dict_post_hook(done)


def failed_reload(checkpoint: str) -> RuntimeError:
    """What a model says that was to be reloaded and was not: the trainer itself only logs it."""
    return RuntimeError(
        f"The best checkpoint ({checkpoint}) could not be loaded after training, so this model holds the last "
        "step's weights. The log says why. Load a checkpoint: SLQEncoder(folder). Or accept the last weights: "
        "model.load_state_dict(model.state_dict())."
    )
