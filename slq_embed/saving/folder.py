"""The saved folder: stock Sentence Transformers modules, so that anyone loads it without this package.

| piece | stock part | holds |
| --- | --- | --- |
| 0 | ``Transformer`` (root) | the queries as rows of the embedding table: a peft adapter, or the merged model |
| 1 | ``Dense`` | the projection head, if there is one |
| next | ``WordWeights`` + ``Pooling("mean")``, or ``Pooling("lasttoken")`` | the pooling over the queries |
| last | ``Normalize`` | L2 |

The head stands before the pooling, because ``WordWeights`` gives float32 in half precision too, which a ``Dense`` after it
refuses. A linear map of the mean is the mean of the mapped states.

With a query adapter, deep queries or a token type of the queries, piece 0 is a class whose source is in the folder, because
stock loading would leave them out without a word. The host refuses such a folder unless it gets ``trust_remote_code=True``.
A merged folder has the query adapter in the folder ``query_adapter``, as peft writes it.

Beside them, ``slq_config.json`` records what :class:`slq_embed.SLQEncoder` needs to load it again and to refuse
another backbone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, WordWeights
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from slq_embed.backbone.chat_template import reads_videos
from slq_embed.backbone.families import (
    decoder_of,
    embedding_table,
    family_of,
    is_placed,
    loses_template,
    tokenizer_of,
)
from slq_embed.backbone.quantization import IN_MEMORY, is_quantized, quantization_of, stock_quantization
from slq_embed.modules import LatentQueryPooling, LatentQueryTransformer, ProjectionHead
from slq_embed.modules.latent_query_pooling import query_weights
from slq_embed.modules.query_adapter import lora_config
from slq_embed.saving.config import SLQConfig
from slq_embed.saving.leftovers import placed_at_once, require_other_folder
from slq_embed.saving.plain_names import key_mapping, require_plain_loading
from slq_embed.saving.weights import (
    ADAPTER,
    ADAPTER_NAME,
    DEEP,
    DEEP_NAME,
    HEAD,
    MERGED_ADAPTER,
    QUERIES,
    QUERIES_NAME,
    SCORES,
    to_peft_names,
)

ARCHITECTURE_PREFIX = "SLQ"
"""What a merged folder writes before the name of the backbone's architecture."""
_ADAPTER_CLASS = "slq_query_adapter.QueryAdapterTransformer"
_TYPES_CLASS = "slq_query_types.QueryTypesTransformer"


def save_model(model: Any, folder: Path, host_config: Mapping[str, Any]) -> None:
    """Write everything of a :class:`slq_embed.SLQEncoder` but the model card, in the form that its ``slq_config`` names.

    Raises:
        ValueError: If the form does not fit the backbone, or the folder is the backbone's own or a file.
    """
    slq_config, backbone = model.slq_config, model.backbone
    _require_own_modules(model, slq_config)
    if (learned := model.transformer.log_temperature) is not None:
        slq_config.log_temperature = float(learned.detach())
    slq_config.loss = model.model_card_data.loss_name or slq_config.loss
    slq_config = replace(
        slq_config,
        fingerprint=model.backbone_fingerprint,
        quantization=quantization_of(backbone),
        query_scores=model.state_dict()[SCORES].tolist() if slq_config.pooling == "weighted" else None,
    )
    if slq_config.form == "merged":  # it holds its own backbone, and names no other
        slq_config.backbone = slq_config.backbone_label
    require_other_folder(folder, slq_config)
    require_plain_loading(backbone, slq_config.form, slq_config.query_adapter is not None)
    with placed_at_once(folder) as unfinished:
        _write(unfinished, model, slq_config, host_config)


def _write(folder: Path, model: Any, slq_config: SLQConfig, host_config: Mapping[str, Any]) -> None:
    backbone, processor, weights = model.backbone, model.processor, model.state_dict()
    queries, reference = weights[QUERIES], _reference(Transformer)
    if slq_config.form == "adapter":
        _write_adapter(folder, slq_config, backbone, weights)
    else:
        _write_merged(folder, slq_config, backbone, weights)
    if slq_config.deep_queries:
        save_file({"deep_queries": _plain(weights[DEEP])}, folder / DEEP_NAME)
    if not slq_config.is_stock:
        reference = _TYPES_CLASS if slq_config.query_token_type else _ADAPTER_CLASS
        source = Path(__file__).with_name(f"{reference.partition('.')[0]}.py")
        shutil.copyfile(source, folder / source.name)
    processor.save_pretrained(folder)
    whole = decoder_of(backbone) is backbone  # then what stock loading gives ends in logits
    kept = {"method": "forward", "method_output_name": ["hidden_states", -1] if whole else "last_hidden_state"}
    modalities = {"text": kept} | ({} if tokenizer_of(processor) is processor else {"image": kept})
    modalities |= {"video": kept} if reads_videos(processor, backbone.config) else {}
    transformer: dict[str, Any] = {
        # What has no class without a head is loaded with it (Nemotron Omni).
        "transformer_task": "feature-extraction" if type(backbone.config) in AutoModel._model_mapping else "any-to-any",
        "modality_config": {**modalities, "message": {**kept, "format": "structured"}},
        "module_output_name": "token_embeddings",
        # Flattened batches have no attention mask, which WordWeights needs.
        "unpad_inputs": False,
        # The template caps the text; a cut by tokens would take the queries with it.
        "processing_kwargs": {"text": {"truncation": False}, "image": slq_config.image_kwargs},
    }
    for part, kwargs in family_of(backbone.config).call_kwargs.items():
        transformer["processing_kwargs"].setdefault(part, {}).update(kwargs)
    if loses_template(processor):
        transformer["processing_kwargs"]["chat_template"] = {"chat_template": processor.chat_template}
    model_kwargs: dict[str, Any] = {}
    if slq_config.quantization is not None and slq_config.quantization["quant_method"] != IN_MEMORY:
        model_kwargs["quantization_config"] = stock_quantization(backbone, slq_config.quantization)
    if names := key_mapping(backbone):
        model_kwargs["key_mapping"] = names
    if model_kwargs:
        transformer["model_kwargs"] = model_kwargs
    _write_json(folder / "sentence_bert_config.json", transformer)
    modules = [{"idx": 0, "name": "0", "path": "", "type": reference}]
    rows = max(len(embedding_table(backbone)), max(slq_config.tokens.ids) + 1)
    for module in _tail(slq_config, rows, queries.shape[1], weights):
        number = len(modules)
        name = f"{number}_{type(module).__name__}"
        (folder / name).mkdir(exist_ok=True)
        module.save(str(folder / name))
        if isinstance(module, WordWeights):  # one item a line would triple the file
            (folder / name / "config.json").write_text(json.dumps(module.get_config_dict()), "utf8")
        modules.append({"idx": number, "name": str(number), "path": name, "type": _reference(type(module))})
    _write_json(folder / "modules.json", modules)
    slq_config.write(folder)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(host_config, indent=2, sort_keys=True) + "\n", "utf8")


def _require_own_modules(model: Any, slq_config: SLQConfig) -> None:
    head = [] if slq_config.projection is None else [ProjectionHead]
    if [type(module) for module in model] != [LatentQueryTransformer, LatentQueryPooling, *head, Normalize]:
        modules = ", ".join(type(module).__name__ for module in model)
        raise ValueError(
            f"The model's modules were changed ({modules}), and a saved SLQ model would not have them. For a linear head, use "
            "projection= of SLQEncoder.from_backbone. For other modules, save the model without them, then put them behind it: "
            "SentenceTransformer(modules=[*SentenceTransformer(folder), ...])."
        )


def _tail(slq_config: SLQConfig, rows: int, width: int, weights: Mapping[str, Tensor]) -> list[Any]:
    head: list[Any] = []
    if (dim := slq_config.projection) is not None:
        states = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        head = [Dense(width, dim, activation_function=nn.Identity(), **states)]
        head[0].load_state_dict({name.removeprefix(HEAD): weights[name] for name in weights if name.startswith(HEAD)})
        width = dim
    if slq_config.pooling == "last":
        return [*head, Pooling(width, "lasttoken"), Normalize()]
    # A mean over all tokens, in which WordWeights weighs each by its word, becomes one over the queries: all else weighs 0. The
    # word of a token id is that entry of the vocabulary: "q" of a query ("q0", "q1", ... with weights of their own), else "".
    named, weight_of = dict.fromkeys(slq_config.tokens.ids, "q"), {"q": 1.0}
    if slq_config.pooling == "weighted":
        named = {row: f"q{number}" for number, row in enumerate(slq_config.tokens.ids)}
        weight_of = dict(zip(named.values(), query_weights(weights[SCORES]).tolist(), strict=True))
    vocabulary = [named.get(row, "") for row in range(rows)]
    word_weights = WordWeights(vocabulary, {**weight_of, "": 0.0}, unknown_word_weight=0.0)
    return [*head, word_weights, Pooling(width, "mean"), Normalize()]


def _reference(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _write_adapter(
    folder: Path, slq_config: SLQConfig, backbone: PreTrainedModel, weights: Mapping[str, Tensor]
) -> None:
    from peft import TrainableTokensConfig

    if slq_config.tokens.source == "resized":
        raise ValueError(
            "This backbone has too few rows that no text uses for the adapter form. Save with form='merged', which "
            "writes the whole model with rows of its own."
        )
    if not slq_config.backbone:
        raise ValueError(
            "The adapter form names its backbone, but this one was built in memory and has no name. Save the backbone "
            "to a folder and give that (or backbone_name=) to SLQEncoder.from_backbone, or save with form='merged'."
        )
    # Stock loading gives the decoder without its head, so the path of the table starts there.
    decoder = decoder_of(backbone)
    table = decoder.get_input_embeddings()
    target = next(name for name, module in decoder.named_modules() if module is table)
    ids = list(slq_config.tokens.ids)
    named: dict[str, Any] = {"base_model_name_or_path": slq_config.backbone, "revision": slq_config.revision}
    if slq_config.query_adapter is None:
        tokens = TrainableTokensConfig(token_indices=ids, target_modules=target, inference_mode=True, **named)
        tokens.save_pretrained(str(folder))
        _write_tensors(folder, {f"{target}.trainable_tokens_delta": weights[QUERIES]})
    else:
        own = {f"{target}.token_adapter.trainable_tokens_delta": weights[QUERIES]}
        _write_lora(folder, slq_config, decoder, weights, own, trainable_token_indices={target: ids}, **named)


def _write_lora(
    folder: Path,
    slq_config: SLQConfig,
    decoder: PreTrainedModel,
    weights: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    **named: Any,
) -> None:
    """Write the query adapter as peft reads it, and other tensors beside its own."""
    adapter = slq_config.query_adapter
    assert adapter is not None
    options = {"alora_invocation_tokens": list(slq_config.tokens.ids), "task_type": "CAUSAL_LM", "inference_mode": True}
    lora_config(adapter, adapter.layers(decoder), **options, **named).save_pretrained(str(folder))
    tensors = {name.removeprefix(ADAPTER): value for name, value in weights.items() if name.startswith(ADAPTER)}
    _write_tensors(folder, {**tensors, **others})


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: _plain(value) for name, value in tensors.items()}
    save_file(to_peft_names(plain), folder / ADAPTER_NAME, metadata={"format": "pt"})


def _plain(weight: Tensor) -> Tensor:
    return weight.float().cpu().contiguous()


def _write_merged(
    folder: Path, slq_config: SLQConfig, backbone: PreTrainedModel, weights: Mapping[str, Tensor]
) -> None:
    if is_quantized(backbone):
        raise ValueError(
            "The merged form cannot hold a quantized backbone. Save with form='adapter', which records how it was quantized. "
            "Or build the same model on the unquantized backbone, give it these weights with load_state_dict, and save that."
        )
    if is_placed(backbone):
        raise ValueError(
            "The merged form needs the whole backbone on one device. Save the adapter form, or load the backbone without "
            "device_map."
        )
    table, queries = embedding_table(backbone).detach(), weights[QUERIES]
    ids = torch.tensor(slq_config.tokens.ids, device=table.device)
    grown = max(int(ids.max()) + 1 - len(table), 0)

    def with_new_rows(weight: Tensor, rows: Tensor) -> Tensor:
        # A new tensor: the shared backbone is never written to.
        longer = torch.cat([weight, weight.new_zeros(grown, weight.shape[1])])
        longer[ids] = rows.to(longer.device, longer.dtype)
        return longer

    state = dict(backbone.state_dict())
    merged = with_new_rows(table, queries)
    head = backbone.get_output_embeddings()
    for name, value in state.items():
        if value.data_ptr() == table.data_ptr() and value.shape == table.shape:
            state[name] = merged  # the table, and a head tied to it
        elif grown and head is not None and value.data_ptr() == head.weight.data_ptr():
            state[name] = with_new_rows(value, torch.zeros_like(queries))
    backbone.save_pretrained(folder, state_dict=state)
    with edited_json(folder / "config.json") as config:
        # transformers goes by the model type, but servers go by this name. One that knows the backbone would pool over all
        # tokens without a word; under a name of our own it refuses, and the plugin vllm-slq serves it.
        config["architectures"] = [f"{ARCHITECTURE_PREFIX}{name}" for name in config["architectures"]]
        for part in (config, config.get("text_config", {})):
            if grown and "vocab_size" in part:
                part["vocab_size"] = len(merged)
    if (generation_config := folder / "generation_config.json").exists():
        with edited_json(generation_config) as generation:  # a query token must never be an answer
            suppressed = [*(generation.get("suppress_tokens") or ()), *slq_config.tokens.ids]
            generation["suppress_tokens"] = list(dict.fromkeys(suppressed))
    save_file({"queries": _plain(queries)}, folder / QUERIES_NAME)
    if slq_config.query_adapter is not None:
        # In a folder of its own: beside the weights, transformers would take it for an adapter of another model.
        _write_lora(folder / MERGED_ADAPTER, slq_config, decoder_of(backbone), weights, {})


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """What a JSON file holds; changes of it are written back."""
    values = json.loads(path.read_text("utf8"))
    yield values
    _write_json(path, values)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf8")
