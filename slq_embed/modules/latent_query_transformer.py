"""A frozen multimodal LLM and the latent queries that are appended to whatever it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import GradientState
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.families import (
    decoder_of,
    embedding_scale,
    embedding_table,
    is_placed,
    reads_ids,
)
from slq_embed.backbone.quantization import is_packed, is_quantized, keep_layout, pass_gradients
from slq_embed.backbone.report import Schedule
from slq_embed.backbone.twin import twin_of
from slq_embed.inputs.reader import InputReader
from slq_embed.modules.deep_queries import add_before_layers
from slq_embed.modules.latent_query_pooling import only_moved
from slq_embed.modules.query_adapter import QueryAdapter, adapt, at_the_end
from slq_embed.modules.query_embeddings import embed_query_tokens, scaled
from slq_embed.prefix.features import Features, make_room, move_padding_left, select_rows
from slq_embed.prefix.keys import keys_to_tensor, namespace_number
from slq_embed.prefix.passes import Prefix, run_all_positions, run_queries
from slq_embed.prefix.source import PrefixSource
from slq_embed.prefix.vision_check import vision_refusal
from slq_embed.store.prefix_store import Level


class LatentQueryTransformer(InputModule):
    """Reads texts, images and videos, and returns the backbone's states at the query positions.

    The backbone is shared, not owned: it is no submodule, so optimizers, DDP and state dicts see the latent
    queries alone. It is frozen here, stays in ``eval()`` and is moved with the module.

    The input (the prefix) runs once without autograd, or comes from what :attr:`source` has kept. Only the queries
    are differentiated.

    Args:
        backbone: A multimodal LLM.
        processor: Its processor, whose chat template ends with the query tokens and whose tokenizer pads left.
        queries: The latent queries, ``(Q, H)``; kept in float32 and cast where they are used.
        query_tokens: The query tokens as the chat template spells them, ``Q`` strings.
        image_kwargs: How the image processor is called.
        query_adapter: An adapter that acts at the queries only.
        deep_queries: Whether vectors are added to the queries' states before each layer.
        seed: Seed of the adapter's initialisation.
        schedule: How input and queries run.

    Raises:
        ValueError: If the queries' width is not that of the backbone's token embeddings, or the adapter does not fit.

    Source:
        Shared latent queries, arXiv:2604.13710.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        processor: ProcessorMixin,
        queries: Tensor,
        query_tokens: Sequence[str],
        image_kwargs: Mapping[str, Any] | None = None,
        query_adapter: QueryAdapter | None = None,
        deep_queries: bool = False,
        seed: int | None = None,
        schedule: Schedule = "prefix",
    ) -> None:
        super().__init__()
        width = embedding_table(backbone).shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(
                f"The latent queries have shape {tuple(queries.shape)}, but (number of queries, {width}) is needed "
                "for this backbone. Load them with the backbone they were trained on."
            )
        keep_layout(backbone)
        self._backbone = (backbone.eval().requires_grad_(False),)  # a tuple hides it from nn.Module
        self.reader = InputReader(backbone, processor, query_tokens, image_kwargs or {})
        self.tokenizer.padding_side = "left"
        self.source = PrefixSource(backbone, processor)
        self.schedule = schedule
        # Hosts exempt names with "bias" from weight decay (Trainer.get_decay_parameter_names, model.fit), and
        # decay must touch neither the queries nor a temperature: hence the name of this dict.
        self.bias = nn.ParameterDict({"queries": nn.Parameter(queries.detach().float().clone())})
        self._scaling = (embedding_scale(backbone),)  # a norm of the backbone is no submodule either
        self._ids = torch.tensor(self.reader.query_ids) if reads_ids(backbone) else None
        self._runs_whole = query_adapter is None and not deep_queries and self._ids is None
        packed = any(map(is_packed, backbone.parameters()))
        # The backbone is the same at any time, in any thread: hooks of what acts at the queries go on a twin of its decoder,
        # and so does the backward pass through packed weights. Queries alone need neither, and run through the decoder itself.
        decoder = decoder_of(backbone) if self._runs_whole and not packed else twin_of(decoder_of(backbone))
        self._query_decoder = (decoder,)
        self.query_adapter = nn.ModuleDict() if query_adapter is None else adapt(decoder, query_adapter, seed)
        if deep_queries:
            add_before_layers(decoder, self.bias, len(queries))
        if self._ids is not None:
            embed_query_tokens(decoder, self.bias, self.reader.query_ids, self._scaling[0])
        if packed:
            pass_gradients(decoder)

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen multimodal LLM, ready to generate as well."""
        return self._backbone[0]

    @property
    def queries(self) -> nn.Parameter:
        """The latent queries, ``(Q, H)`` in float32."""
        return self.bias["queries"]

    @property
    def query_decoder(self) -> PreTrainedModel:
        """What the queries run through: the backbone without its head, or a twin of it with what acts at the queries."""
        return self._query_decoder[0]

    @cached_property
    def vision_refusal(self) -> str | None:
        """Why no store can keep features of the vision tower, or None; see :mod:`slq_embed.prefix.vision_check`."""
        return vision_refusal(self)

    def store_refusal(self, level: Level) -> str | None:
        """Why no store of a level can serve this backbone, and what to do; None if one can."""
        kind = self.backbone.config.model_type
        if self.schedule == "all_positions":
            return f"A {kind} has no prefixes: its inputs run together with the queries. Train without a store."
        if level == "vision" and self.vision_refusal is not None:
            return (
                f"The features of the vision tower of this {kind} cannot be kept: {self.vision_refusal}. Use "
                'PrefixStore(level="keys_values"), or no store where its layers differ in shape.'
            )
        devices = {str(weight.device) for weight in self.backbone.parameters()}
        if level == "keys_values" and len(devices) > 1:
            return (
                f"The backbone is on several devices ({', '.join(sorted(devices))}), but a store of keys and values "
                'gives them back on one device. Use PrefixStore(level="vision"), or load the backbone on one device.'
            )
        return None

    @property
    def log_temperature(self) -> nn.Parameter | None:
        """Logarithm of the learnable temperature, a scalar, if a loss has asked for one."""
        return self.bias.get("log_temperature")

    def require_log_temperature(self, initial: float) -> nn.Parameter:
        """The logarithm of a learnable temperature, created with an initial value where there is none.

        It lives beside the queries so that checkpoints carry it and DDP keeps it equal in all processes.
        """
        if "log_temperature" not in self.bias:
            self.bias["log_temperature"] = nn.Parameter(torch.tensor(float(initial), device=self.queries.device))
        return self.bias["log_temperature"]

    @property
    def modalities(self) -> list[Any]:
        """What can be encoded."""
        if not self.reader.reads_images:
            return ["text", "message"]
        return ["text", "image", *(["video"] if self.reader.reads_videos else []), ("image", "text"), "message"]

    @property
    def processor(self) -> ProcessorMixin:
        """The processor, whose chat template ends with the query tokens."""
        return self.reader.processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.reader.tokenizer

    @property
    def max_seq_length(self) -> int:
        """No limit in tokens: the chat template caps the text in characters."""
        return int(self.tokenizer.model_max_length)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        raise AttributeError(
            "max_seq_length cannot be set: texts are cut by characters, because a cut by tokens would take the latent queries "
            "with it. Use SLQEncoder.from_backbone(..., max_text_chars=...)."
        )

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, *, keyed: bool = True, **kwargs: Any
    ) -> Features:
        """Turn inputs into features.

        An input that comes several times is processed once. An input whose prefix is kept is not processed at all.

        Args:
            inputs: Texts, images, videos; see :func:`slq_embed.inputs.rows.read_row`.
            prompt: A system message.
            keyed: Whether to give each input its key, so that equal ones share a prefix.
            **kwargs: ``processing_kwargs={"image": {...}, "video": {...}}`` for the image and the video processor; the
                rest is ignored.

        Returns:
            Features without the queries; with ``prefix_key`` if ``keyed``. See :mod:`slq_embed.prefix.features`.

        Raises:
            ValueError: If an input cannot be read; the message gives its index in ``inputs``. Or if a trainer would cut the
                images of a stream by rows.
        """
        if not inputs:
            return {}
        reader, options = self.reader, self.reader.options(kwargs.get("processing_kwargs"))
        rows = reader.read(inputs)
        texts = reader.render(rows, prompt)
        if not keyed:
            return reader.process(rows, texts, range(len(rows)), options)
        # First: what is kept already, and where each other input comes first.
        self.source.require_storable(rows)
        keys = reader.keys(rows, texts, options, self.source.namespace)
        stored = self.source.stored(keys)
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in stored}
        # Second: process those inputs, each once, and repeat the rows of those that come again.
        features: Features = {}
        if first:
            needed = sorted(first.values())
            features = reader.process(rows, texts, needed, options)
            if len(needed) < len(rows):
                again = [needed.index(first[key]) for key in keys if key in first]
                features = select_rows(features, again)
        # Third: rows for what is kept, of which nothing but the length is needed, and the keys of all.
        if stored:
            features = make_room(features, [stored.get(key) for key in keys], self.source.pad_token)
        features["prefix_key"] = keys_to_tensor(keys)
        features["prefix_namespace"] = torch.full((len(keys),), namespace_number(self.source.namespace))
        if self.training:
            _require_whole_batches(features)
        return features

    def prefix_keys(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        processing_kwargs: Mapping[str, Any] | None = None,
    ) -> list[bytes]:
        """The keys under which the attached store keeps prefixes; arguments as for :meth:`preprocess`."""
        rows, options = self.reader.read(inputs), self.reader.options(processing_kwargs)
        return self.reader.keys(rows, self.reader.render(rows, prompt), options, self.source.namespace)

    def prefix(self, features: Features) -> Prefix | Features:
        """Everything before the queries, without autograd: kept, or computed once for each distinct input.

        Where only all positions at once are exact, the features themselves, which then stand in for a prefix.
        """
        return features if self.schedule == "all_positions" else self.source.prefix(features)

    def query_states(self, prefix: Prefix | Features) -> Tensor:
        """States of the queries after a prefix, ``(batch, Q, H)`` in float32 on the queries' device.

        Features in place of a prefix run together with the queries, as whole sequences.
        """
        if isinstance(prefix, Prefix):
            states = run_queries(self.query_decoder, prefix, self.query_inputs())
        else:
            rows = {index: index for index in range(len(prefix["input_ids"]))}
            found = self.source.in_passes(prefix, rows, lambda decoder, part: self.all_positions(part))
            states = torch.stack([found[index] for index in rows])
        return states.to(self.queries.device, torch.float32)

    def all_positions(self, features: Features) -> Tensor:
        """States of the queries from whole sequences, ``(batch, Q, H)``: the reference for the prefix path."""
        decoder = self.query_decoder
        if self.query_adapter:
            decoder = at_the_end(decoder, len(self.queries))
        return run_all_positions(decoder, features, self.query_inputs())

    def query_inputs(self) -> Tensor:
        """The queries as they enter the backbone: ``(Q, H)`` in its dtype. Where it must see token ids, their ids, ``(Q,)``."""
        table = embedding_table(self.backbone)
        if self._ids is not None:
            return self._ids.to(table.device)
        # Master weights stay float32 for the optimizer; only this copy is cast.
        return scaled(self.queries.to(table.device, table.dtype), self._scaling[0])

    def train(self, mode: bool = True) -> LatentQueryTransformer:
        """Set the mode. In training, a pass without gradients keeps its prefixes for the next one; leaving it forgets them."""
        self.source.memory.open = mode
        if not mode:
            self.source.memory.clear()
        super().train(mode)
        return self

    def forward(self, features: Features, **kwargs: Any) -> Features:
        """Add ``token_embeddings``, the states of the queries, ``(batch, Q, H)`` in float32."""
        features.update(move_padding_left(features))
        keeps = torch.is_grad_enabled() or self.training or self.source.store is not None
        # Where there is nothing to keep and nothing is added, whole sequences are a little faster for short texts.
        whole = not keeps and self._runs_whole
        states = self.query_states(features if whole else self.prefix(features))
        if self.log_temperature is not None and torch.is_grad_enabled():
            # As an output of the forward pass, so that DDP knows it is used.
            features["log_temperature"] = self.log_temperature.clone()
        features["token_embeddings"] = states
        return features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over a temperature, or keep this module's own where the state has none."""
        name = f"{prefix}bias.log_temperature"
        if name in state_dict:
            self.require_log_temperature(float(state_dict[name]))
        elif self.log_temperature is not None:
            state_dict[name] = self.log_temperature.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentQueryTransformer:
        """Move or cast the shared backbone; what is trained only moves, since the master copy is float32."""
        move = only_moved(fn)
        self.bias._apply(move)
        if recurse and not is_placed(self.backbone):
            if not is_quantized(self.backbone):
                self.backbone._apply(fn)
            elif self.backbone.device != self.queries.device:  # a cast would undo what was packed
                self.backbone._apply(move)
            self.query_adapter._apply(move)  # else each part stays beside the layer that it adapts
        return self

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Refuse: a latent query module alone cannot be saved."""
        raise RuntimeError("LatentQueryTransformer is saved by SLQEncoder.save_pretrained, which writes stock modules.")


def _require_whole_batches(features: Features) -> None:
    """Raise a ValueError if a trainer would cut these features by rows."""
    if "media" in features and isinstance(GradientState().active_dataloader, DataLoaderDispatcher):
        raise ValueError(
            "A trainer joins and cuts the batches of a stream in one process, which images cannot be. Let each process make its own: "
            'pass accelerator_config={"dispatch_batches": False} in the training arguments.'
        )
