"""Async methods give what the others give, in order, while the event loop and its threads stay free."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from llama_index.embeddings.slq import base


def test_async_methods_agree_with_the_others(embedding, scenes):
    captions, pictures = [s.caption for s in scenes], [str(s.picture) for s in scenes]

    async def all_of_them():
        return [
            [await embedding.aget_query_embedding(captions[0])],
            [await embedding.aget_text_embedding(captions[0])],
            await embedding.aget_text_embedding_batch(captions),
            [await embedding.aget_image_embedding(pictures[0])],
            await embedding.aget_image_embedding_batch(pictures),
            [await embedding.aget_agg_embedding_from_queries(captions[:2])],
        ]

    expected = [
        [embedding.get_query_embedding(captions[0])],
        [embedding.get_text_embedding(captions[0])],
        embedding.get_text_embedding_batch(captions),
        [embedding.get_image_embedding(pictures[0])],
        embedding.get_image_embedding_batch(pictures),
        [embedding.get_agg_embedding_from_queries(captions[:2])],
    ]
    for rows, reference in zip(asyncio.run(all_of_them()), expected, strict=True):
        assert np.abs(np.array(rows) - reference).max() < 1e-6


@pytest.mark.parametrize("show_progress", [False, True])
@pytest.mark.parametrize("num_workers", [None, 2])
def test_async_batches_keep_their_order(embedding, scenes, show_progress, num_workers):
    embedding.num_workers = num_workers
    pictures = [str(s.picture) for s in scenes]
    captions = [s.caption for s in scenes]
    rows = asyncio.run(embedding.aget_image_embedding_batch(pictures, show_progress=show_progress))
    assert np.abs(np.array(rows) - embedding.get_image_embedding_batch(pictures)).max() < 1e-6
    rows = asyncio.run(embedding.aget_text_embedding_batch(captions, show_progress=show_progress))
    assert np.abs(np.array(rows) - embedding.get_text_embedding_batch(captions)).max() < 1e-6


def test_async_batches_are_batched(embedding, scenes, monkeypatch):
    calls = []
    monkeypatch.setattr(base, "embed", lambda model, texts, **k: calls.append(len(texts)) or np.zeros((len(texts), 3)))
    monkeypatch.setattr(base, "embed_images", base.embed)
    asyncio.run(embedding.aget_text_embedding_batch(["a"] * 7))
    asyncio.run(embedding.aget_image_embedding_batch(["a.png"] * 7))
    assert sorted(calls) == [2, 2, 5, 5]


@pytest.mark.parametrize("kind", ["query", "text", "image", "text_batch", "image_batch"])
def test_the_loop_and_its_threads_stay_free(embedding, monkeypatch, kind):
    """While an embedding computes, the loop goes on, and others get one of its threads, however many wait."""
    started, go_on = threading.Event(), threading.Event()

    def slow(model, inputs, **kwargs):
        started.set()
        stuck = not go_on.wait(10)
        go_on.set()  # one that waited in vain is enough
        assert not stuck, "the loop was not free to go on"
        return np.zeros((len(inputs), 3), np.float32)

    monkeypatch.setattr(base, "embed", slow)
    monkeypatch.setattr(base, "embed_images", slow)

    async def watch():
        call = getattr(embedding, f"aget_{kind}_embedding".replace("_batch_embedding", "_embedding_batch"))
        argument = ["a"] * 400 if kind.endswith("batch") else "a"
        waiting = [asyncio.create_task(call(argument)) for _ in range(40)]
        try:
            while not started.is_set():
                await asyncio.sleep(0.001)
            return await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5)
        finally:
            go_on.set()
            await asyncio.gather(*waiting)

    assert asyncio.run(watch()) == "free"
