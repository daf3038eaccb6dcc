"""The saved folder: stock Sentence Transformers modules only, so that anyone loads it without this package.

| piece | stock part | holds |
| --- | --- | --- |
| 0 | ``Transformer`` (root) | the queries as rows of the embedding table: a peft adapter, or the merged model |
| 1, 2 | ``WordWeights`` + ``Pooling("mean")``, or ``Pooling("lasttoken")`` | the pooling over the queries |
| last | ``Normalize`` | L2 |

Beside them, ``slq_config.json`` records what :class:`slq_embed.SLQEncoder` needs to load it again and to refuse
another backbone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, WordWeights
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbones import decoder_of, embedding_table, is_placed
from slq_embed.fingerprint import Fingerprint
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.query_tokens import Form, QueryTokens

FORMAT_VERSION = 1
CONFIG_NAME = "slq_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
QUERIES_NAME = "latent_queries.safetensors"  # merged form: the float32 master copy of what the table holds
FindFile = Callable[[str], str | None]


@dataclass
class SLQConfig:
    """What is recorded of an SLQ model.

    Args:
        backbone: Hub name or absolute folder of the backbone.
        revision: Its commit, where it came from the hub.
        tokens: The query tokens.
        pooling: ``"mean"`` or ``"last"``.
        form: How it is saved.
        max_text_chars: Longest text that is read, in characters.
        instructions: Text of the user turn for each kind of input.
        image_kwargs: How the image processor is called.
        fingerprint: Of the backbone; filled in on saving.
        loss: Name of the loss it was trained with, if any.
        log_temperature: Logarithm of the learned temperature, if any.
    """

    backbone: str
    revision: str | None
    tokens: QueryTokens
    pooling: PoolingMode
    form: Form
    max_text_chars: int
    instructions: dict[str, str]
    image_kwargs: dict[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    loss: str | None = None
    log_temperature: float | None = None
    format_version: int = field(default=FORMAT_VERSION)

    @classmethod
    def read(cls, find: FindFile) -> SLQConfig | None:
        """Read the record of a folder, or None where there is none.

        Raises:
            ValueError: If a newer version of this package wrote it.
        """
        if (path := find(CONFIG_NAME)) is None:
            return None
        values = json.loads(Path(path).read_text("utf8"))
        if values["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"This SLQ model has format {values['format_version']}, but this slq-embed reads up to "
                f"{FORMAT_VERSION}. Upgrade slq-embed; plain SentenceTransformer loads the folder as it is."
            )
        tokens = values.pop("tokens")
        print_ = values.pop("fingerprint")
        return cls(
            tokens=QueryTokens(tuple(tokens["strings"]), tuple(tokens["ids"]), tokens["source"]),
            fingerprint=Fingerprint(**print_) if print_ else None,
            **values,
        )

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        (folder / CONFIG_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf8")


def read_queries(find: FindFile) -> Tensor:
    """Read the latent queries of a saved folder, ``(Q, H)`` in float32.

    Raises:
        ValueError: If the folder holds none, or the file is damaged.
    """
    for name in (QUERIES_NAME, ADAPTER_NAME):
        if (path := find(name)) is not None:
            try:
                (queries,) = load_file(path).values()
            except Exception as error:
                raise ValueError(f"The latent queries in {path} cannot be read: {error}") from error
            return queries.float()
    raise ValueError(f"The folder holds neither {ADAPTER_NAME} nor {QUERIES_NAME}: its latent queries are missing.")


def read_record(folder: str | Path) -> tuple[SLQConfig, Tensor]:
    """Read what a folder records and its queries, ``(Q, H)``, without a backbone.

    Raises:
        ValueError: If the folder is no SLQ model, or its queries are missing or damaged.
    """

    def find(name: str) -> str | None:
        path = Path(folder) / name
        return str(path) if path.is_file() else None

    if (config := SLQConfig.read(find)) is None:
        raise ValueError(f"{folder} is no saved SLQ model: it has no {CONFIG_NAME}.")
    return config, read_queries(find)


def write_folder(
    folder: Path, config: SLQConfig, backbone: PreTrainedModel, processor: ProcessorMixin, queries: Tensor
) -> list[dict[str, Any]]:
    """Write everything but the model card and the host's own configuration.

    Args:
        folder: Where to; it exists.
        config: What to record.
        backbone: The frozen backbone; only read.
        processor: The processor with the SLQ chat template.
        queries: ``(Q, H)``.

    Returns:
        The content of ``modules.json``.

    Raises:
        ValueError: If the form does not fit the backbone.
    """
    if config.form == "adapter":
        _write_adapter(folder, config, backbone, queries)
    else:
        _write_merged(folder, config, backbone, queries)
    processor.save_pretrained(folder)
    kept = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": kept, "image": kept, "message": {**kept, "format": "structured"}},
        "module_output_name": "token_embeddings",
        # Flattened batches have no attention mask, which WordWeights needs.
        "unpad_inputs": False,
        # The template caps the text; a cut by tokens would take the queries with it.
        "processing_kwargs": {"text": {"truncation": False}, "image": config.image_kwargs},
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer, indent=2) + "\n", "utf8")
    modules = [{"idx": 0, "name": "0", "path": "", "type": _reference(Transformer)}]
    rows = max(len(embedding_table(backbone)), max(config.tokens.ids) + 1)
    for module in _tail(config, rows, queries.shape[1]):
        number = len(modules)
        path = f"{number}_{type(module).__name__}"
        (folder / path).mkdir(exist_ok=True)
        module.save(str(folder / path))
        if isinstance(module, WordWeights):  # one item a line would triple the file
            (folder / path / "config.json").write_text(json.dumps(module.get_config_dict()), "utf8")
        modules.append({"idx": number, "name": str(number), "path": path, "type": _reference(type(module))})
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", "utf8")
    config.write(folder)
    return modules


def _tail(config: SLQConfig, rows: int, width: int) -> list[Any]:
    if config.pooling == "last":
        return [Pooling(width, "lasttoken"), Normalize()]
    # WordWeights looks a token id up as the id-th entry of its vocabulary: "q" for a query, "" for all else.
    chosen = set(config.tokens.ids)
    vocabulary = ["q" if row in chosen else "" for row in range(rows)]
    weights = WordWeights(vocabulary, {"q": 1.0, "": 0.0}, unknown_word_weight=0.0)
    return [weights, Pooling(width, "mean"), Normalize()]


def _reference(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _write_adapter(folder: Path, config: SLQConfig, backbone: PreTrainedModel, queries: Tensor) -> None:
    from peft import TrainableTokensConfig

    if config.tokens.source == "resized":
        raise ValueError(
            "This backbone has too few rows that no text uses for the adapter form. Save with form='merged', which "
            "writes the whole model with rows of its own."
        )
    if not config.backbone:
        raise ValueError(
            "The adapter form names its backbone, but this one was built in memory and has no name. Save the backbone "
            "to a folder and give that (or backbone_name=) to SLQEncoder.from_backbone, or save with form='merged'."
        )
    # Stock loading gives the decoder without its head, so the path of the table starts there.
    decoder = decoder_of(backbone)
    table = decoder.get_input_embeddings()
    target = next(name for name, module in decoder.named_modules() if module is table)
    TrainableTokensConfig(
        token_indices=list(config.tokens.ids),
        target_modules=target,
        base_model_name_or_path=config.backbone,
        revision=config.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {f"base_model.model.{target}.trainable_tokens_delta": queries.detach().float().cpu().contiguous()}
    save_file(tensors, folder / ADAPTER_NAME, metadata={"format": "pt"})


def _write_merged(folder: Path, config: SLQConfig, backbone: PreTrainedModel, queries: Tensor) -> None:
    if is_placed(backbone):
        raise ValueError(
            "The merged form needs the whole backbone unquantized on one device. Save the adapter form, or load the "
            "backbone without device_map and quantization."
        )
    table = embedding_table(backbone).detach()
    ids = torch.tensor(config.tokens.ids, device=table.device)
    grown = max(int(ids.max()) + 1 - len(table), 0)

    def with_new_rows(weight: Tensor, rows: Tensor) -> Tensor:
        # A new tensor: the shared backbone is never written to.
        made = torch.cat([weight, weight.new_zeros(grown, weight.shape[1])])
        made[ids] = rows.to(made.device, made.dtype)
        return made

    state = dict(backbone.state_dict())
    merged = with_new_rows(table, queries.detach())
    head = backbone.get_output_embeddings()
    for name, value in state.items():
        if value.data_ptr() == table.data_ptr() and value.shape == table.shape:
            state[name] = merged  # the table, and a head tied to it
        elif grown and head is not None and value.data_ptr() == head.weight.data_ptr():
            state[name] = with_new_rows(value, torch.zeros_like(queries))
    backbone.save_pretrained(folder, state_dict=state)
    _edit_json(folder / "config.json", lambda values: _set_vocabulary(values, len(merged)))
    # A query token must never be an answer.
    suppressed = {"suppress_tokens": list(config.tokens.ids)}
    if (folder / "generation_config.json").exists():
        _edit_json(folder / "generation_config.json", lambda values: values.update(suppressed))
    save_file({"queries": queries.detach().float().cpu().contiguous()}, folder / QUERIES_NAME)


def _set_vocabulary(values: dict[str, Any], rows: int) -> None:
    for part in (values, values.get("text_config", {})):
        if "vocab_size" in part:
            part["vocab_size"] = rows


def _edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text("utf8"))
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n", "utf8")
