"""SLQEmbedding: an SLQ model as a multi-modal embedding of LlamaIndex."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, field_validator
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import ImageType
from llama_index.embeddings.slq.query_cache import QueryCache
from llama_index.embeddings.slq.threads import in_thread

from slq_embed import SLQEncoder
from slq_embed.encoding import encoder_digest
from slq_embed.remote import RemoteEncoder
from slq_embed.serving import embed, embed_images, shared_encoder

_LOADING = (
    "device",
    "truncate_dim",
    "revision",
    "cache_folder",
    "local_files_only",
    "trust_remote_code",
    "model_kwargs",
)
_UNKNOWN = "unknown"  # the host's own default
_IN_MEMORY = "slq-in-memory-"  # ours, by which caches tell models apart


class SLQEmbedding(MultiModalEmbedding):
    """Embeds texts, queries and images into one space, with a frozen multimodal LLM and a few latent queries.

    Instances of one folder and the same loading arguments share one model in memory, whichever framework asks for it.
    A text is always a text, even if it spells a path or a URL. Besides the arguments below there are those of
    ``MultiModalEmbedding``: ``embed_batch_size`` (halved as long as a batch does not fit into memory),
    ``callback_manager``, ``num_workers``, ``embeddings_cache``.

    Args:
        model_name: A saved SLQ model: a folder or a hub name. Beside ``model``, where that can be loaded from. Beside
            ``base_url``, the server's name for it; by default the first one that the server lists.
        model: A loaded encoder, which is shared, in place of ``model_name`` and the arguments for loading.
        token: Hub token, for loading only: it is kept nowhere, and no serialised form holds it.
        api_key: Key of the server at ``base_url``, which no serialised form holds; by default the environment variable
            ``SLQ_API_KEY``.
        **kwargs: The fields of this class.

    Raises:
        ValueError: If there is neither ``model_name`` nor ``model`` nor ``base_url``, an argument is unknown or does not
            fit, or the folder is no SLQ model.
        OSError: If nothing can be loaded from there, or no server answers.

    Example:
        >>> from slq_embed import pretrained
        >>> embedding = SLQEmbedding(pretrained("slq-tiny"), device="cpu")
        >>> len(embedding.get_query_embedding("a red circle"))
        192
    """

    model_config = ConfigDict(extra="forbid")  # a misspelt argument is an error

    base_url: str | None = Field(
        frozen=True,
        default=None,
        description="A server that holds the model, such as vLLM's, in place of a model here.",
    )
    timeout_s: float = Field(
        frozen=True,
        default=RemoteEncoder.timeout_s,
        gt=0,
        description="Longest time to wait for the server's answer to a request, in seconds.",
    )
    device: str | None = Field(
        frozen=True, default=None, description="Where to compute; by default a GPU if there is one."
    )
    normalize: bool = Field(default=True, description="Whether to normalise again what truncate_dim has cut.")
    query_instruction: str | None = Field(
        default=None, description="Prompt of queries; by default the model's saved prompt 'query'."
    )
    text_instruction: str | None = Field(
        default=None, description="Prompt of texts; by default the model's saved prompt 'document'."
    )
    image_instruction: str | None = Field(
        default=None, description="Prompt of images; by default the model's saved prompt 'document'."
    )
    fetch_urls: bool = Field(default=False, description="Whether to fetch images that are named by a URL.")
    show_progress_bar: bool = Field(default=False, description="Whether to show a progress bar for each batch.")
    truncate_dim: int | None = Field(frozen=True, default=None, gt=0, description="Keep the first dimensions only.")
    revision: str | None = Field(frozen=True, default=None, description="Commit, tag or branch of a hub model.")
    cache_folder: str | None = Field(frozen=True, default=None, description="Where hub files are kept.")
    local_files_only: bool = Field(
        frozen=True, default=False, description="Whether to stay off the network when loading."
    )
    trust_remote_code: bool = Field(
        frozen=True, default=False, description="Whether the backbone may bring code of its own."
    )
    model_kwargs: dict[str, Any] = Field(
        frozen=True, default_factory=dict, description="For loading the backbone, such as {'dtype': 'bfloat16'}."
    )

    _encoder: SLQEncoder | RemoteEncoder = PrivateAttr()

    def __init__(
        self,
        model_name: str | Path | None = None,
        *,
        model: SLQEncoder | None = None,
        token: str | bool | None = None,
        api_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model_name, SLQEncoder):
            raise ValueError("model_name is an SLQEncoder. Pass a loaded model as model=: SLQEmbedding(model=encoder).")
        if not isinstance(model, SLQEncoder | None):
            raise ValueError(
                f"model is a {type(model).__name__}, but an SLQEncoder is needed. Pass a folder or hub name as model_name=."
            )
        name = _UNKNOWN if model_name is None else str(model_name)
        remote = None
        if (base_url := kwargs.get("base_url")) is not None:
            given = [key for key in _LOADING if kwargs.get(key) and key != "truncate_dim"]
            if given or model is not None or token is not None:
                named = " and ".join(given or (["model"] if model is not None else ["token"]))
                raise ValueError(f"The model is behind a server, so {named} cannot be given.")
            settings = {key: kwargs[key] for key in ("truncate_dim", "timeout_s") if key in kwargs}
            remote = RemoteEncoder(base_url, None if name == _UNKNOWN else name, api_key, **settings)
            name = str(remote.model)
        if model is not None and _is_no_place(name):
            name = f"{_IN_MEMORY}{encoder_digest(model)[:12]}"
        kwargs.pop("class_name", None)  # of what was dumped
        super().__init__(model_name=name, **kwargs)
        if remote is not None:
            self._encoder = remote
            return
        if model is None and _is_no_place(name):
            raise ValueError(
                "There is no model to load. Pass model_name=, a folder or hub name of an SLQ model, or model=, an "
                "SLQEncoder. What was serialised without a model_name is restored by from_dict(data, model=encoder)."
            )
        loading = {key: value for key in _LOADING if (value := getattr(self, key))}
        self._encoder = shared_encoder(
            name if model is None else model, **loading, **({} if token is None else {"token": token})
        )

    @field_validator("model_kwargs", mode="before")
    @classmethod
    def _check_model_kwargs(cls, value: Any) -> Any:
        """Hold what can be written down, and no secret."""
        arguments = {
            key: str(entry).removeprefix("torch.") if isinstance(entry, torch.dtype) else entry
            for key, entry in dict(value).items()
        }
        if "token" in arguments:
            raise ValueError("model_kwargs is serialised, so it must not hold a token. Pass token= instead.")
        try:
            json.dumps(arguments)
        except TypeError as error:
            raise ValueError(
                f"model_kwargs is serialised as JSON, but {error}. Load the model with SLQEncoder, and pass model=."
            ) from error
        return arguments

    @classmethod
    def class_name(cls) -> str:
        """The name under which the host serialises this class."""
        return "SLQEmbedding"

    @property
    def encoder(self) -> SLQEncoder | RemoteEncoder:
        """The model, shared with everyone who has loaded the same; ``encoder.backbone`` can generate.

        With ``base_url``, what asks the server.
        """
        return self._encoder

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], SLQEmbedding], tuple[dict[str, Any]]]:
        """Pickle the arguments; the host would pickle the weights."""
        if _is_no_place(self.model_name):
            raise ValueError("A model in memory is not pickled. Save it, and pass its folder as model_name= as well.")
        return type(self).from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> SLQEmbedding:
        """Copy all but the model."""
        memo = {} if memo is None else memo
        memo[id(self._encoder)] = self._encoder
        return super().__deepcopy__(memo)

    def get_query_embedding(self, query: str) -> Embedding:
        """Embed a query; as the host does it, but that a cache keeps queries apart from texts.

        Args:
            query: The text to search for.

        Returns:
            ``H`` numbers.
        """
        host = inspect.unwrap(MultiModalEmbedding.get_query_embedding)  # this method has the host's span already
        row: Embedding = host(self._caching_queries(), query)
        return row

    async def aget_query_embedding(self, query: str) -> Embedding:
        """Embed a query as :meth:`get_query_embedding`, beside the event loop."""
        host = inspect.unwrap(MultiModalEmbedding.aget_query_embedding)
        row: Embedding = await host(self._caching_queries(), query)
        return row

    def _caching_queries(self) -> SLQEmbedding:
        if self.embeddings_cache is None:
            return self
        return self.model_copy(update={"embeddings_cache": QueryCache(self.embeddings_cache)})

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._embed_texts([query], "query", self.query_instruction)[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await in_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await in_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embed_texts(texts, "document", self.text_instruction)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await in_thread(self._get_text_embeddings, texts)

    def _get_image_embedding(self, img_file_path: ImageType | Path) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_image_embedding(self, img_file_path: ImageType | Path) -> Embedding:
        return await in_thread(self._get_image_embedding, img_file_path)

    def _get_image_embeddings(self, img_file_paths: Sequence[ImageType | Path]) -> list[Embedding]:
        settings = {"task": "document", "prompt": self.image_instruction, **self._settings()}
        rows: list[Embedding] = embed_images(
            self._encoder, img_file_paths, fetch_urls=self.fetch_urls, **settings
        ).tolist()
        return rows

    async def _aget_image_embeddings(self, img_file_paths: Sequence[ImageType | Path]) -> list[Embedding]:
        return await in_thread(self._get_image_embeddings, img_file_paths)

    def _embed_texts(self, texts: list[str], task: Literal["query", "document"], prompt: str | None) -> list[Embedding]:
        rows: list[Embedding] = embed(self._encoder, texts, task=task, prompt=prompt, **self._settings()).tolist()
        return rows

    def _settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.embed_batch_size,
            "normalize_embeddings": self.normalize,
            "show_progress_bar": self.show_progress_bar,
        }


def _is_no_place(name: str) -> bool:
    return name == _UNKNOWN or name.startswith(_IN_MEMORY)
