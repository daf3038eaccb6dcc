"""A frozen multimodal LLM and the latent queries that are appended to whatever it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.chat_template import counts_images, reads_videos
from slq_embed.backbone.families import (
    decoder_of,
    embedding_scale,
    embedding_table,
    family_of,
    is_placed,
    reads_ids,
    tokenizer_of,
)
from slq_embed.backbone.fingerprint import settings_digest, video_digest
from slq_embed.backbone.quantization import is_packed, is_quantized, keep_layout, pass_gradients
from slq_embed.backbone.self_check import Schedule
from slq_embed.backbone.twin import twin_of
from slq_embed.inputs.processing import Media, Options, process_one_by_one, process_together
from slq_embed.inputs.rows import Row, read_row
from slq_embed.modules.deep_queries import add_before_layers
from slq_embed.modules.query_adapter import QueryAdapter, adapt, at_the_end
from slq_embed.prefix.features import Features, make_room, move_padding_left, run_in_passes, select_rows
from slq_embed.prefix.keys import keys_to_tensor, prefix_key
from slq_embed.prefix.passes import Prefix, embed_query_tokens, run_all_positions, run_queries
from slq_embed.prefix.source import PrefixSource


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
        adapter: An adapter that acts at the queries only.
        deep: Whether vectors are added to the queries' states before each layer.
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
        adapter: QueryAdapter | None = None,
        deep: bool = False,
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
        self.processor = processor
        self.tokenizer.padding_side = "left"
        self.query_text = "".join(query_tokens)
        self._query_ids = self.tokenizer.convert_tokens_to_ids(list(query_tokens))
        self.image_kwargs = dict(image_kwargs or {})
        self.source = PrefixSource(backbone, processor, schedule)
        self.schedule = schedule
        # Hosts exempt names with "bias" from weight decay (Trainer.get_decay_parameter_names, model.fit), and
        # decay must touch neither the queries nor a temperature: hence the name of this dict.
        self.bias = nn.ParameterDict({"queries": nn.Parameter(queries.detach().float().clone())})
        self._scale = embedding_scale(backbone)
        self._ids = torch.tensor(self._query_ids) if reads_ids(backbone) else None
        self._runs_whole = adapter is None and not deep and self._ids is None
        packed = any(map(is_packed, backbone.parameters()))
        # What acts at the queries is put on a twin of the decoder, so the backbone is the same at any time, in any thread.
        decoder = decoder_of(backbone) if self._runs_whole and not packed else twin_of(decoder_of(backbone))
        self._query_decoder = (decoder,)
        self.query_adapter = nn.ModuleDict() if adapter is None else adapt(decoder, adapter, seed)
        if deep:
            add_before_layers(decoder, self.bias, len(queries))
        if self._ids is not None:
            embed_query_tokens(decoder, self.bias, self._query_ids, self._scale)
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

    @property
    def log_temperature(self) -> nn.Parameter | None:
        """Logarithm of the learnable temperature, a scalar, if a loss has asked for one."""
        return self.bias["log_temperature"] if "log_temperature" in self.bias else None  # noqa: SIM401 - no .get

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
        if not self.reads_images:
            return ["text", "message"]
        return ["text", "image", *(["video"] if self.reads_videos else []), ("image", "text"), "message"]

    @property
    def reads_images(self) -> bool:
        """Whether the backbone has a processor, not a tokenizer alone."""
        return self.tokenizer is not self.processor

    @property
    def reads_videos(self) -> bool:
        """Whether the backbone's processor and family read videos, and its chat template has a place for them."""
        return reads_videos(self.processor, self.backbone.config)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    @property
    def max_seq_length(self) -> int:
        """No limit in tokens: the chat template caps the text in characters."""
        return int(self.tokenizer.model_max_length)

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
            ValueError: If an input cannot be read; the message gives its index in ``inputs``.
        """
        if not inputs:
            return {}
        given = kwargs.get("processing_kwargs") or {}
        changes = Options({**self.image_kwargs, **given.get("image", {})}, given.get("video", {}))
        rows = self._read(inputs)
        texts = self._render(rows, prompt)
        if not keyed:
            return self._process(rows, texts, range(len(rows)), changes)
        keys = self._keys(rows, texts, changes)
        stored = self.source.stored(keys)
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in stored}
        features: Features = {}
        if first:
            needed = sorted(first.values())
            features = self._process(rows, texts, needed, changes)
            if len(needed) < len(rows):
                again = [needed.index(first[key]) for key in keys if key in first]
                features = select_rows(features, again, self.source.image_token)
        if stored:
            features = make_room(features, [stored.get(key) for key in keys], self.source.pad_token)
        features["prefix_key"] = keys_to_tensor(keys)
        return features

    def prefix_keys(self, inputs: Sequence[Any], prompt: str | None = None) -> list[bytes]:
        """The keys under which the attached store keeps prefixes."""
        rows = self._read(inputs)
        return self._keys(rows, self._render(rows, prompt), Options(self.image_kwargs))

    def _read(self, inputs: Sequence[Any]) -> list[Row]:
        rows = []
        for index, value in enumerate(inputs):
            with _naming(index, len(inputs)):
                rows.append(read_row(value))
                self._require_readable(rows[-1])
        return rows

    def _require_readable(self, row: Row) -> None:
        kind = self.backbone.config.model_type
        if row.media and not self.reads_images:
            raise ValueError(f"There is {'a video' if row.videos else 'an image'}, but a {kind} reads texts only.")
        if row.videos and not self.reads_videos:
            raise ValueError(f"There is a video, but this {kind} reads no videos. Pass some of its frames as images.")
        if row.videos and self.source.store is not None and self.source.store.level == "vision":
            raise ValueError('A store of vision features keeps none of videos. Use PrefixStore(level="keys_values").')
        if len(row.pictures) > 1 and not counts_images(self.processor.chat_template):
            raise ValueError(
                f"There are {len(row.pictures)} images, but this model was saved by a version of slq-embed that reads one image "
                "an input. Build it again with SLQEncoder.from_backbone, and load its queries."
            )

    def _render(self, rows: Sequence[Row], prompt: str | None) -> list[str]:
        # The template appends the query tokens. Stock loading needs them; here they are cut off again, because the
        # queries enter as embeddings.
        try:
            chats = [row.messages(prompt) for row in rows]
            texts: list[str] = self.processor.apply_chat_template(chats, tokenize=False)
        except TemplateError as error:  # what the template refuses
            raise ValueError(str(error)) from error
        return texts

    def _keys(self, rows: Sequence[Row], texts: Sequence[str], options: Options) -> list[bytes]:
        namespace = self.source.namespace
        of_videos = b""
        if namespace:  # else keys only tell the inputs of this call apart
            namespace += settings_digest(self.backbone, self.processor, options.image)
            if any(row.videos for row in rows):
                of_videos = video_digest(self.processor, options.video)
        keys = []
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            with _naming(index, len(rows)):
                space = namespace + of_videos if row.videos else namespace
                keys.append(prefix_key(row, text.removesuffix(self.query_text), space))
        return keys

    def _process(self, rows: Sequence[Row], texts: Sequence[str], indices: Sequence[int], options: Options) -> Features:
        media = []
        for index in indices:
            with _naming(index, len(rows)):
                images = [picture.image for picture in rows[index].pictures]
                videos = [video.sample(self.processor.video_processor, options.video) for video in rows[index].videos]
                media.append(Media(images, videos))
        family = family_of(self.backbone.config)
        read = self.processor, [texts[index] for index in indices], media, options
        if family.batches_images and not any(row.videos for row in media):
            return process_together(*read, len(self.queries))
        return process_one_by_one(*read, self._query_ids, family.pixels_axis)

    def prefix(self, features: Features) -> Prefix | Features:
        """Everything before the queries, without autograd: kept, or computed once for each distinct input.

        Where only all positions at once are exact, the features themselves.
        """
        return features if self.schedule == "all_positions" else self.source.prefix(features, self.training)

    def query_states(self, prefix: Prefix | Features) -> Tensor:
        """States of the queries after a prefix, ``(batch, Q, H)`` in float32 on the queries' device."""
        if isinstance(prefix, Prefix):
            states = run_queries(self.query_decoder, prefix, self.cast_queries(), self.query_ids())
        else:
            states = run_in_passes(self.all_positions, prefix, len(self.queries), self.source.image_token)
        return states.to(self.queries.device, torch.float32)

    def all_positions(self, features: Features) -> Tensor:
        """States of the queries from whole sequences, ``(batch, Q, H)``: the reference for the prefix path."""
        decoder = self.query_decoder
        if self.query_adapter:
            decoder = at_the_end(decoder, len(self.queries))
        return run_all_positions(decoder, features, self.cast_queries(), self.query_ids())

    def query_ids(self) -> Tensor | None:
        """Ids of the query tokens, ``(Q,)``, where the backbone must see them; else None."""
        return None if self._ids is None else self._ids.to(embedding_table(self.backbone).device)

    def cast_queries(self) -> Tensor:
        """The queries as they enter the backbone, ``(Q, H)`` in its dtype."""
        # Master weights stay float32 for the optimizer; only this copy is cast.
        table = embedding_table(self.backbone)
        return (self.queries * self._scale).to(table.device, table.dtype)

    def train(self, mode: bool = True) -> LatentQueryTransformer:
        """Set the mode; leaving training forgets the last step."""
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
        device = fn(torch.empty(0, device=self.queries.device)).device

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        self.bias._apply(move)
        if recurse and not is_placed(self.backbone):
            self.backbone._apply(move if is_quantized(self.backbone) else fn)  # a cast would undo what was packed
            self.query_adapter._apply(move)  # else each part stays beside the layer that it adapts
        return self

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Refuse: a latent query module alone cannot be saved."""
        raise RuntimeError("LatentQueryTransformer is saved by SLQEncoder.save_pretrained, which writes stock modules.")


@contextmanager
def _naming(index: int, total: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Input {index} of {total}: {error}") from error
