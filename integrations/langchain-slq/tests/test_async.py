"""The async forms: right vectors for many calls at once, and an event loop that stays free."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest
import torch
from slq_embed.backbone import lock_of


def test_many_calls_at_once_give_the_right_vectors(embeddings, gallery):
    async def all_at_once():
        return await asyncio.gather(
            *(embeddings.aembed_query(text) for text in gallery.texts),
            *(embeddings.aembed_image([path]) for path in gallery.paths),
            *(embeddings.aembed_images([path]) for path in gallery.others),
            *(embeddings.aembed_documents([text]) for text in gallery.texts),
            *(embeddings.aembed_inputs([both]) for both in gallery.composed),
        )

    results = asyncio.run(all_at_once())
    rows = np.array(results[:12] + [row for (row,) in results[12:]])
    expected = [embeddings.embed_query(text) for text in gallery.texts]
    expected += embeddings.embed_image(gallery.paths) + embeddings.embed_image(gallery.others)
    expected += embeddings.embed_documents(gallery.texts) + embeddings.embed_inputs(gallery.composed)
    assert np.abs(rows - expected).max() < 1e-5


def test_the_event_loop_stays_free(embeddings, gallery, monkeypatch):
    """While calls wait for the model, the loop ticks and its own executor answers others."""

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return np.zeros((1, 192), np.float32)

    monkeypatch.setattr("langchain_slq.embeddings.embed", slow)
    monkeypatch.setattr("langchain_slq.embeddings.embed_images", slow)

    async def run():
        both, path, text = gallery.composed[0], gallery.paths[0], gallery.texts[0]
        calls = [embeddings.aembed_query(text), embeddings.aembed_documents([text]), embeddings.aembed_image([path])]
        calls += [embeddings.aembed_images([path]), embeddings.aembed_inputs([both])]
        waiting = asyncio.gather(*calls)
        ticks = 0
        start = time.monotonic()
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert time.monotonic() - start >= 0.4
        return ticks

    assert asyncio.run(run()) > 20


def test_waiting_calls_leave_asyncios_own_executor_free(embeddings):
    """Else name look-ups of the same application would wait for the model too."""

    async def run():
        with lock_of(embeddings.encoder.backbone):  # the model is busy
            calls = [asyncio.ensure_future(embeddings.aembed_query("a star")) for _ in range(60)]
            await asyncio.sleep(0.05)
            answer = await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(None, lambda: "here"), 5)
            assert not any(call.done() for call in calls)
        rows = await asyncio.gather(*calls)
        return answer, len(rows)

    assert asyncio.run(run()) == ("here", 60)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_may_go_on(embeddings):
    """As a web server does that loads first and forks its workers after."""
    asyncio.run(embeddings.aembed_query("warm"))
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # OpenMP's threads did not survive either
        try:
            os._exit(len(asyncio.run(embeddings.aembed_query("warm"))) != 192)
        finally:
            os._exit(2)
    until = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 0)
