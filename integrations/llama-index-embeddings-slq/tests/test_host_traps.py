"""What the README warns of is so in this host, and what it advises helps; a cache does not mix queries with texts."""

from __future__ import annotations

import asyncio
import importlib.util

import faiss
import numpy as np
import pytest
from llama_index.core import StorageContext
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import ImageNode, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.slq import SLQEmbedding, base
from llama_index.vector_stores.faiss import FaissMapVectorStore, FaissVectorStore


def index_of(nodes, embedding, **kwargs) -> MultiModalVectorStoreIndex:
    return MultiModalVectorStoreIndex(nodes, embed_model=embedding, image_embed_model=embedding, **kwargs)


@pytest.mark.skipif(importlib.util.find_spec("llama_index.embeddings.clip") is not None, reason="CLIP is there")
def test_the_image_embedding_must_be_named(embedding, nodes):
    with pytest.raises(ImportError, match="clip"):
        MultiModalVectorStoreIndex(nodes, embed_model=embedding)


def test_an_image_without_text_and_metadata_is_dropped(embedding, scenes):
    bare = ImageNode(image_path=str(scenes[0].picture))
    described = ImageNode(image_path=str(scenes[1].picture), metadata={"scene": 1})
    index = index_of([bare, described], embedding)
    results = index.as_retriever(image_similarity_top_k=2).text_to_image_retrieve(scenes[0].caption)
    assert [row.node.node_id for row in results] == [described.node_id]


def test_adding_one_kind_hides_the_other_and_a_new_object_finds_both(embedding, scenes):
    def found(index, retriever=None) -> set[str]:
        retriever = retriever or index.as_retriever(similarity_top_k=9, image_similarity_top_k=9)
        return {row.node.node_id for row in retriever.retrieve("a")}

    def image(number: int) -> ImageNode:
        return ImageNode(image_path=str(scenes[number].picture), metadata={"scene": number}, id_=f"image {number}")

    index = index_of([image(0), TextNode(text="a", id_="text 0")], embedding)
    assert found(index) == {"image 0", "text 0"}
    index.insert_nodes([image(1)])
    assert found(index) == {"image 0", "image 1"}
    index.insert_nodes([TextNode(text="b", id_="text 1")])
    assert found(index) == set()
    index = index_of(None, embedding, index_struct=index.index_struct, storage_context=index.storage_context)
    assert found(index) == {"image 0", "image 1", "text 0", "text 1"}
    earlier = index.as_retriever(similarity_top_k=9, image_similarity_top_k=9)
    index.insert_nodes([image(2), TextNode(text="c", id_="text 2")])
    assert found(index) - found(index, earlier) == {"image 2", "text 2"}


def test_deleted_images_stay_in_their_store(embedding, scenes):
    image = ImageNode(image_path=str(scenes[0].picture), metadata={"scene": 0}, id_="image")
    index = index_of([image, TextNode(text="a", id_="text")], embedding)
    index.delete_nodes(["image", "text"])
    assert [row.node.node_id for row in index.as_retriever().retrieve("a")] == ["image"]
    index.image_vector_store.delete_nodes(["image"])
    assert index.as_retriever().retrieve("a") == []


def test_a_pipeline_embeds_the_metadata_of_an_image(embedding, scenes):
    image = ImageNode(image_path=str(scenes[0].picture), metadata={"file": "x"})
    (node,) = IngestionPipeline(transformations=[embedding]).run(nodes=[image])
    assert np.allclose(node.embedding, embedding.get_text_embedding("file: x"), atol=1e-5)
    assert not np.allclose(node.embedding, embedding.get_image_embedding(str(scenes[0].picture)), atol=1e-2)


def test_two_plain_faiss_stores_mix_up_their_nodes(embedding, nodes, scenes):
    def first_scenes(text, image) -> list:
        index = index_of(
            nodes, embedding, storage_context=StorageContext.from_defaults(vector_store=text, image_store=image)
        )
        retriever = index.as_retriever(similarity_top_k=1)
        return [retriever.text_retrieve(s.caption)[0].node for s in scenes]

    plain = first_scenes(*(FaissVectorStore(faiss.IndexFlatIP(192)) for _ in range(2)))
    assert any(isinstance(node, ImageNode) for node in plain), "texts were asked for"
    mapped = first_scenes(*(FaissMapVectorStore(faiss.IndexIDMap2(faiss.IndexFlatIP(192))) for _ in range(2)))
    assert not any(isinstance(node, ImageNode) for node in mapped)


def test_two_faiss_stores_in_one_folder_overwrite_each_other(embedding, nodes, tmp_path):
    text, image = (FaissMapVectorStore(faiss.IndexIDMap2(faiss.IndexFlatIP(192))) for _ in range(2))
    context = StorageContext.from_defaults(vector_store=text, image_store=image)
    index_of(nodes, embedding, storage_context=context)
    context.persist(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"default__vector_store.json", "image__vector_store.json", "id_map.json"} <= names
    again = FaissMapVectorStore.from_persist_path(str(tmp_path / "default__vector_store.json"))
    assert again._node_id_to_faiss_id_map != text._node_id_to_faiss_id_map


@pytest.fixture
def cached(encoder) -> SLQEmbedding:
    return SLQEmbedding(
        model=encoder, query_instruction="ask.", text_instruction="keep.", embeddings_cache=SimpleKVStore()
    )


@pytest.mark.parametrize("query_first", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
def test_a_cache_keeps_queries_apart_from_texts(cached, encoder, query_first, is_async, monkeypatch):
    def both() -> tuple:
        asked = {"query": None, "text": None}
        for kind in asked if query_first else reversed(asked):
            if is_async:
                asked[kind] = asyncio.run(getattr(cached, f"aget_{kind}_embedding")("a red circle"))
            else:
                asked[kind] = getattr(cached, f"get_{kind}_embedding")("a red circle")
        return asked["query"], asked["text"]

    first = both()
    expected = [encoder.encode("a red circle", prompt=prompt) for prompt in ("ask.", "keep.")]
    assert np.abs(np.array(first) - expected).max() < 1e-6
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    monkeypatch.setattr(base, "embed", None)  # nothing is computed again
    assert both() == first
    assert cached.get_text_embedding_batch(["a red circle"]) == [first[1]]
