"""Whoever watches LlamaIndex sees of this class what is seen of the host's own classes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.callbacks.schema import EventPayload
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.instrumentation.span_handlers import NullSpanHandler
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.slq import SLQEmbedding

ROW = [0.0, 1.0]


class Plain(MultiModalEmbedding):
    """The least that a class of the host can be."""

    def _get_query_embedding(self, query):
        return ROW

    async def _aget_query_embedding(self, query):
        return ROW

    def _get_text_embedding(self, text):
        return ROW

    def _get_image_embedding(self, img_file_path):
        return ROW

    async def _aget_image_embedding(self, img_file_path):
        return ROW


class Events(BaseEventHandler):
    _seen: list[Any] = PrivateAttr(default_factory=list)

    def handle(self, event, **kwargs):
        self._seen.append(event)


class Spans(NullSpanHandler):
    _seen: list[str] = PrivateAttr(default_factory=list)  # the host's __init__ takes no fields of others

    def span_enter(self, *, id_, **kwargs):
        self._seen.append(id_)


@pytest.fixture
def watch() -> Iterator[tuple[Events, Spans]]:
    root = get_dispatcher("root")
    events, spans = Events(), Spans()
    before = list(root.event_handlers), list(root.span_handlers)
    root.add_event_handler(events)
    root.add_span_handler(spans)
    yield events, spans
    root.event_handlers, root.span_handlers = before


def use(embedding, picture: str) -> None:
    embedding.get_query_embedding("a query")
    embedding.get_text_embedding("a text")
    embedding.get_text_embedding_batch(["a", "b", "c"])
    embedding.get_image_embedding(picture)
    embedding.get_image_embedding_batch([picture] * 3)

    async def again() -> None:
        await embedding.aget_query_embedding("a query")
        await embedding.aget_text_embedding("a text")
        await embedding.aget_text_embedding_batch(["a", "b", "c"])
        await embedding.aget_image_embedding(picture)
        await embedding.aget_image_embedding_batch([picture] * 3)

    asyncio.run(again())


@pytest.mark.parametrize("cached", [False, True])
def test_events_callbacks_and_spans_are_those_of_the_host(encoder, scenes, watch, cached):
    def seen_of(embedding) -> tuple:
        handler = LlamaDebugHandler(print_trace_on_end=False)
        embedding.callback_manager = CallbackManager([handler])
        for watcher in watch:
            watcher._seen.clear()
        use(embedding, str(scenes[0].picture))
        events, spans = (list(watcher._seen) for watcher in watch)
        chunks = [(type(event), getattr(event, "chunks", None)) for event in events]
        called = [pair[-1].payload.get(EventPayload.CHUNKS) for pair in handler.get_event_pairs(CBEventType.EMBEDDING)]
        public = sorted(name for span in spans if not (name := span.split(".")[1].split("-")[0]).startswith("_"))
        return chunks, called, public, events

    def cache() -> SimpleKVStore | None:
        return SimpleKVStore() if cached else None

    plain = seen_of(Plain(embed_batch_size=2, embeddings_cache=cache()))
    ours = seen_of(SLQEmbedding(model=encoder, embed_batch_size=2, embeddings_cache=cache()))
    assert ours[:3] == plain[:3]
    events = ours[3]
    assert (EmbeddingEndEvent, ["a query"]) in ours[0]
    ends = [event for event in events if isinstance(event, EmbeddingEndEvent)]
    assert [len(event.embeddings[0]) for event in ends] == [192] * len(ends)
    starts = [event for event in events if isinstance(event, EmbeddingStartEvent)]
    assert {event.model_dict["class_name"] for event in starts} == {"SLQEmbedding"}
    assert len(starts) >= len(ends) >= 6
