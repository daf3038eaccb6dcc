"""The trainer's checkpoints: what it reloads at the end of training, and a reload that failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slq_embed.backbone.fingerprint import difference
from slq_embed.inputs.images import shortened
from slq_embed.saving.config import SLQConfig
from slq_embed.saving.weights import QUERIES, TEMPERATURE, read_folder

_COMPARED = ("pooling", "instructions", "max_text_chars", "image_kwargs", "projection", "query_adapter", "deep_queries")
"""What decides an embedding beside the weights: a run that went on with another one would train something else."""


class CheckpointState(dict[str, Tensor]):
    """A checkpoint's state. It stands in for the second model that the trainer builds from a checkpoint, only to copy its state.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: If the folder is no SLQ model, or its weights are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder
        self._slq_config, state = read_folder(folder)
        super().__init__(state)
        if self._slq_config.log_temperature is not None:
            self[TEMPERATURE] = torch.tensor(self._slq_config.log_temperature)

    def state_dict(self) -> CheckpointState:
        """What the trainer asks the second model for."""
        return self

    def require_same(self, model: Any) -> None:
        """Raise a ValueError if a model is another one than the checkpoint's; about a second for the first one."""
        if different := list(self._differences(model)):
            raise ValueError(
                f"{self._folder} is a checkpoint of another model: {'; '.join(different)}. Build the model as it was to go on "
                "from there, or train this one in another output_dir."
            )

    def _differences(self, model: Any) -> Iterator[str]:
        if (count := len(self[QUERIES])) != len(model.queries):
            yield f"num_queries was {count}, and is {len(model.queries)}"
        before, now = _as_saved(self._slq_config), _as_saved(model.slq_config)
        for name in _COMPARED:
            yield from _changes(name, before[name], now[name])
        recorded = self._slq_config.fingerprint
        if recorded is not None and (change := difference(recorded, model.backbone_fingerprint)) is not None:
            yield f"the backbone was {self._slq_config.backbone!r}, and is another one: {change}"


def _as_saved(slq_config: SLQConfig) -> dict[str, Any]:
    """A record as it is read from a file: with lists for tuples, and an adapter's default filled in."""
    if (adapter := slq_config.query_adapter) is not None:
        slq_config = replace(slq_config, query_adapter=replace(adapter, alpha=adapter.scaled_by))
    values: dict[str, Any] = json.loads(json.dumps(asdict(slq_config)))
    return values


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from _changes(f"{name}[{key!r}]", before.get(key), now.get(key))
    elif before != now:
        yield f"{name} was {shortened(repr(before))}, and is {shortened(repr(now))}"


def failed_reload(checkpoint: str) -> RuntimeError:
    """What a model says that was to be reloaded and was not: the trainer itself only logs it."""
    return RuntimeError(
        f"The best checkpoint ({checkpoint}) could not be loaded after training, so this model holds the last "
        "step's weights. The log says why. Load a checkpoint: SLQEncoder(folder). Or accept the last weights: "
        "model.load_state_dict(model.state_dict())."
    )
