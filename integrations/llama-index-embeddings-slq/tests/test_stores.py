"""Over each vector store, before and after it is persisted, words and pictures find the right picture first."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import faiss
import pytest
from chromadb.config import Settings as ChromaSettings
from llama_index.core import StorageContext, load_index_from_storage
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.schema import ImageNode
from llama_index.embeddings.slq import SLQEmbedding
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.faiss import FaissMapVectorStore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

NAMES = ("text", "image")
Index = MultiModalVectorStoreIndex
Build = Callable[[StorageContext], Index]


def both(embedding: SLQEmbedding) -> dict[str, Any]:
    return {"embed_model": embedding, "image_embed_model": embedding}


def simple(folder: Path, build: Build, embedding: SLQEmbedding) -> tuple[Index, Callable[[], Index]]:
    index = build(StorageContext.from_defaults())

    def reload() -> Index:
        index.storage_context.persist(folder)
        return load_index_from_storage(StorageContext.from_defaults(persist_dir=str(folder)), **both(embedding))

    return index, reload


def faiss_map(folder: Path, build: Build, embedding: SLQEmbedding) -> tuple[Index, Callable[[], Index]]:
    store = {name: FaissMapVectorStore(faiss.IndexIDMap2(faiss.IndexFlatIP(192))) for name in NAMES}
    index = build(StorageContext.from_defaults(vector_store=store["text"], image_store=store["image"]))

    def reload() -> Index:
        index.storage_context.persist(folder)
        for name in NAMES:
            store[name].persist(str(folder / name / "faiss.index"))
        text, image = (FaissMapVectorStore.from_persist_path(str(folder / name / "faiss.index")) for name in NAMES)
        context = StorageContext.from_defaults(persist_dir=str(folder), vector_stores={"default": text, "image": image})
        return load_index_from_storage(context, **both(embedding))

    return index, reload


def qdrant(folder: Path, build: Build, embedding: SLQEmbedding) -> tuple[Index, Callable[[], Index]]:
    client = QdrantClient(path=str(folder))
    text, image = (QdrantVectorStore(name, client=client) for name in NAMES)
    index = build(StorageContext.from_defaults(vector_store=text, image_store=image))

    def reload() -> Index:
        client.close()
        again = QdrantClient(path=str(folder))
        text, image = (QdrantVectorStore(name, client=again) for name in NAMES)
        return Index.from_vector_store(text, image_vector_store=image, **both(embedding))

    return index, reload


def chroma(folder: Path, build: Build, embedding: SLQEmbedding) -> tuple[Index, Callable[[], Index]]:
    def opened() -> list[ChromaVectorStore]:
        client = chromadb.PersistentClient(str(folder), ChromaSettings(anonymized_telemetry=False))
        return [ChromaVectorStore(client.get_or_create_collection(f"scenes-{name}")) for name in NAMES]

    text, image = opened()
    index = build(StorageContext.from_defaults(vector_store=text, image_store=image))

    def reload() -> Index:
        chromadb.api.client.SharedSystemClient.clear_system_cache()
        text, image = opened()
        return Index.from_vector_store(text, image_vector_store=image, **both(embedding))

    return index, reload


@pytest.mark.parametrize("store", [simple, faiss_map, qdrant, chroma], ids=lambda store: store.__name__)
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant:UserWarning")
def test_the_right_picture_comes_first(store, embedding, nodes, scenes, tmp_path):
    def build(context: StorageContext) -> Index:
        return Index(nodes, storage_context=context, **both(embedding))

    index, reload = store(tmp_path / "store", build, embedding)
    check(index, scenes)
    check(reload(), scenes)


def check(index: Index, scenes: list) -> None:
    retriever = index.as_retriever(similarity_top_k=2, image_similarity_top_k=3)

    def numbers(results: list) -> list[int]:
        return [row.node.metadata["scene"] for row in results]

    expected = [s.number for s in scenes]
    assert [numbers(retriever.text_to_image_retrieve(s.caption))[0] for s in scenes] == expected
    assert [numbers(retriever.image_to_image_retrieve(str(s.other)))[0] for s in scenes] == expected
    texts = [numbers(retriever.text_retrieve(s.caption))[0] for s in scenes]
    assert sum(first == number for first, number in zip(texts, expected, strict=True)) >= 11
    first = retriever.text_to_image_retrieve(scenes[0].caption)
    assert len(set(numbers(first))) == 3
    assert first[0].node.image_path == str(scenes[0].picture)
    assert first[0].score is not None
    mixed = numbers(retriever.retrieve(scenes[5].caption))
    assert len(mixed) == 5
    assert mixed[2] == 5, "two texts, then three images"


def test_the_async_ways_lead_there_too(embedding, nodes, scenes):
    async def search() -> list[list]:
        index = Index(nodes, use_async=True, **both(embedding))
        retriever = index.as_retriever(image_similarity_top_k=1)
        words = [await retriever.atext_to_image_retrieve(s.caption) for s in scenes]
        pictures = [await retriever.aimage_to_image_retrieve(str(s.other)) for s in scenes]
        return [[results[0].node.metadata["scene"] for results in searches] for searches in (words, pictures)]

    words, pictures = asyncio.run(search())
    assert words == pictures == [s.number for s in scenes]


def test_images_alone_and_as_base64(embedding, scenes, tmp_path):
    images = [
        ImageNode(image=base64.b64encode(s.picture.read_bytes()).decode(), metadata={"scene": s.number}) for s in scenes
    ]
    index = Index(images, **both(embedding))
    results = index.as_retriever(image_similarity_top_k=1).retrieve(scenes[7].caption)
    assert [row.node.metadata["scene"] for row in results] == [7]
