"""From inputs to features: the chat that each input becomes, the key that names it, and the processor's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.chat_template import reads_videos
from slq_embed.backbone.families import family_of, image_token_of, longest_sequence, tokenizer_of
from slq_embed.backbone.fingerprint import settings_digest, video_digest
from slq_embed.inputs.processing import Media, Options, process_one_by_one, process_together, tokens_of
from slq_embed.inputs.rows import Row, read_row
from slq_embed.prefix.features import Features
from slq_embed.prefix.keys import prefix_key


class InputReader:
    """Reads inputs as a backbone takes them.

    Args:
        backbone: The multimodal LLM.
        processor: Its processor, whose chat template ends with the query tokens.
        query_tokens: The query tokens as the chat template spells them, ``Q`` strings.
        image_kwargs: How the image processor is called.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        processor: ProcessorMixin,
        query_tokens: Sequence[str],
        image_kwargs: Mapping[str, Any],
    ) -> None:
        self._backbone = backbone
        self.processor = processor
        for name, value in family_of(backbone.config).call_kwargs.get("text", {}).items():
            setattr(processor, name, value)
        self.image_kwargs = dict(image_kwargs)
        self.query_ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(query_tokens))
        self._query_text = "".join(query_tokens)
        self._image_token = image_token_of(backbone, processor)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)

    @property
    def reads_images(self) -> bool:
        """Whether the backbone has a processor, not a tokenizer alone."""
        return self.tokenizer is not self.processor

    @property
    def reads_videos(self) -> bool:
        """Whether the processor and the family read videos, and the chat template has a place for them."""
        return reads_videos(self.processor, self._backbone.config)

    @property
    def ends_with_queries(self) -> bool:
        """Whether the query tokens are the last that the processor gives; Chameleon's adds one that ends the turn."""
        (text,) = self.render([Row("a")], None)
        return tokens_of(self.processor, text)[-len(self.query_ids) :] == self.query_ids

    def options(self, processing_kwargs: Mapping[str, Any] | None = None) -> Options:
        """How images and videos are processed.

        Args:
            processing_kwargs: ``{"image": {...}, "video": {...}}`` for the image and the video processor.
        """
        given = processing_kwargs or {}
        return Options({**self.image_kwargs, **given.get("image", {})}, given.get("video", {}))

    def read(self, inputs: Sequence[Any]) -> list[Row]:
        """The inputs as rows.

        Raises:
            ValueError: If an input cannot be read; the message gives its index.
        """
        rows = []
        for index, value in enumerate(inputs):
            with _naming(index, len(inputs)):
                rows.append(read_row(value))
                self.require_readable(rows[-1])
        return rows

    def require_readable(self, row: Row) -> None:
        """Raise a ValueError if the backbone cannot read such an input."""
        kind = self._backbone.config.model_type
        if row.media and not self.reads_images:
            raise ValueError(f"There is {'a video' if row.videos else 'an image'}, but a {kind} reads texts only.")
        if row.videos and not self.reads_videos:
            raise ValueError(f"There is a video, but this {kind} reads no videos. Pass some of its frames as images.")

    def render(self, rows: Sequence[Row], prompt: str | None) -> list[str]:
        """The chat of each row, with the query tokens at its end.

        Raises:
            ValueError: If the template refuses a row.
        """
        try:
            chats = [row.messages(prompt) for row in rows]
            texts: list[str] = self.processor.apply_chat_template(chats, tokenize=False)
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return texts

    def keys(self, rows: Sequence[Row], texts: Sequence[str], options: Options, namespace: bytes) -> list[bytes]:
        """The keys of the rows' prefixes.

        Args:
            rows: From :meth:`read`.
            texts: From :meth:`render`.
            options: From :meth:`options`.
            namespace: What names the weights, the tokenizer and a store; empty without a store.

        Raises:
            ValueError: If an image or a video cannot be read; the message gives the index of the input.
        """
        namespace += settings_digest(self._backbone, self.processor, options.image)
        of_videos = video_digest(self.processor, options.video) if any(row.videos for row in rows) else b""
        keys = []
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            with _naming(index, len(rows)):
                space = namespace + of_videos if row.videos else namespace
                keys.append(prefix_key(row, text.removesuffix(self._query_text), space))
        return keys

    def process(self, rows: Sequence[Row], texts: Sequence[str], indices: Sequence[int], options: Options) -> Features:
        """Features of some rows, without the queries, which enter as embeddings.

        Args:
            rows: From :meth:`read`.
            texts: From :meth:`render`.
            indices: Of the rows.
            options: From :meth:`options`.

        Raises:
            ValueError: If an image or a video cannot be decoded, or an input is too long; the message gives its index.
        """
        media = []
        for index in indices:
            with _naming(index, len(rows)):
                images = [picture.image for picture in rows[index].pictures]
                videos = [video.sample(self.processor.video_processor, options.video) for video in rows[index].videos]
                media.append(Media(images, videos))
        family = family_of(self._backbone.config)
        arguments = self.processor, [texts[index] for index in indices], media, options
        if family.batches_images and not any(row.videos for row in media):
            features = process_together(*arguments, len(self.query_ids), self._image_token)
        else:
            features = process_one_by_one(*arguments, self.query_ids, family.pixels_axis)
        for index, length in zip(indices, features["attention_mask"].sum(dim=1).tolist(), strict=True):
            with _naming(index, len(rows)):
                self._require_length(length)
        return features

    def _require_length(self, length: int) -> None:
        config, count = self._backbone.config, len(self.query_ids)
        if (longest := longest_sequence(config)) is not None and length + count > longest:
            raise ValueError(
                f"It has {length} tokens, but at most {longest - count} beside the queries are possible: where a sequence is longer than "
                f"{longest}, this {config.model_type} computes its whole batch otherwise. Cut the text (max_text_chars=...), or pass "
                "fewer or smaller images."
            )


@contextmanager
def _naming(index: int, total: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Input {index} of {total}: {error}") from error
