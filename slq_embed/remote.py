"""A model behind a server: inputs are read here, by the rules of a local model, and go out as chat messages."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.autonotebook import tqdm

from slq_embed.encoding.batches import input_name
from slq_embed.inputs.rows import Picture, Row, Skipped, read_row

__all__ = ["RemoteEncoder"]

_OF_THE_INPUT = (400, 413, 422)
"""Answers that may be about one input of a request, such as a text that is too long for the server."""


@dataclass
class RemoteEncoder:
    """An SLQ model that a server holds, such as vLLM with the plugin ``vllm-slq``.

    :func:`slq_embed.serving.embed` and :func:`slq_embed.serving.embed_images` take it in place of an encoder. Images are decoded
    here, so the server gets the pixels that a local model would see. Objects hold no connection: they can be copied, pickled, and used
    from any thread or process.

    Args:
        base_url: Address of the server, with or without ``/v1``.
        model: Under which name the server has the model; by default the first one that it lists.
        api_key: The server's key; by default the environment variable ``SLQ_API_KEY``.
        truncate_dim: Numbers of an embedding to keep.
        timeout_s: Longest time to wait for an answer, in seconds.

    Raises:
        ConnectionError: If no server answers there.
        ValueError: If that is no address, or the server has no model of that name.
        RuntimeError: If the server refuses.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    truncate_dim: int | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url is {self.base_url!r}, but an address such as 'http://127.0.0.1:8000' is needed."
            )
        self.base_url = self.base_url.rstrip("/").removesuffix("/v1")
        listed = [entry["id"] for entry in self._send("/v1/models")["data"]]
        if self.model is None:
            self.model = listed[0]
        if self.model not in listed:
            raise ValueError(f"The server at {self.base_url} has no model {self.model!r}. It has: {', '.join(listed)}.")

    def embed(
        self,
        inputs: Sequence[tuple[int, Any]],
        count: int,
        *,
        task: Literal["query", "document"] | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        normalize_embeddings: bool = True,
        show_progress_bar: bool = False,
    ) -> tuple[NDArray[np.float32], list[Skipped]]:
        """Embed inputs; callers use :func:`slq_embed.serving.embed`, which raises an error for what was skipped.

        Args:
            inputs: Inputs with their indices; see :func:`slq_embed.inputs.rows.read_row`.
            count: How many rows the result has.
            task: Which of the prompts that the model was exported with is used.
            prompt: A system message in its place; ``""`` for none.
            batch_size: Inputs a request.
            normalize_embeddings: Whether to normalise again what ``truncate_dim`` has cut.
            show_progress_bar: Whether to show one.

        Returns:
            ``(count, H)`` with NaN for what was skipped, and what was skipped.

        Raises:
            ConnectionError: If the server does not answer.
            RuntimeError: If it answers with an error that is not about an input, or with no numbers.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but at least 1 is needed.")
        rows: NDArray[np.float32] | None = None
        skipped: list[Skipped] = []
        options: dict[str, Any] = {"model": self.model, "encoding_format": "base64"}
        if prompt is None and task is not None:
            options["chat_template_kwargs"] = {"slq_task": task}
        starts = range(0, len(inputs), batch_size)
        for start in tqdm(starts, "Batches", disable=not show_progress_bar):
            chats: dict[int, list[dict[str, Any]]] = {}
            for index, value in inputs[start : start + batch_size]:
                try:
                    chats[index] = _messages(read_row(value), prompt)
                except ValueError as error:
                    skipped.append(Skipped(input_name(index, value), str(error), index))
            found, refused = self._ask(chats, options)
            skipped += refused
            for index, row in found.items():
                if rows is None:
                    rows = np.full((count, len(row)), np.nan, np.float32)
                rows[index] = row
        skipped.sort(key=lambda row: row.index or 0)
        result = np.full((count, 0), np.nan, np.float32) if rows is None else rows[:, : self.truncate_dim]
        if self.truncate_dim is not None and normalize_embeddings:
            result = result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
        return result, skipped

    def _ask(
        self, chats: dict[int, list[dict[str, Any]]], options: dict[str, Any]
    ) -> tuple[dict[int, NDArray[np.float32]], list[Skipped]]:
        """Ask for a batch; if the server refuses it, ask for each input alone, so that one does not cost the others."""
        if not chats:
            return {}, []
        one = len(chats) == 1
        messages = next(iter(chats.values())) if one else list(chats.values())
        try:
            answer = self._send("/v1/embeddings", {**options, "messages": messages})
        except _RefusedError as error:
            if one:
                (index,) = chats
                return {}, [Skipped(f"input {index}", f"the server refuses it: {error}", index)]
            parts = [self._ask({index: chat}, options) for index, chat in chats.items()]
            found = {index: row for part, _ in parts for index, row in part.items()}
            return found, [entry for _, refused in parts for entry in refused]
        rows = [_numbers(entry["embedding"]) for entry in sorted(answer["data"], key=lambda entry: entry["index"])]
        if len(rows) != len(chats) or not all(np.isfinite(row).all() for row in rows):
            raise RuntimeError(
                f"The server at {self.base_url} gave {len(rows)} embeddings for {len(chats)} inputs, or such that are no numbers. "
                "Serve a folder of slq_embed.saving.export_vllm, with its own chat template."
            )
        return dict(zip(chats, rows, strict=True)), []

    def _send(self, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := self.api_key or os.environ.get("SLQ_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.base_url + path, content, headers)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            message = _message(error)
            if error.code in _OF_THE_INPUT and body is not None:
                raise _RefusedError(message) from error
            raise RuntimeError(f"The server at {self.base_url} answers {path} with {error.code}: {message}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"No server answers at {self.base_url}: {error}. Check base_url, and that the server has started."
            ) from error


class _RefusedError(Exception):
    """The server refuses a request for what is in it."""


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        content = json.loads(text)
        found = content.get("error", content)  # vLLM's own errors, and those of its checks before them
        return found if isinstance(found, str) else str(found["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:500] or str(error.reason)


def _numbers(embedding: str | list[float]) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4").astype(np.float32)
    return np.array(embedding, np.float32)


def _messages(row: Row, prompt: str | None) -> list[dict[str, Any]]:
    if row.videos:
        raise ValueError("A server gets no videos from this client. Embed videos with a local model.")
    chat = row.messages(prompt)
    pictures = iter(row.pictures)
    messages = []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = [_picture(next(pictures)) if part["type"] == "image" else part for part in content]
        messages.append({**message, "content": content})
    return messages


def _picture(picture: Picture) -> dict[str, Any]:
    # PNG keeps each pixel; the fastest level, because most of it is sent within a machine or a rack.
    picture.image.save(file := io.BytesIO(), "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
