"""SLQEncoder: a Sentence Transformer made of a frozen multimodal LLM and a few latent queries."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

from sentence_transformers import SentenceTransformer
from sentence_transformers.util.decorators import deprecated_kwargs
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from slq_embed.backbone.families import is_placed
from slq_embed.backbone.fingerprint import Fingerprint, fingerprint
from slq_embed.backbone.query_tokens import Form
from slq_embed.encoding.protocol import resolve_prompt
from slq_embed.encoding.query_sets import encode_query_sets
from slq_embed.encoding.stream import EncodedBatch, collect, stream
from slq_embed.encoding.to_file import EncodedFile, encode_to_file
from slq_embed.inputs.rows import read_row, require_list
from slq_embed.modules.initialisation import Initialisation
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.modules.latent_query_transformer import LatentQueryTransformer
from slq_embed.modules.query_adapter import QueryAdapter
from slq_embed.saving.assembly import (
    QuerySettings,
    build_modules,
    modules_of,
    rebuild_modules,
    require_form,
    require_text_limit,
)
from slq_embed.saving.checkpoints import CheckpointState, failed_reload
from slq_embed.saving.config import SLQConfig
from slq_embed.saving.folder import save_model
from slq_embed.saving.loading import MODEL_ARGUMENTS, load_or_share, load_saved
from slq_embed.saving.model_card import SLQModelCardData
from slq_embed.store.prefix_store import PrefixStore

BackboneLike: TypeAlias = str | Path | PreTrainedModel
"""A hub name, a folder, or a loaded model."""
_COPIED = ("default_prompt_name", "similarity_fn_name", "truncate_dim")
_STREAMED = {"prompt", "batch_size", "show_progress_bar", "normalize_embeddings", "truncate_dim"}
_STREAMED |= {"output_value", "save_to_cpu", "device", "processing_kwargs", "task"}
"""Settings of the host's ``_inference`` that the stream understands."""


class SLQEncoder(SentenceTransformer):
    """A Sentence Transformer whose trained weights are latent queries, and on demand a head or an adapter.

    Everything of :class:`~sentence_transformers.SentenceTransformer` works: ``encode``, ``encode_query``,
    ``similarity``, the trainer, evaluators, the hub. What this class adds: building from a backbone
    (:meth:`from_backbone`), the fast training path, and saving as a folder of stock modules.

    Args:
        model_name_or_path: A saved SLQ model: a folder or a hub name.
        backbone: The same backbone as the recorded one, where that is loaded already (it is shared) or has moved.
        **kwargs: As for ``SentenceTransformer``; ``model_kwargs`` go to the backbone.

    Raises:
        TypeError: If there is no such argument.
        ValueError: If the folder is no SLQ model, or the backbone is another than the recorded one.
        OSError: If there is no such folder or model on the hub, or the recorded backbone is not where it was.
    """

    model_card_data_class = SLQModelCardData
    default_huggingface_organization = None  # the host's would be put before a folder's name that is not there
    slq_config: SLQConfig  # what saving records
    num_workers: int | None = None
    """Processes that decode and preprocess while the model runs; by default up to 8 beside a GPU, 0 beside a CPU. A process of a
    pool starts none."""
    config: PretrainedConfig | None = None  # a copy of the backbone's: the trainer writes into it
    failed_checkpoint: str | None = None  # one that the trainer was to reload and has not reloaded

    def __init__(
        self, model_name_or_path: str | Path | None = None, *, backbone: BackboneLike | None = None, **kwargs: Any
    ) -> None:
        if not model_name_or_path and not kwargs.get("modules"):
            raise ValueError(
                "SLQEncoder came without a model. Give the folder or hub name of a saved SLQ model, or put latent queries on a "
                "backbone with SLQEncoder.from_backbone."
            )
        _require_supported(kwargs)
        if given := next((name for name in MODEL_ARGUMENTS if name in kwargs), None):
            raise TypeError(
                f"{given} goes into model_kwargs where a saved model is loaded, as in SentenceTransformer: SLQEncoder(folder, "
                f"model_kwargs={{{given!r}: ...}})."
            )
        self._replacement = (backbone,)  # a tuple, because nn.Module is not ready yet
        if isinstance(backbone, PreTrainedModel):
            kwargs.setdefault("device", str(backbone.device))
        super().__init__(None if model_name_or_path is None else str(model_name_or_path), **kwargs)
        self.config = copy.deepcopy(self.backbone.config)

    @classmethod
    def from_backbone(
        cls,
        backbone: BackboneLike,
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
        projection: int | bool | None = None,
        query_adapter: QueryAdapter | bool | None = None,
        deep_queries: bool | None = None,
        **kwargs: Any,
    ) -> SLQEncoder:
        """Put fresh latent queries on a frozen multimodal LLM.

        Args:
            backbone: Hub name, folder, or an already loaded model, which is shared, frozen and not copied.
            processor: Of an already loaded model; copied where it must differ (tokenizer, chat template).
            num_queries: How many latent queries, ``Q``.
            init: ``"normal"`` (standard deviation ``H ** -0.5``), ``"zeros"``, ``"tokens"`` (the mean token embedding
                plus noise at the table's own scale), or a ``(Q, H)`` tensor.
            seed: Seed of the initialisation; without one, torch's generator is used.
            pooling: ``"mean"`` over the queries, a mean with learned weights (``"weighted"``), or the ``"last"`` query.
            form: How to save. ``"adapter"``: the queries beside the backbone's name; needs rows of the embedding
                table that no text uses. ``"merged"``: the whole model.
            instructions: Text of the user turn for ``"text"``, ``"image"`` and ``"composed"`` inputs; see
                :data:`slq_embed.backbone.DEFAULT_INSTRUCTIONS`.
            max_text_chars: Longest text that is read, in characters.
            max_pixels: Largest image, in pixels, for families that keep the aspect ratio.
            image_kwargs: How to call the image processor, on top of the family's defaults.
            projection: Width of a linear head after the pooling, or True for the backbone's width.
            query_adapter: A LoRA that acts at the queries only, or True for the default one.
            deep_queries: Whether to add vectors to the queries' states before each layer.
            **kwargs: As for ``SentenceTransformer``: ``device``, ``revision``, ``token``, ``cache_folder``,
                ``local_files_only``, ``trust_remote_code``, ``model_kwargs``, ``processor_kwargs``, ``prompts``, ...
                And what transformers takes for the backbone: ``dtype``, ``attn_implementation``, ``device_map``,
                ``quantization_config``. ``backbone_name``: what to record in place of the name that it has.

        Raises:
            ValueError: If the backbone is unsupported, has too few free rows for the adapter form, or an argument
                does not fit.
            OSError: If nothing can be loaded from there.
        """
        require_form(form)
        require_text_limit(max_text_chars)
        _require_supported(kwargs)
        loaded = load_or_share(backbone, processor, kwargs)
        query_settings = QuerySettings(num_queries, init, seed, pooling, projection, query_adapter, deep_queries)
        modules, slq_config = build_modules(
            loaded, query_settings, form, instructions, max_text_chars, max_pixels, image_kwargs
        )
        model = cls(modules=modules, device=None if loaded.device is None else str(loaded.device), **kwargs)
        model.slq_config = slq_config
        return model

    def with_queries(
        self,
        num_queries: int | None = None,
        *,
        init: Initialisation | Tensor = "normal",
        seed: int | None = None,
        pooling: PoolingMode | None = None,
        projection: int | bool | None = None,
        query_adapter: QueryAdapter | bool | None = None,
        deep_queries: bool | None = None,
    ) -> SLQEncoder:
        """Fresh queries, a fresh head and adapter as this encoder has them; arguments as for :meth:`from_backbone`."""
        num_queries = len(self.queries) if num_queries is None else num_queries
        query_settings = QuerySettings(num_queries, init, seed, pooling, projection, query_adapter, deep_queries)
        modules, slq_config = rebuild_modules(self.slq_config, self.transformer, query_settings)
        settings = {name: getattr(self, name) for name in _COPIED} | {"prompts": dict(self.prompts)}
        model = type(self)(modules=modules, device=str(self.device), **settings)
        model.slq_config, model.num_workers = slq_config, self.num_workers
        return model

    @property
    def transformer(self) -> LatentQueryTransformer:
        """The first module: the backbone with its queries."""
        return cast(LatentQueryTransformer, self[0])

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen multimodal LLM: the same object that was passed in, ready to generate."""
        return self.transformer.backbone

    transformers_model = backbone  # the host looks for it among the submodules, and the backbone is none

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where the layers are, if on several GPUs: trainers then do not copy the model to each GPU. Else there is no such attribute."""
        devices: dict[str, Any] = self.backbone.hf_device_map
        if len({*devices.values()} - {"cpu", "disk"}) < 2:
            raise AttributeError("The layers are not on several GPUs.")
        return devices

    @property
    def queries(self) -> nn.Parameter:
        """The latent queries, ``(Q, H)`` in float32."""
        return self.transformer.queries

    @property
    def temperature(self) -> float | None:
        """The learned temperature, where a loss of this package trained one."""
        learned = self.transformer.log_temperature
        logarithm = self.slq_config.log_temperature if learned is None else float(learned.detach())
        return None if logarithm is None else math.exp(logarithm)

    @cached_property
    def backbone_fingerprint(self) -> Fingerprint:
        """The fingerprint that saving records; taken once, since the backbone is frozen."""
        return fingerprint(self.backbone)

    @property
    def prefix_store(self) -> PrefixStore | None:
        """What keeps prefixes; set it to attach or detach one.

        Attaching reads all weights: about a second for each GB. At ``level="vision"``, a family that no table knows is checked on three images, once.
        """
        return self.transformer.source.store

    @prefix_store.setter
    def prefix_store(self, store: PrefixStore | None) -> None:
        if not isinstance(store, PrefixStore | None):
            raise ValueError(f"prefix_store is {store!r:.100}, but a PrefixStore(...) or None is needed.")
        if store is not None and (reason := self.transformer.store_refusal(store.level)) is not None:
            raise ValueError(reason)
        self.transformer.source.attach(store)

    def forget(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        prompt_name: str | None = None,
        processing_kwargs: Mapping[str, Any] | None = None,
    ) -> int:
        """Remove the prefixes of inputs from the attached store for good; returns how many were there.

        Args:
            inputs: In the form in which they were encoded: an image file and its decoded picture have different keys.
            prompt: Their prompt, as for ``encode``.
            prompt_name: Its name.
            processing_kwargs: As they were encoded with.

        Raises:
            ValueError: If no store is attached, or one input came in place of a list.
        """
        require_list(inputs)
        if self.prefix_store is None:
            raise ValueError("There is nothing to forget: no prefix store is attached (model.prefix_store is None).")
        keys = self.transformer.prefix_keys(inputs, resolve_prompt(self, prompt, prompt_name), processing_kwargs)
        return self.prefix_store.forget(keys)

    def _replicate_for_data_parallel(self) -> NoReturn:
        # nn.DataParallel would split the batch by rows, and pixels lie by patch; all copies would share one backbone.
        raise RuntimeError(
            "An SLQEncoder was wrapped in nn.DataParallel, which Trainers do where one process sees several GPUs. That is not "
            "supported: start one process for each GPU (torchrun --nproc-per-node N ...), or choose one with CUDA_VISIBLE_DEVICES."
        )

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn inputs into features. The host's version would open texts as files, and lose prompts."""
        return self.transformer.preprocess(inputs, prompt=prompt, **kwargs)

    @deprecated_kwargs(sentences="inputs")  # type: ignore[untyped-decorator] # as of the host
    def encode(self, inputs: Any, *args: Any, query_sets: Mapping[str, SLQEncoder] | None = None, **kwargs: Any) -> Any:
        """Encode texts, images, or both; as :meth:`SentenceTransformer.encode`, with one addition.

        Args:
            inputs: See :func:`slq_embed.inputs.rows.read_row`.
            *args: As for ``SentenceTransformer.encode``.
            query_sets: Encoders on the same backbone, by name: each input runs once, and each of them embeds it. The
                result is a dict. Other arguments: see :func:`slq_embed.encoding.query_sets.encode_query_sets`.
            **kwargs: As for ``SentenceTransformer.encode``.

        Raises:
            ValueError: If an input cannot be read or sent to a pool, or a query set does not fit.
        """
        self.require_loaded()
        if singular := self.is_singular_input(inputs):
            read_row(inputs)
        elif kwargs.get("pool") is not None or isinstance(kwargs.get("device"), list):
            _require_sendable(inputs)
        if query_sets is None:
            return super().encode(inputs, *args, **kwargs)
        rows = [inputs] if singular else list(inputs)
        results = encode_query_sets(self, rows, query_sets, *args, **kwargs)
        return {name: found[0] for name, found in results.items()} if singular else results

    def _inference(self, inputs: list[Any], **settings: Any) -> Any:
        # What encode does in one process. Hosts before 6.2 have a loop of their own in its place.
        if settings["output_value"] != "sentence_embedding" or set(settings) - _STREAMED:
            return super()._inference(inputs, **settings)
        del settings["output_value"]
        to_cpu, device = settings.pop("save_to_cpu"), settings.pop("device", None)
        if device is not None and not is_placed(self.backbone):
            self.to(device)
        return collect(stream(self, enumerate(inputs), strict=True, total=len(inputs), **settings), len(inputs), to_cpu)

    def encode_stream(self, inputs: Iterable[Any], **options: Any) -> Iterator[EncodedBatch]:
        """Encode any number of inputs; yield batches as they come. What cannot be read is skipped and listed.

        Inputs are read up to 32 batches ahead. The options are those of :func:`slq_embed.encoding.stream.stream`. A ValueError says if
        one input came in place of a list.
        """
        require_list(inputs)
        return stream(self, enumerate(inputs), **options)

    def encode_to_file(self, inputs: Sequence[Any], path: str | Path, **options: Any) -> EncodedFile:
        """Encode into a memory-mapped ``.npy`` file; a run that was killed goes on where it was.

        The options are those of :func:`slq_embed.encoding.to_file.encode_to_file`.
        """
        return encode_to_file(self, inputs, Path(path).absolute(), **options)

    def require_loaded(self) -> None:
        """Raise an error if the trainer was to reload a checkpoint and has not reloaded it."""
        if self.failed_checkpoint is not None:
            raise failed_reload(self.failed_checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As every module's; the state of a trainer's checkpoint is refused, with a ValueError, if it is of another model."""
        if isinstance(state_dict, CheckpointState):
            state_dict.require_same(self)
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.failed_checkpoint = None
        return result

    def save_pretrained(self, path: str | Path, *args: Any, form: Form | None = None, **kwargs: Any) -> None:
        """Save as a folder that plain ``SentenceTransformer(path)`` loads.

        ``form`` is ``"adapter"`` or ``"merged"``; by default the one that :meth:`from_backbone` got. The other
        arguments are those of the host. A ValueError says if there is no such form, or it does not fit the backbone.
        """
        # The host calls save() with arguments of its own only, so the form goes through the record that save() reads.
        before, self.slq_config.form = self.slq_config.form, self.slq_config.form if form is None else form
        try:
            super().save_pretrained(str(path), *args, **kwargs)
        finally:
            self.slq_config.form = before

    def save(self, path: str, model_name: str | None = None, create_model_card: bool = True, **kwargs: Any) -> None:
        """Save in the form that :attr:`slq_config` names; see :meth:`save_pretrained`."""
        self.require_loaded()
        require_form(self.slq_config.form)
        save_model(self, Path(path), self._get_model_config())
        if create_model_card:
            self._create_model_card(path, model_name, kwargs.get("train_datasets"))

    def _load_modules(self, model_name_or_path: str, *args: Any, **arguments: Any) -> Any:
        saved = load_saved(model_name_or_path, self._replacement[0], arguments)
        self.slq_config, self._model_card_text = saved.slq_config, saved.model_card
        if saved.slq_config.form == "adapter" and saved.slq_config.fingerprint is not None:
            self.backbone_fingerprint = saved.slq_config.fingerprint  # compared already; also of another precision
        self._parse_model_config(saved.host_config)
        return OrderedDict((str(number), module) for number, module in enumerate(modules_of(saved))), OrderedDict()

    @classmethod
    def _load_with_module_classes(cls, model_name_or_path: str, module_classes: Any, **kwargs: Any) -> Any:
        return CheckpointState(model_name_or_path)


def _require_sendable(inputs: Any) -> None:
    """Refuse inputs that no queue can send: the host's pool would wait for them for ever."""
    for number, value in enumerate(inputs if isinstance(inputs, list | tuple) else ()):
        try:
            pickle.dumps(value)
        except Exception as error:
            raise ValueError(
                f"Input {number} cannot be sent to the processes of a pool ({type(error).__name__}: {error}). Pass a PIL image "
                "that can be decoded, or the path or the bytes of the file."
            ) from error


def _require_supported(arguments: Mapping[str, Any]) -> None:
    if (backend := arguments.get("backend", "torch")) != "torch":
        raise ValueError(f"backend is {backend!r}, but an SLQEncoder computes in torch only. Leave backend out.")
    if config_kwargs := arguments.get("config_kwargs"):
        raise ValueError(
            f"config_kwargs is {config_kwargs}, but an SLQEncoder does not take it. Load the backbone with its changed configuration "
            "by transformers, and pass the loaded model as backbone."
        )
