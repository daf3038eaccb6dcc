"""A small server on 127.0.0.1 that answers in vLLM's format, with the embeddings of an encoder here."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from slq_embed import SLQEncoder
from slq_embed.encoding.protocol import resolve_prompt

NAME, LONGEST = "slq", 500


class Server(ThreadingHTTPServer):
    def __init__(self, model: SLQEncoder, key: str | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.key = model, key
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
        chats = chats if isinstance(chats[0], list) else [chats]
        self.server.batches.append(len(chats))
        if any(len(part.get("text", "")) > LONGEST for chat in chats for part in chat[-1]["content"]):
            self.answer(400, {"error": {"message": "This model's maximum context length is 2048 tokens.", "code": 400}})
            return
        task = body.get("chat_template_kwargs", {}).get("slq_task")
        rows = [self.embed(chat, task) for chat in chats]
        data = [{"index": number, "object": "embedding", "embedding": row} for number, row in enumerate(rows)]
        self.answer(200, {"object": "list", "model": NAME, "data": data[::-1]})

    def embed(self, chat: list[dict[str, Any]], task: Any) -> str:
        model = self.server.model
        prompt = chat[0]["content"][0]["text"] if chat[0]["role"] == "system" else None
        if prompt is None and task is not None:
            prompt = resolve_prompt(model, task=task)
        parts = [
            {"type": "image", "image": base64.b64decode(part["image_url"]["url"].partition(",")[2])}
            if part["type"] == "image_url"
            else part
            for part in chat[-1]["content"]
        ]
        row = model.encode([{"role": "user", "content": parts}], prompt=prompt)
        return base64.b64encode(row.astype("<f4").tobytes()).decode()

    def refuses_key(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return False
        self.answer(401, {"error": "Unauthorized"})
        return True

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(model: SLQEncoder, key: str | None = None) -> Iterator[Server]:
    """Run the server in a thread."""
    server = Server(model, key)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
