"""A model behind a server: inputs are read here, by the rules of a local model, and go out as chat messages."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.autonotebook import tqdm

from slq_embed.encoding.batches import input_name
from slq_embed.inputs.rows import Picture, Row, Skipped, read_row, report

__all__ = ["PartlyEmbeddedError", "RemoteEncoder"]

logger = logging.getLogger(__name__)

_OF_THE_INPUT = (400, 413, 422)
"""Answers that may be about one input of a request, such as a text that is too long for the server."""
_FOR_A_WHILE = (429, 502, 503)
"""Answers of a server that has too much to do, or starts again."""
_PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds before a request is sent again."""
_NO_NUMBERS = "the server gave no numbers for it"


class PartlyEmbeddedError(RuntimeError):
    """A server failed after it had embedded some inputs; the cause says how.

    Args:
        reason: What the server's failure says.
        embeddings: ``(number of inputs, H)`` in float32; rows that the server did not give are NaN.
        skipped: Inputs that could not be read, or were refused, before it failed.
    """

    def __init__(self, reason: str, embeddings: NDArray[np.float32], skipped: Sequence[Skipped] = ()) -> None:
        self.reason, self.embeddings, self.skipped = reason, embeddings, list(skipped)
        done = int(np.isfinite(embeddings).all(axis=1).sum())
        before = f" Before that: {report(self.skipped)}" if skipped else ""
        super().__init__(
            f"{done} of {len(embeddings)} inputs were embedded (error.embeddings holds them), then the server failed: {reason}{before}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes: an error that cannot be unpickled breaks their pool."""
        return type(self), (self.reason, self.embeddings, self.skipped)


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
        timeout_s: Longest time to wait for the answer to a request, in seconds.

    Raises:
        ConnectionError: If no server answers there.
        TimeoutError: If it does not answer in time.
        ValueError: If that is no address, the server has no model of that name, or an argument does not fit.
        RuntimeError: If the server refuses, or is none for embeddings.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    truncate_dim: int | None = None
    timeout_s: float = 300.0
    _width: int | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url is {self.base_url!r}, but an address such as 'http://127.0.0.1:8000' is needed."
            )
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise ValueError(f"truncate_dim is {self.truncate_dim}, but at least 1 is needed.")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, but a positive number of seconds is needed.")
        self.base_url = self.base_url.rstrip("/").removesuffix("/v1")
        listed = [entry["id"] for entry in self._data("/v1/models", None, "id")]
        if not listed:
            raise RuntimeError(f"The server at {self.base_url} lists no models. Check base_url, and what it serves.")
        if self.model is None:
            self.model = listed[0]
        if self.model not in listed:
            raise ValueError(f"The server at {self.base_url} has no model {self.model!r}. It has: {', '.join(listed)}.")

    def embed(
        self,
        inputs: Sequence[tuple[int, Any]],
        count: int,
        skipped: list[Skipped],
        *,
        task: Literal["query", "document"] | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        normalize_embeddings: bool = True,
        show_progress_bar: bool = False,
    ) -> NDArray[np.float32]:
        """Embed inputs; callers use :func:`slq_embed.serving.embed`, which raises an error for what was skipped.

        Args:
            inputs: Inputs with their indices; see :func:`slq_embed.inputs.rows.read_row`.
            count: How many rows the result has.
            skipped: Gets what was skipped, in order.
            task: Which of the prompts that the model was exported with is used; without one, its default prompt.
            prompt: A system message in its place; ``""`` for none.
            batch_size: Inputs a request.
            normalize_embeddings: Whether to normalise again what ``truncate_dim`` has cut.
            show_progress_bar: Whether to show one.

        Returns:
            ``(count, H)``, with NaN in the rows of what was skipped.

        Raises:
            ConnectionError: If the server does not answer, also when it was asked again.
            TimeoutError: If it does not answer in time.
            RuntimeError: If it answers with an error that is not about an input, or with no numbers for any input.
            PartlyEmbeddedError: In place of these, if some inputs were embedded by then.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but at least 1 is needed.")
        rows: NDArray[np.float32] | None = None
        widths: set[int] = set()
        options = self._options(task, prompt)
        starts = range(0, len(inputs), batch_size)
        for start in tqdm(starts, "Batches", disable=not show_progress_bar):
            chats: dict[int, list[dict[str, Any]]] = {}
            names: dict[int, str] = {}
            for index, value in inputs[start : start + batch_size]:
                names[index] = input_name(index, value)
                try:
                    chats[index] = _messages(read_row(value), prompt)
                except ValueError as error:
                    skipped.append(Skipped(names[index], str(error), index))
            try:
                found, refused = self._ask(chats, options)
                widths |= {len(row) for row in found.values()}
                if len(widths) > 1:  # numpy would spread a single number over a row
                    raise RuntimeError(
                        f"The server at {self.base_url} gave embeddings of {' and '.join(map(str, sorted(widths)))} numbers, but "
                        "those of one model have equally many. Check what it serves."
                    )
            except (OSError, RuntimeError) as error:
                if rows is None:
                    raise
                rows = self._shorten(rows, normalize_embeddings)
                raise PartlyEmbeddedError(str(error), rows, _in_order(skipped)) from error
            skipped += [Skipped(names[index], reason, index) for index, reason in refused.items()]
            for index, row in found.items():
                if rows is None:
                    rows = np.full((count, len(row)), np.nan, np.float32)
                rows[index] = row
            if rows is None and sum(row.reason == _NO_NUMBERS for row in skipped) > 1:
                break  # it will give none for the others either
        if rows is None and (empty := [row.name for row in skipped if row.reason == _NO_NUMBERS]):
            raise RuntimeError(
                f"The server at {self.base_url} gave no numbers for any input so far ({', '.join(empty)}). Serve a folder of "
                "slq_embed.saving.export_vllm, with its own chat template."
            )
        skipped[:] = _in_order(skipped)
        if rows is None:
            rows = np.full((count, self._ask_for_width()), np.nan, np.float32)
        self._width = rows.shape[1]
        return self._shorten(rows, normalize_embeddings)

    def _shorten(self, rows: NDArray[np.float32], normalize: bool) -> NDArray[np.float32]:
        result = rows[:, : self.truncate_dim]
        if self.truncate_dim is None or not normalize:
            return result
        return result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)

    def _options(self, task: Literal["query", "document"] | None = None, prompt: str | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {"model": self.model, "encoding_format": "base64"}
        if name := task if prompt is None else "none":  # without a name, the template takes the default prompt
            options["chat_template_kwargs"] = {"slq_task": name}
        return options

    def _ask(
        self, chats: dict[int, list[dict[str, Any]]], options: dict[str, Any]
    ) -> tuple[dict[int, NDArray[np.float32]], dict[int, str]]:
        """Ask for a batch; if the server refuses it, ask for each input alone, so that one does not cost the others.

        Returns:
            Embeddings, and why there are none, by the index of the input.
        """
        if not chats:
            return {}, {}
        one = len(chats) == 1
        messages = next(iter(chats.values())) if one else list(chats.values())
        try:
            data = self._data("/v1/embeddings", {**options, "messages": messages}, "index", "embedding")
        except _RefusedError as error:
            if one:
                return {}, dict.fromkeys(chats, f"the server refuses it: {error}")
            parts = [self._ask({index: chat}, options) for index, chat in chats.items()]
            found = {index: row for part, _ in parts for index, row in part.items()}
            return found, {index: reason for _, refused in parts for index, reason in refused.items()}
        rows = [_numbers(entry["embedding"]) for entry in sorted(data, key=lambda entry: entry["index"])]
        if len(rows) != len(chats):
            raise RuntimeError(f"The server at {self.base_url} gave {len(rows)} embeddings for {len(chats)} inputs.")
        whole = {index: row for index, row in zip(chats, rows, strict=True) if len(row) and np.isfinite(row).all()}
        return whole, {index: _NO_NUMBERS for index in chats if index not in whole}

    def _ask_for_width(self) -> int:
        if self._width is None:
            found, _ = self._ask({0: _messages(read_row("a"), None)}, self._options())
            self._width = len(found[0]) if found else 0
        return self._width

    def _data(self, path: str, body: Any, *keys: str) -> list[dict[str, Any]]:
        """The entries under ``"data"`` of an answer, which have all of the keys."""
        content = self._send(path, body)
        try:
            entries = json.loads(content)["data"]
            if all(set(keys) <= set(entry) for entry in entries):
                return list(entries)
        except (ValueError, KeyError, TypeError):
            pass
        raise RuntimeError(
            f"What answers at {self.base_url} is no server for embeddings: to {path} it says "
            f"{content[:200].decode(errors='replace')!r}. Check base_url."
        )

    def _send(self, path: str, body: Any = None) -> bytes:
        """Send a request. One for embeddings is sent again a few times: what was computed before must not be lost."""
        content = None if body is None else json.dumps(body).encode()
        for pause in () if body is None else _PAUSES_S:
            try:
                return self._send_once(path, content)
            except (ConnectionError, _BusyError) as error:
                logger.warning("%s Asking again in %g s.", error, pause)
                time.sleep(pause)
        return self._send_once(path, content)

    def _send_once(self, path: str, content: bytes | None) -> bytes:
        headers = self._headers()
        try:
            request = urllib.request.Request(self.base_url + path, content, headers)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            message = _message(error)
            if error.code in _OF_THE_INPUT and content is not None:
                raise _RefusedError(message) from error
            kind = _BusyError if error.code in _FOR_A_WHILE else RuntimeError
            key = ". Pass the server's key: api_key=, or SLQ_API_KEY." if error.code in (401, 403) else ""
            raise kind(f"The server at {self.base_url} answers {path} with {error.code}: {message}{key}") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise TimeoutError(
                    f"The server at {self.base_url} has not answered {path} within {self.timeout_s:g} s. Pass a larger "
                    "timeout_s, or fewer inputs a request (batch_size)."
                ) from error
            raise ConnectionError(
                f"No server answers at {self.base_url}: {error}. Check base_url, and that the server has started."
            ) from error

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if key := (self.api_key or os.environ.get("SLQ_API_KEY") or "").strip():
            if not (key.isascii() and key.isprintable()):  # the host's own error would print the key
                raise ValueError(
                    "The server's key (api_key or SLQ_API_KEY) holds a character that no header can hold, such as a line break."
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers


class _BusyError(RuntimeError):
    """The server has too much to do."""


class _RefusedError(Exception):
    """The server refuses a request for what is in it."""


def _message(error: urllib.error.HTTPError) -> str:
    text = ""
    try:
        text = error.read().decode(errors="replace")
        content = json.loads(text)
        found = content.get("error", content)  # vLLM's own errors, and those of its checks before them
        return found if isinstance(found, str) else str(found["message"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, http.client.HTTPException):
        return text[:500] or str(error.reason)


def _in_order(skipped: list[Skipped]) -> list[Skipped]:
    return sorted(skipped, key=lambda row: row.index or 0)


def _numbers(embedding: str | list[float]) -> NDArray[np.float32]:
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding), "<f4").astype(np.float32)
        return np.array(embedding, np.float32).reshape(-1)
    except (TypeError, ValueError):
        return np.zeros(0, np.float32)  # as good as no numbers


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
