"""SLQEmbeddings: LangChain's embeddings interface over an SLQ model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SecretStr,
    field_serializer,
)
from slq_embed import SLQEncoder
from slq_embed.encoding import encoder_digest
from slq_embed.remote import RemoteEncoder
from slq_embed.serving import embed, embed_images, shared_encoder

Result = TypeVar("Result")

_IN_MEMORY = "<SLQEncoder in memory"


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    # Not asyncio's own executor: calls that wait for the model would hold up everything else that uses it, such as
    # name look-ups. One of these threads computes; the others open files or fetch. A forked process has none of them.
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="langchain-slq")


class SLQEmbeddings(BaseModel, Embeddings):
    """Embeddings of texts, images, and images with texts, in one space, from an SLQ model.

    Objects for the same folder or hub name and the same ``device``, ``truncate_dim`` and ``model_kwargs`` share one
    model in memory, with each other and with every other caller of :func:`slq_embed.serving.shared_encoder`. All
    methods may be called from any thread.

    With ``base_url``, the model is behind a server, and nothing is loaded here.

    Raises:
        ValueError: If the folder is no SLQ model, or if a loaded model or a server comes with arguments for loading.
        OSError: If nothing can be loaded from there, or no server answers.

    Example:
        >>> from slq_embed import pretrained
        >>> embeddings = SLQEmbeddings(model=pretrained("slq-tiny"))
        >>> len(embeddings.embed_query("a red circle"))
        192
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", populate_by_name=True, protected_namespaces=()
    )

    model: str | Path | SLQEncoder | None = Field(
        default=None, validation_alias=AliasChoices("model", "model_name"), frozen=True
    )
    """A folder, a hub name, or a loaded model; the server's name for it, with ``base_url``. ``model_name`` is another name."""
    base_url: str | None = Field(default=None, frozen=True)
    """Address of a server that holds the model, such as vLLM's, in place of a model here."""
    api_key: SecretStr | None = Field(default=None, repr=False, exclude=True, frozen=True)
    """The server's key; by default the environment variable ``SLQ_API_KEY``."""
    timeout_s: PositiveFloat = Field(default=RemoteEncoder.timeout_s, frozen=True)
    """Longest time to wait for the server's answer to a request, in seconds."""
    device: str | None = Field(default=None, frozen=True)
    """Such as ``"cuda:1"``; by default the first accelerator, else the CPU."""
    batch_size: PositiveInt = 32
    """Inputs a batch; halved as long as a batch does not fit into memory."""
    query_prompt: str | None = None
    """A system message for queries; by default the prompt that the model was saved with as ``"query"``."""
    document_prompt: str | None = None
    """A system message for documents; by default the prompt that the model was saved with as ``"document"``."""
    image_prompt: str | None = None
    """A system message for images; by default the prompt for documents, which is what stores hold."""
    truncate_dim: PositiveInt | None = Field(default=None, frozen=True)
    """Numbers of an embedding to keep, for models trained for that; what is left is normalised again."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False, frozen=True)
    """Further arguments for :class:`slq_embed.SLQEncoder`: ``revision``, ``token``, ``backbone``, ... Those of the backbone
    are one level deeper: ``{"model_kwargs": {"dtype": "float16"}}``."""
    show_progress: bool = False
    """Whether to show a progress bar."""
    fetch_urls: bool = False
    """Whether to fetch images from URLs; off, because a server must not call every address that a caller names."""

    _encoder: SLQEncoder | RemoteEncoder | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Load the model now, so that a wrong name fails here."""
        _ = self.encoder

    @property
    def encoder(self) -> SLQEncoder | RemoteEncoder:
        """The model itself, ready for everything else that it does; with ``base_url``, what asks the server."""
        if self._encoder is None and self.base_url is not None:
            self._encoder = self._connect(self.base_url)
        if self._encoder is None:
            if self.model is None:
                raise ValueError("There is no model. Pass model=, a folder, a hub name or an SLQEncoder, or base_url=.")
            if str(self.model).startswith(_IN_MEMORY):
                raise ValueError(
                    f"{self.model} describes a model that was in memory, and cannot be loaded. Pass the "
                    "SLQEncoder itself, or save it and pass the folder."
                )
            self._encoder = shared_encoder(
                self.model, **{"device": self.device, "truncate_dim": self.truncate_dim, **self.model_kwargs}
            )
        return self._encoder

    def _connect(self, base_url: str) -> RemoteEncoder:
        given = [name for name in ("device", "model_kwargs") if getattr(self, name)]
        if given or isinstance(self.model, SLQEncoder):
            raise ValueError(
                f"The model is behind a server, so {' and '.join(given) or 'an SLQEncoder'} cannot be given."
            )
        key = None if self.api_key is None else self.api_key.get_secret_value()
        name = None if self.model is None else str(self.model)
        return RemoteEncoder(base_url, name, key, self.truncate_dim, self.timeout_s)

    @property
    def model_name(self) -> str:
        """The ``model`` argument; a description where that is a loaded model; the server's name for it."""
        if self.model is None and isinstance(self.encoder, RemoteEncoder):
            return str(self.encoder.model)
        return str(self._describe_model(self.model))

    @field_serializer("model")
    def _describe_model(self, model: str | Path | SLQEncoder | None) -> str | None:
        if model is None:
            return None
        if isinstance(model, SLQEncoder):
            size = f"{len(model.queries)} x {model.get_embedding_dimension()}"
            return f"{_IN_MEMORY}, {size}, {encoder_digest(model)[:12]}>"  # caches tell models apart by it
        return str(model)

    def __repr_args__(self) -> Any:
        """The fields, with a name in place of a loaded model, which prints pages."""
        return [(name, self.model_name if name == "model" else value) for name, value in super().__repr_args__()]

    def __getstate__(self) -> dict[Any, Any]:
        """What is pickled: the settings. Whoever reads them loads the model anew, or shares it.

        Raises:
            ValueError: If ``model`` is a loaded model: nothing says where it can be loaded from.
        """
        if isinstance(self.model, SLQEncoder):
            raise ValueError(
                "These embeddings hold a loaded SLQEncoder, which is not pickled. Save it with save_pretrained, and "
                "pass the folder: SLQEmbeddings(model=folder)."
            )
        return {**super().__getstate__(), "__pydantic_private__": {"_encoder": None}}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> SLQEmbeddings:
        """A copy that shares the model, unless what is updated decides how it is loaded."""
        copied = super().model_copy(update=update, deep=deep)
        if update and any(type(self).model_fields[name].frozen for name in update if name in type(self).model_fields):
            copied._encoder = None
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> SLQEmbeddings:
        """A copy that shares the model; weights are never copied."""
        return self.model_copy()

    def _settings(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "show_progress_bar": self.show_progress}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts to be searched.

        Args:
            texts: A str is always a text, even if it spells a path or a URL. Anything else is read as an input of
                ``SLQEncoder.encode``, such as a PIL image.

        Returns:
            A vector of length ``H`` for each text, with norm 1.

        Raises:
            UnreadableInputsError: If something cannot be read; its message names which.
            RuntimeError: If one text alone does not fit into memory.
        """
        return embed(self.encoder, texts, task="document", prompt=self.document_prompt, **self._settings()).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Embed a text that is searched with.

        Args:
            text: As for :meth:`embed_documents`.

        Returns:
            A vector of length ``H``, with norm 1.

        Raises:
            UnreadableInputsError: If it cannot be read.
            RuntimeError: If it does not fit into memory.
        """
        return embed(self.encoder, [text], task="query", prompt=self.query_prompt, **self._settings())[0].tolist()

    def embed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """Embed images.

        Args:
            uris: For each image a path, a ``file:`` or ``data:`` URI, bytes of an image file, a binary file such as
                ``io.BytesIO``, a PIL image, or, with ``fetch_urls=True``, a URL.

        Returns:
            A vector of length ``H`` for each image, with norm 1.

        Raises:
            UnreadableInputsError: If images cannot be read: its message names them and says why, and its
                ``embeddings`` hold the vectors of all others.
            RuntimeError: If one image alone does not fit into memory.
        """
        prompt = self.document_prompt if self.image_prompt is None else self.image_prompt
        return self._embed_images(uris, "document", prompt)

    def embed_images(self, uris: Sequence[Any]) -> list[list[float]]:
        """The same as :meth:`embed_image`, under the name that some stores call."""
        return self.embed_image(uris)

    def embed_inputs(self, inputs: Sequence[Mapping[str, Any] | str]) -> list[list[float]]:
        """Embed composed queries: an image with a text that says what should be different.

        Search with the vectors through ``store.similarity_search_by_vector``.

        Args:
            inputs: Dicts with ``"image"`` (as for :meth:`embed_image`), ``"text"``, or both. A str is a text.

        Returns:
            A vector of length ``H`` for each input, with norm 1.

        Raises:
            UnreadableInputsError: As for :meth:`embed_image`.
            RuntimeError: If one input alone does not fit into memory.
        """
        one = isinstance(inputs, str | bytes | Mapping) or getattr(inputs, "ndim", 1) != 1  # is refused below
        if isinstance(inputs, Iterable) and not one:
            inputs = [{"text": value} if isinstance(value, str) else value for value in inputs]
        return self._embed_images(inputs, "query", self.query_prompt)

    def _embed_images(
        self, sources: Sequence[Any], task: Literal["query", "document"], prompt: str | None
    ) -> list[list[float]]:
        settings = {"fetch_urls": self.fetch_urls, **self._settings()}
        return embed_images(self.encoder, sources, task=task, prompt=prompt, **settings).tolist()

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As :meth:`embed_documents`, in a thread: the event loop stays free."""
        return await _in_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> list[float]:
        """As :meth:`embed_query`, in a thread: the event loop stays free."""
        return await _in_thread(self.embed_query, text)

    async def aembed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """As :meth:`embed_image`, in a thread: the event loop stays free."""
        return await _in_thread(self.embed_image, uris)

    async def aembed_images(self, uris: Sequence[Any]) -> list[list[float]]:
        """As :meth:`embed_image`, in a thread: the event loop stays free."""
        return await _in_thread(self.embed_image, uris)

    async def aembed_inputs(self, inputs: Sequence[Mapping[str, Any] | str]) -> list[list[float]]:
        """As :meth:`embed_inputs`, in a thread: the event loop stays free."""
        return await _in_thread(self.embed_inputs, inputs)


async def _in_thread(call: Callable[..., Result], *args: Any) -> Result:
    return await run_in_executor(_threads(os.getpid()), call, *args)
