"""SLQEncoder: a Sentence Transformer made of a frozen multimodal LLM and a few latent queries."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers.util.file_io import load_file_path
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from slq_embed.artifact import SLQConfig, read_queries, read_record, write_folder
from slq_embed.assembly import build_modules, find_backbone, join_modules, rebuild_modules
from slq_embed.backbones import commit_of, embedding_table, family_of, is_placed, load_backbone
from slq_embed.initialisation import Initialisation, initial_queries
from slq_embed.latent_query_encoder import LatentQueryEncoder
from slq_embed.model_card import SLQModelCardData
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.query_tokens import Form

_QUERIES, _TEMPERATURE = "0.bias.queries", "0.bias.log_temperature"


class SLQEncoder(LatentQueryEncoder):
    """A Sentence Transformer whose only trained weights are ``Q`` latent queries.

    Everything of :class:`~sentence_transformers.SentenceTransformer` works: ``encode``, ``encode_query``,
    ``similarity``, the trainer, evaluators, the hub. What this class adds: building from a backbone
    (:meth:`from_backbone`), the fast training path, and saving as a folder of stock modules.

    Args:
        model_name_or_path: A saved SLQ model: a folder or a hub name.
        backbone: The backbone to use in place of the recorded one: an already loaded model, which is then
            shared, or the folder or hub name it has moved to. It must be the same backbone.
        **kwargs: As for ``SentenceTransformer``; ``model_kwargs`` go to the backbone.

    Raises:
        ValueError: If the folder is no SLQ model, or the backbone is another than the recorded one.
        OSError: If the recorded backbone is not where it was.
    """

    model_card_data_class = SLQModelCardData

    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        *,
        backbone: PreTrainedModel | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        self._given_backbone = (backbone,)  # a tuple, because nn.Module is not ready yet
        if isinstance(backbone, PreTrainedModel):
            kwargs.setdefault("device", str(backbone.device))
        super().__init__(None if model_name_or_path is None else str(model_name_or_path), **kwargs)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel,
        processor: ProcessorMixin | None = None,
        *,
        num_queries: int = 20,
        init: Initialisation | Tensor = "normal",
        seed: int | None = None,
        pooling: PoolingMode = "mean",
        form: Form = "adapter",
        instructions: Mapping[str, str] | None = None,
        max_text_chars: int = 8192,
        max_pixels: int | None = None,
        image_kwargs: Mapping[str, Any] | None = None,
        backbone_name: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        device_map: Any = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> SLQEncoder:
        """Put fresh latent queries on a frozen multimodal LLM.

        Args:
            backbone: Hub name, folder, or an already loaded model, which is shared, frozen and not copied.
            processor: Of an already loaded model; copied where it must differ (tokenizer, chat template).
            num_queries: How many latent queries, ``Q``; 20 in the paper.
            init: ``"normal"`` (standard deviation ``H ** -0.5``, as the paper's authors), ``"zeros"``,
                ``"tokens"`` (the mean token embedding plus noise at the table's own scale), or a ``(Q, H)``
                tensor.
            seed: Seed of the initialisation; without one, torch's generator is used.
            pooling: ``"mean"`` over the queries, as in the paper, or the ``"last"`` one.
            form: How it will be saved. ``"adapter"``: the queries beside the backbone's name; needs rows of
                the embedding table that no text uses. ``"merged"``: the whole model.
            instructions: Text of the user turn for ``"text"``, ``"image"`` and ``"composed"`` inputs; see
                :data:`slq_embed.chat_template.DEFAULT_INSTRUCTIONS`.
            max_text_chars: Longest text that is read, in characters.
            max_pixels: Largest image, in pixels, for families that keep the aspect ratio.
            image_kwargs: How to call the image processor, on top of the family's defaults.
            backbone_name: Folder or hub name to record, where an already loaded model does not know its own.
            device: Where to compute; an already loaded model stays where it is.
            dtype: Of the backbone; ``"auto"`` keeps the checkpoint's.
            attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``, ...
            quantization_config: For the backbone, as transformers takes it.
            device_map: For the backbone, as transformers takes it.
            revision: Commit, tag or branch of the backbone.
            token: Hub token.
            cache_folder: Where hub files are kept.
            local_files_only: Whether to stay off the network.
            trust_remote_code: Whether the backbone may bring code of its own.
            model_kwargs: More arguments for loading the backbone.
            processor_kwargs: More arguments for loading the processor.
            **kwargs: For ``SentenceTransformer``: ``prompts``, ``similarity_fn_name``, ``truncate_dim``, ...

        Raises:
            ValueError: If the backbone is unsupported, has too few free rows for the adapter form, or an
                argument does not fit; the message says what to do.
            OSError: If nothing can be loaded from there.

        Source:
            Defaults of arXiv:2604.13710.
        """
        hub = {"token": token, "cache_dir": cache_folder, "local_files_only": local_files_only}
        if isinstance(backbone, PreTrainedModel):
            family_of(backbone.config)
            name = backbone_name or backbone.name_or_path
            if processor is None and not name:
                raise ValueError("A backbone without a name came without its processor: pass processor=.")
            device = device or backbone.device
            commit = revision
        else:
            name = str(backbone)
            if (Path(name) / "slq_config.json").is_file():
                raise ValueError(f"{name} is a saved SLQ model already. Load it with SLQEncoder({name!r}).")
            given = {
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "quantization_config": quantization_config,
                "device_map": device_map,
                "revision": revision,
                "trust_remote_code": trust_remote_code,
                **hub,
            }
            loading = {key: value for key, value in given.items() if value is not None} | dict(model_kwargs or {})
            backbone = load_backbone(name, **loading)
            commit = commit_of(name, revision=revision, **hub)
            if is_placed(backbone):
                device = backbone.device
        if processor is None:
            processor = AutoProcessor.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, **hub, **(processor_kwargs or {})
            )
        modules, record = build_modules(
            name,
            commit,
            backbone,
            processor,
            initial_queries(init, num_queries, embedding_table(backbone), seed),
            pooling=pooling,
            form=form,
            instructions=instructions,
            max_text_chars=max_text_chars,
            max_pixels=max_pixels,
            image_kwargs=image_kwargs,
        )
        model = cls(modules=modules, device=None if device is None else str(device), **kwargs)
        model.slq = record
        return model

    def with_queries(
        self,
        num_queries: int | None = None,
        *,
        init: Initialisation | Tensor = "normal",
        seed: int | None = None,
        pooling: PoolingMode | None = None,
    ) -> SLQEncoder:
        """Another encoder with fresh queries on the same backbone, which reads its inputs as this one does.

        Args:
            num_queries: How many; by default as many as here.
            init: As for :meth:`from_backbone`.
            seed: As for :meth:`from_backbone`.
            pooling: As for :meth:`from_backbone`; by default as here.
        """
        table = embedding_table(self.backbone)
        modules, record = rebuild_modules(
            self.slq,
            self.backbone,
            self.processor,
            initial_queries(init, num_queries or self.num_queries, table, seed),
            pooling or self.slq.pooling,
        )
        model = type(self)(
            modules=modules,
            device=str(self.device),
            prompts=dict(self.prompts),
            default_prompt_name=self.default_prompt_name,
            similarity_fn_name=self.similarity_fn_name,
            truncate_dim=self.truncate_dim,
        )
        model.slq, model.num_workers = record, self.num_workers
        return model

    def save_pretrained(self, path: str | Path, *args: Any, form: Form | None = None, **kwargs: Any) -> None:
        """Save as a folder that plain ``SentenceTransformer(path)`` loads.

        Args:
            path: The folder.
            *args: As for ``SentenceTransformer.save_pretrained``.
            form: ``"adapter"`` (the queries beside the backbone's name) or ``"merged"`` (the whole model);
                by default as :meth:`from_backbone` was told.
            **kwargs: As for ``SentenceTransformer.save_pretrained``.

        Raises:
            ValueError: If the form does not fit the backbone.
        """
        before = self.slq.form
        self.slq.form = form or before
        try:
            super().save_pretrained(str(path), *args, **kwargs)
        finally:
            self.slq.form = before

    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save in the form that :attr:`slq` names; see :meth:`save_pretrained`."""
        self._refuse_after_failed_reload()
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.slq.log_temperature = self._log_temperature()
        self.slq.loss = self.model_card_data.loss_name or self.slq.loss
        if self.slq.form == "merged":  # it holds its backbone: where that came from is no place to look
            record = replace(self.slq, fingerprint=None, backbone=self.model_card_data.backbone_label(self.slq))
        else:
            record = replace(self.slq, fingerprint=self.backbone_fingerprint)
        write_folder(folder, record, self.backbone, self.processor, self.queries)
        host = folder / "config_sentence_transformers.json"
        host.write_text(json.dumps(self._get_model_config(), indent=2, sort_keys=True) + "\n", "utf8")
        if create_model_card:
            self._create_model_card(str(folder), model_name, train_datasets)

    def _load_modules(self, model_name_or_path: str, *args: Any, **load: Any) -> Any:
        names = ("token", "cache_folder", "revision", "local_files_only")
        find = partial(load_file_path, model_name_or_path, **{key: load.get(key) for key in names})
        config = SLQConfig.read(find)
        if config is None:
            raise ValueError(
                f"{model_name_or_path} is no saved SLQ model: it has no slq_config.json. To put latent queries on a "
                f"backbone, use SLQEncoder.from_backbone({model_name_or_path!r})."
            )
        if (host := find("config_sentence_transformers.json")) is not None:
            self._parse_model_config(json.loads(Path(host).read_text("utf8")))
        if (card := find("README.md")) is not None:
            self._model_card_text = Path(card).read_text("utf8")
        hub = {"token": load.get("token"), "cache_dir": load.get("cache_folder")}
        hub["local_files_only"] = load.get("local_files_only", False)
        own = {"revision": load.get("revision"), "trust_remote_code": load.get("trust_remote_code", False), **hub}
        model_kwargs = dict(load.get("model_kwargs") or {})
        backbone = find_backbone(model_name_or_path, config, own, model_kwargs, self._given_backbone[0])
        processor = AutoProcessor.from_pretrained(model_name_or_path, **own, **(load.get("processor_kwargs") or {}))
        queries = read_queries(find)
        self.slq = config
        modules = join_modules(backbone, processor, queries, config)
        return OrderedDict((str(number), module) for number, module in enumerate(modules)), OrderedDict()

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, module_classes: Any, **kwargs: Any) -> Any:
        # The trainer builds a second model from a checkpoint, only to copy its state. Ours needs no backbone.
        config, queries = read_record(model_name_or_path)
        state = {_QUERIES: queries}
        if config.log_temperature is not None:
            state[_TEMPERATURE] = torch.tensor(config.log_temperature)
        return SimpleNamespace(state_dict=lambda: state)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take over queries (and temperature) from another model's state."""
        if _TEMPERATURE in state_dict:
            self._latent.require_log_temperature(float(state_dict[_TEMPERATURE]))
        elif self._latent.log_temperature is not None:
            state_dict = {**state_dict, _TEMPERATURE: self._latent.log_temperature.detach()}
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self._failed_reload = None
        return result
