"""Loading: a backbone that is to get latent queries, and a saved model with its recorded backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers.util.file_io import load_file_path
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.chat_template import without_prompts
from slq_embed.backbone.families import commit_of, family_of, is_placed, load_backbone, load_processor, tokenizer_of
from slq_embed.backbone.fingerprint import difference, fingerprint
from slq_embed.backbone.quantization import IN_MEMORY
from slq_embed.saving.config import SLQConfig
from slq_embed.saving.weights import read_weights
from slq_embed.toy.pretrained import pretrained

_HUB = {"token": "token", "cache_folder": "cache_dir", "local_files_only": "local_files_only"}
_HUB |= {"revision": "revision", "trust_remote_code": "trust_remote_code"}
"""Arguments for the hub: as Sentence Transformers names them, and as transformers does."""
MODEL_ARGUMENTS = ("dtype", "attn_implementation", "device_map", "quantization_config")


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for the hub, under the names of transformers."""
    return {theirs: arguments[ours] for ours, theirs in _HUB.items() if arguments.get(ours) is not None}


@dataclass
class LoadedBackbone:
    """A backbone in memory; ``device``, where it has to compute, may leave the choice to Sentence Transformers (None)."""

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str  # hub name or absolute folder; empty where it has none
    commit: str | None
    device: str | torch.device | None


def load_or_share(
    backbone: str | Path | PreTrainedModel,
    processor: ProcessorMixin | None,
    arguments: dict[str, Any],
) -> LoadedBackbone:
    """Load a backbone by name, or take a loaded one as it is; see :meth:`slq_embed.SLQEncoder.from_backbone`.

    Args:
        backbone: Hub name, folder, or a loaded model.
        processor: Of a loaded model.
        arguments: The other arguments of ``from_backbone``; those for loading are taken out.

    Raises:
        ValueError: If the backbone is unsupported, is a saved SLQ model, or has neither name nor processor.
        OSError: If nothing can be loaded from there.
    """
    _require_backbone(backbone)
    hub = hub_arguments(arguments)
    device = arguments.pop("device", None)
    for argument in _HUB:
        arguments.pop(argument, None)
    recorded = arguments.pop("backbone_name", None)
    model_kwargs = {key: value for key in MODEL_ARGUMENTS if (value := arguments.pop(key, None)) is not None}
    model_kwargs |= arguments.pop("model_kwargs", None) or {}
    processor_kwargs = arguments.pop("processor_kwargs", None) or {}
    if isinstance(backbone, PreTrainedModel):
        _require_no_settings(model_kwargs)
        family_of(backbone.config)
        model, name, commit = backbone, recorded or backbone.name_or_path, hub.get("revision")
        if processor is None and not name:
            raise ValueError("A backbone without a name came without its processor: pass processor=.")
        device = device or model.device
    else:
        name = str(backbone)
        if (Path(name) / "slq_config.json").is_file():
            raise ValueError(f"{name} is a saved SLQ model already. Load it with SLQEncoder({name!r}).")
        try:
            model = load_backbone(name, **hub, **model_kwargs)
        except OSError as error:
            if Path(name).is_dir():
                raise
            raise OSError(f"{_not_found(name)} ({error})") from error
        commit = None
        if recorded is None:  # else it would be a commit of another name
            commit = commit_of(name, **{key: value for key, value in hub.items() if key != "trust_remote_code"})
        if is_placed(model):
            device = model.device
    if processor is None:
        processor = load_processor(name, **hub, **processor_kwargs)
    return LoadedBackbone(model, processor, _absolute(recorded or name), commit, device)


def _require_backbone(backbone: object) -> None:
    if not isinstance(backbone, str | Path | PreTrainedModel):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}, but a hub name, a folder or a loaded transformers model is needed. Of a "
            "SentenceTransformer or an SLQEncoder, pass its transformers_model."
        )


def _require_no_settings(model_kwargs: Mapping[str, Any]) -> None:
    if given := ", ".join(name for name, value in model_kwargs.items() if value is not None):
        raise ValueError(
            f"The backbone is loaded already, so {given} came too late. Give its name or folder in place of the loaded model, or "
            f"load that with from_pretrained(..., {given.split(',')[0]}=...)."
        )


def _not_found(name: str) -> str:
    shipped = {folder.name for folder in Path(pretrained("slq-tiny")).parent.iterdir()}
    hint = f"Did you mean pretrained({name!r})?" if name in shipped else "Check the name, the token and the connection."
    return f"There is no folder {name!r}, and the hub cannot be reached or gives no such model. {hint}"


def _absolute(name: str) -> str:
    """A hub name as it is, a folder as an absolute path."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


@dataclass
class SavedModel:
    """What a saved folder holds, and the backbone it names."""

    slq_config: SLQConfig
    weights: dict[str, Tensor]  # by their names in the encoder's state dict
    backbone: PreTrainedModel
    processor: ProcessorMixin
    host_config: dict[str, Any]
    model_card: str | None


def load_saved(folder: str, backbone: PreTrainedModel | str | Path | None, arguments: Mapping[str, Any]) -> SavedModel:
    """Load a saved model.

    Args:
        folder: Folder or hub name.
        backbone: A backbone, or its name, in place of the recorded one.
        arguments: Arguments of ``SentenceTransformer``: for the hub, ``model_kwargs``, ``processor_kwargs``.

    Raises:
        ValueError: If the folder is no SLQ model, a file is damaged, or the backbone is not the one it was trained on.
        OSError: If there is no such folder or hub name, or the backbone cannot be loaded.
    """
    try:
        return _load_saved(folder, backbone, arguments)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:  # these name no file
        raise ValueError(
            f"A file of {folder}, or of its backbone, is damaged ({error}). Copy the folder again, or save the model again."
        ) from error


def _load_saved(folder: str, backbone: PreTrainedModel | str | Path | None, arguments: Mapping[str, Any]) -> SavedModel:
    names = ("token", "cache_folder", "revision", "local_files_only")
    find = partial(load_file_path, folder, **{name: arguments.get(name) for name in names})
    slq_config = SLQConfig.read(find)
    if slq_config is None:
        if not Path(folder).is_dir() and find("config.json") is None:
            raise OSError(_not_found(folder))
        other = f"To put latent queries on a backbone, use SLQEncoder.from_backbone({folder!r})."
        if find("modules.json") is not None:
            other = (
                "It is another model of Sentence Transformers, or one that plain SentenceTransformer saved, which drops that file. "
                "Load the folder that SLQEncoder saved."
            )
        raise ValueError(f"{folder} is no saved SLQ model: it has no slq_config.json. {other}")
    host_config, card = find("config_sentence_transformers.json"), find("README.md")
    hub = hub_arguments(arguments)
    processor = load_processor(folder, **hub, **(arguments.get("processor_kwargs") or {}))
    if tokenizer_of(processor).convert_tokens_to_ids(list(slq_config.tokens.strings)) != list(slq_config.tokens.ids):
        raise ValueError(  # transformers makes up an empty tokenizer where its file is missing
            f"The tokenizer in {folder} is not the one of its model: tokenizer.json is missing, or was replaced. Copy the folder "
            "again, or save the model again."
        )
    if isinstance(processor.chat_template, str):
        processor.chat_template = without_prompts(processor.chat_template)
    return SavedModel(
        slq_config,
        read_weights(find, slq_config),
        _find_backbone(folder, slq_config, hub, dict(arguments.get("model_kwargs") or {}), backbone),
        processor,
        {} if host_config is None else json.loads(Path(host_config).read_text("utf8")),
        None if card is None else Path(card).read_text("utf8"),
    )


def _find_backbone(
    folder: str,
    slq_config: SLQConfig,
    hub: dict[str, Any],
    model_kwargs: dict[str, Any],
    backbone: PreTrainedModel | str | Path | None,
) -> PreTrainedModel:
    """The backbone of a saved model. ``slq_config`` is brought up to date where the backbone has moved."""
    if backbone is not None:
        _require_backbone(backbone)
    merged, trained_on, found = slq_config.form == "merged", slq_config.backbone, "this one"
    if isinstance(backbone, PreTrainedModel):
        _require_no_settings(model_kwargs)
        if merged and slq_config.backbone != backbone.name_or_path:  # the record of a merged folder is a label
            slq_config.backbone, slq_config.revision = _absolute(backbone.name_or_path), None
    elif (quantization := slq_config.quantization) is not None and "quantization_config" not in model_kwargs:
        if quantization["quant_method"] == IN_MEMORY:
            raise ValueError(
                f"{folder} was trained on a quantized backbone, and no file can say how it was quantized. Quantize it again "
                f"and pass it: SLQEncoder({folder!r}, backbone=model). Or pass model_kwargs={{'quantization_config': ...}}, "
                "with None for the unquantized backbone, whose vectors are close to the right ones."
            )
        model_kwargs["quantization_config"] = quantization
    if merged and backbone is None:  # an adapter saved from it names this folder
        slq_config.backbone, slq_config.revision = _absolute(folder), hub.get("revision")
        return load_backbone(folder, **{**hub, **model_kwargs})
    if not isinstance(backbone, PreTrainedModel):
        if backbone is not None:  # saving again records where it is now
            slq_config.backbone, slq_config.revision = _absolute(str(backbone)), None
            found = repr(slq_config.backbone)
        name = slq_config.backbone
        try:
            backbone = load_backbone(name, **{**hub, "revision": slq_config.revision, **model_kwargs})
        except OSError as error:
            raise OSError(
                f"{folder} was trained on the backbone {trained_on!r}, but nothing can be loaded from "
                f"{'there' if name == trained_on else repr(name)}. Bring it back, or say where it is: "
                f"SLQEncoder({folder!r}, backbone=...). ({error})"
            ) from error
    recorded = slq_config.fingerprint
    if recorded is not None and (change := difference(recorded, fingerprint(backbone), layers_only=merged)):
        raise ValueError(
            f"{folder} was trained on the backbone {trained_on!r}, but {found} is another: {change}. "
            "Its latent queries would give wrong vectors. Load it with the backbone it was trained on."
        )
    return backbone
