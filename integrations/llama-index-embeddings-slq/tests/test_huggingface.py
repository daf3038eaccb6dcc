"""An SLQ folder in LlamaIndex's own HuggingFaceEmbedding: the same texts and pictures, within what it can do."""

from __future__ import annotations

import numpy as np
import pytest
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.embeddings.slq import SLQEmbedding

from slq_embed import SLQEncoder, pretrained


def same(rows, expected) -> bool:
    return np.abs(np.array(rows) - np.array(expected)).max() < 1e-5


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning")
def test_a_folder_works_in_the_hosts_own_class(embedding, scenes, tmp_path):
    stock = HuggingFaceEmbedding(pretrained("slq-tiny"), max_length=512, device="cpu", cache_folder=str(tmp_path))
    captions, pictures = [s.caption for s in scenes], [str(s.picture) for s in scenes]
    texts, images = stock.get_text_embedding_batch(captions), stock.get_image_embedding_batch(pictures)
    assert same(texts, embedding.get_text_embedding_batch(captions))
    assert same(images, embedding.get_image_embedding_batch(pictures))
    queries = [stock.get_query_embedding(caption) for caption in captions]
    assert (np.array(queries) @ np.array(images).T).argmax(1).tolist() == [s.number for s in scenes]


def test_its_saved_prompts_must_be_given_there_again(scenes, tmp_path):
    folder, text = tmp_path / "slq", scenes[0].caption
    prompts = {"query": "find this.", "document": "keep this."}
    SLQEncoder(pretrained("slq-tiny"), prompts=prompts, device="cpu").save_pretrained(folder)
    options = {"model_name": str(folder), "max_length": 512, "device": "cpu", "cache_folder": str(tmp_path)}
    ours, stock = SLQEmbedding(folder, device="cpu"), HuggingFaceEmbedding(**options)
    told = HuggingFaceEmbedding(**options, query_instruction="find this.", text_instruction="keep this.")
    for name in ("get_query_embedding", "get_text_embedding"):
        expected = getattr(ours, name)(text)
        assert not same(getattr(stock, name)(text), expected)
        assert same(getattr(told, name)(text), expected)
