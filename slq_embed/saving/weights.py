"""The trained weights of a saved folder, by their names in an encoder's state dict."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentence_transformers.util.file_io import load_file_path
from torch import Tensor

from slq_embed.saving.config import CONFIG_NAME, SLQConfig

ADAPTER_NAME = "adapter_model.safetensors"
MERGED_ADAPTER = "query_adapter"  # merged form: the folder of the adapter, beside the model
QUERIES_NAME = "latent_queries.safetensors"  # merged form: the float32 master copy of what the table holds
HEAD_NAME = "1_Dense/model.safetensors"
DEEP_NAME = "deep_queries.safetensors"
QUERIES, DEEP, TEMPERATURE = "0.bias.queries", "0.bias.deep_queries", "0.bias.log_temperature"
SCORES = "1.bias.scores"
HEAD, ADAPTER = "2.", "0.query_adapter."

_PEFT = "base_model.model."
FindFile = Callable[[str], str | None]


def to_peft_names(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a query adapter, named as peft names them in a file."""
    return {_PEFT + name.replace("/", "."): value for name, value in adapter.items()}


def read_weights(find: FindFile, slq_config: SLQConfig) -> dict[str, Tensor]:
    """Read the trained weights of a saved folder, in float32, by their names in the encoder's state dict.

    Args:
        find: Gives the path of a file of the folder, or None.
        slq_config: The folder's record.

    Returns:
        The latent queries, ``(Q, H)``, and where the model has them, the scores of the pooling, the deep queries, the head and
        the adapter.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    path, tensors = _load(find, "latent queries", QUERIES_NAME, ADAPTER_NAME)
    if slq_config.form == "merged" and slq_config.query_adapter is not None:
        tensors |= _load(find, "weights of the query adapter", f"{MERGED_ADAPTER}/{ADAPTER_NAME}")[1]
    adapter = {name: value for name, value in tensors.items() if ".lora_" in name}
    others = [name for name in tensors if name not in adapter]
    if len(others) != 1:
        raise ValueError(
            f"The latent queries in {path} cannot be read: one tensor beside a LoRA's is needed, but there are "
            f"{len(others)}: {', '.join(others)}."
        )
    weights = {QUERIES: tensors[others[0]]}
    for name, value in adapter.items():
        layer, part, suffix = name.removeprefix(_PEFT).rsplit(".", 2)
        weights[f"{ADAPTER}{layer.replace('.', '/')}.{part}.{suffix}"] = value
    if slq_config.deep_queries:
        _, deep = _load(find, "vectors of the layers", DEEP_NAME)
        weights |= {f"0.bias.{name}": value for name, value in deep.items()}
    if slq_config.query_scores is not None:
        weights[SCORES] = torch.tensor(slq_config.query_scores)
    if slq_config.projection is not None:
        _, head = _load(find, "weights of the projection head", HEAD_NAME)
        weights |= {HEAD + name: value for name, value in head.items()}
    return {name: value.float() for name, value in weights.items()}


def _load(find: FindFile, what: str, *names: str) -> tuple[str, dict[str, Tensor]]:
    for name in names:
        if (path := find(name)) is not None:
            try:
                return path, load_file(path)
            except Exception as error:
                raise ValueError(f"The {what} in {path} cannot be read: {error}") from error
    raise ValueError(f"The {what} are missing: the folder holds no {' and no '.join(names)}.")


def read_folder(folder: str | Path) -> tuple[SLQConfig, dict[str, Tensor]]:
    """Read what a local folder records and its trained weights, without a backbone; see :func:`read_weights`.

    Raises:
        ValueError: If the folder is no SLQ model, or its weights are missing or damaged.
    """
    find = partial(load_file_path, str(folder), local_files_only=True)
    if (config := SLQConfig.read(find)) is None:
        raise ValueError(f"{folder} is no saved SLQ model: it has no {CONFIG_NAME}.")
    return config, read_weights(find, config)
