"""LangChain and LlamaIndex in one process: one model in memory, and the same embeddings."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from slq_embed import SLQEncoder, pretrained
from slq_embed.serving import shared_encoder
from slq_embed.toy import render, sample_scenes

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_both_share_one_model(tmp_path):
    langchain_slq = pytest.importorskip("langchain_slq")
    llama_index_slq = pytest.importorskip("llama_index.embeddings.slq")
    folder = pretrained("slq-tiny")
    one = langchain_slq.SLQEmbeddings(model=folder, device="cpu")
    other = llama_index_slq.SLQEmbedding(folder, device="cpu")
    assert one.encoder is other.encoder is shared_encoder(folder, device="cpu")
    mine = SLQEncoder(folder, device="cpu")
    assert langchain_slq.SLQEmbeddings(model=mine).encoder is llama_index_slq.SLQEmbedding(model=mine).encoder is mine
    path = tmp_path / "picture.png"
    render(sample_scenes(1, "test")[0]).save(path)
    embeddings: dict[str, list[float]] = {}
    calls = {
        "langchain query": lambda: one.embed_query("a red circle"),
        "llama query": lambda: other.get_query_embedding("a red circle"),
        "langchain image": lambda: one.embed_image([str(path)])[0],
        "llama image": lambda: other.get_image_embedding(str(path)),
    }
    threads = [threading.Thread(target=lambda n=n, c=c: embeddings.update({n: c()})) for n, c in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind in ("query", "image"):
        assert embeddings[f"langchain {kind}"] == pytest.approx(embeddings[f"llama {kind}"], abs=1e-6)
    assert np.abs(np.array(embeddings["langchain query"]) - mine.encode("a red circle")).max() < 1e-6
