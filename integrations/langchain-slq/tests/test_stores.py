"""Stores that run in this process: the right picture comes first for texts, images, and images with texts."""

from __future__ import annotations

import numpy as np
import pytest

# Warnings of the stores themselves; ours stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_chroma(embeddings, gallery, check_retrieval):
    from langchain_chroma import Chroma

    store = Chroma("scenes", embeddings)
    store.add_images(gallery.paths, metadatas=[{"name": name} for name in gallery.names])
    check_retrieval(store, lambda document: document.metadata["name"])
    for path, name in zip(gallery.others, gallery.names, strict=True):
        assert store.similarity_search_by_image(path, k=1)[0].metadata["name"] == name


def test_faiss(embeddings, gallery, check_retrieval):
    from langchain_community.vectorstores import FAISS

    pairs = zip(gallery.paths, embeddings.embed_image(gallery.paths), strict=True)
    store = FAISS.from_embeddings(pairs, embeddings, metadatas=[{"name": name} for name in gallery.names])
    check_retrieval(store, lambda document: document.metadata["name"])


def test_lancedb(embeddings, gallery, check_retrieval, tmp_path):
    from langchain_community.vectorstores import LanceDB

    store = LanceDB(uri=str(tmp_path), embedding=embeddings)
    store.add_images(gallery.paths, metadatas=[{"name": name} for name in gallery.names])
    check_retrieval(store, lambda document: document.metadata["name"])


def test_milvus_lite(embeddings, gallery, check_retrieval, tmp_path):
    from langchain_milvus import Milvus

    # The file has its own server process, reached through a socket of gRPC.
    store = Milvus(
        embeddings,
        connection_args={"uri": str(tmp_path / "milvus.db")},
        index_params={"index_type": "FLAT", "metric_type": "COSINE"},
    )
    rows = embeddings.embed_image(gallery.paths)
    store.add_embeddings(gallery.paths, rows, metadatas=[{"name": name} for name in gallery.names], ids=gallery.names)
    check_retrieval(store, lambda document: document.metadata["name"])


def test_qdrant(embeddings, gallery, check_retrieval):
    from langchain_qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient
    from qdrant_client.models import Distance, PointStruct, VectorParams

    client = QdrantClient(":memory:")
    client.create_collection("scenes", vectors_config=VectorParams(size=192, distance=Distance.COSINE))
    payloads = [{"page_content": path, "metadata": {"name": n}} for n, path in enumerate(gallery.paths)]
    rows = embeddings.embed_image(gallery.paths)
    points = [PointStruct(id=n, vector=row, payload=payloads[n]) for n, row in enumerate(rows)]
    client.upsert("scenes", points)
    store = QdrantVectorStore(client, "scenes", embeddings)
    check_retrieval(store, lambda document: str(document.metadata["name"]))


def test_a_saved_folder_works_without_this_package(embeddings, gallery):
    """LangChain's class for Sentence Transformers takes an SLQ folder as it is, for texts."""
    huggingface = pytest.importorskip("langchain_huggingface")
    other = huggingface.HuggingFaceEmbeddings(model_name=embeddings.model, model_kwargs={"device": "cpu"})
    rows = np.array(other.embed_documents(gallery.texts))
    assert np.abs(rows - embeddings.embed_documents(gallery.texts)).max() < 1e-5
