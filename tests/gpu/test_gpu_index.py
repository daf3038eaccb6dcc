"""The search index on a GPU, where faiss-gpu is installed: the same results as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

faiss = pytest.importorskip("faiss")

from slq_embed.index import EmbeddingIndex  # noqa: E402 - it needs faiss
from tests.integration.test_index import names, vectors  # noqa: E402

ON_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no faiss-gpu, or no GPU")]


@pytest.mark.parametrize(("factory", "parameters"), [("Flat", ""), ("IVF16,Flat", "nprobe=8"), ("HNSW32,Flat", "")])
def test_a_gpu_finds_the_same(factory, parameters, tmp_path, monkeypatch):
    monkeypatch.setattr("slq_embed.index.faiss_types.LEAST_TO_LEARN_FROM", 500)
    both = [EmbeddingIndex(dimension=32, factory=factory, search_parameters=parameters, gpu=on) for on in (False, None)]
    found = []
    for number, index in enumerate(both):
        index.add_embeddings(vectors(2000), names(0, 2000))
        index.search_embeddings(vectors(5, seed=1), 5)
        index.delete(names(0, 300))
        index.add_embeddings(vectors(2000)[:10], names(0, 10))
        index.save(tmp_path / str(number))
        found.append(index.search_embeddings(vectors(50, seed=1), 10))
        assert EmbeddingIndex.load(tmp_path / str(number)).search_embeddings(vectors(50, seed=1), 10)
    if not factory.startswith("HNSW"):
        assert both[1]._table.vectors._gpu_copy is not None
    same = [len({h.id for h in a} & {h.id for h in b}) / 10 for a, b in zip(*found, strict=True)]
    assert np.mean(same) > 0.99
