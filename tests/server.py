"""A small server on 127.0.0.1 that answers in vLLM's format, with the embeddings of an exported folder.

As vLLM does, it reads no prompts but those in the folder's chat template.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from slq_embed import SLQEncoder
from slq_embed.saving import export_vllm

NAME, LONGEST = "slq", 500


def parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM gives to a template that reads parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Server(ThreadingHTTPServer):
    daemon_threads = False  # else one that a client gave up on may compute on, beside the tests that follow

    def __init__(self, folder: Path, key: str | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.key = SLQEncoder(folder, device="cpu"), key
        self.template = (folder / "chat_template.jinja").read_text("utf8")
        self.lock = threading.Lock()
        self.failures: list[tuple[int, Any]] = []  # what the next requests for embeddings get in place of them
        self.wait_s = 0.0  # how long they take
        self.empty = ""  # chats with this text get NaN
        self.batches: list[int] = []  # how many inputs each request had
        self.bodies: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if not self.refuses_key():
            self.answer(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuses_key():
            return
        self.server.bodies.append(body)
        chats = body["messages"]
        chats = [
            [{**message, "content": parts(message["content"])} for message in chat]
            for chat in (chats if isinstance(chats[0], list) else [chats])
        ]
        self.server.batches.append(len(chats))
        time.sleep(self.server.wait_s)
        if self.server.failures:
            self.answer(*self.server.failures.pop(0))
            return
        if any(len(part.get("text", "")) > LONGEST for chat in chats for part in chat[-1]["content"]):
            self.answer(400, {"error": {"message": "This model's maximum context length is 2048 tokens.", "code": 400}})
            return
        task = body.get("chat_template_kwargs", {}).get("slq_task")
        rows = [self.embed(chat, task) for chat in chats]
        data = [{"index": number, "object": "embedding", "embedding": row} for number, row in enumerate(rows)]
        self.answer(200, {"object": "list", "model": NAME, "data": data[::-1]})

    def embed(self, chat: list[dict[str, Any]], task: Any) -> str:
        model, empty = self.server.model, self.server.empty
        chat = [{**message, "content": [self.part(part) for part in message["content"]]} for message in chat]
        with self.server.lock:
            # An argument of a template, as jinja would set it.
            named = "" if task is None else f"{{%- set slq_task = {json.dumps(task)} -%}}"
            model.processor.chat_template = named + self.server.template
            row = model.encode(chat, prompt="")
        if empty and chat[-1]["content"][-1].get("text") == empty:
            row[:] = np.nan
        return base64.b64encode(row.astype("<f4").tobytes()).decode()

    def part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image_url":
            return part
        return {"type": "image", "image": base64.b64decode(part["image_url"]["url"].partition(",")[2])}

    def refuses_key(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return False
        self.answer(401, {"error": "Unauthorized"})
        return True

    def answer(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        with suppress(ConnectionError):  # the client has stopped waiting
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(model: SLQEncoder, key: str | None = None) -> Iterator[Server]:
    """Export a model, and run a server of the folder in a thread."""
    with TemporaryDirectory() as folder:
        export_vllm(model, folder)
        server = Server(Path(folder), key)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
