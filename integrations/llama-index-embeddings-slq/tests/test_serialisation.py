"""What is written down of an embedding: how to load it again, and no weights and no secrets."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.embeddings.slq import SLQEmbedding

from slq_embed import pretrained

SECRET = "hf_thisIsSecret"


@pytest.fixture
def special() -> SLQEmbedding:
    return SLQEmbedding(
        pretrained("slq-tiny"),
        device="cpu",
        truncate_dim=64,
        normalize=False,
        query_instruction="ask.",
        text_instruction="keep.",
        embed_batch_size=3,
        model_kwargs={"dtype": torch.float32},
        token=SECRET,
    )


@pytest.mark.parametrize(
    "again",
    [
        lambda e: SLQEmbedding.from_dict(e.to_dict()),
        lambda e: SLQEmbedding.from_json(e.to_json()),
        lambda e: SLQEmbedding(**e.model_dump()),
        lambda e: pickle.loads(pickle.dumps(e)),
        lambda e: copy.copy(e),
        lambda e: copy.deepcopy(e),
        lambda e: e.model_copy(deep=True),
    ],
    ids=["dict", "json", "dump", "pickle", "copy", "deepcopy", "model_copy"],
)
def test_it_comes_back_the_same(special, again):
    restored = again(special)
    assert restored.to_dict() == special.to_dict()
    assert restored.get_query_embedding("a") == special.get_query_embedding("a")
    assert restored.get_text_embedding("a") == special.get_text_embedding("a")
    assert np.linalg.norm(restored.get_text_embedding("a")) < 0.99


def test_neither_weights_nor_secrets_are_written(special):
    pickled = pickle.dumps(special)
    assert len(pickled) < 2000
    for written in (special.to_json(), str(special.to_dict()), repr(special), str(vars(special)), str(pickled)):
        assert SECRET not in written
    with pytest.raises(ValueError, match="must not hold a token"):
        SLQEmbedding(pretrained("slq-tiny"), model_kwargs={"token": SECRET})
    with pytest.raises(ValueError, match="Load the model with SLQEncoder"):
        SLQEmbedding(pretrained("slq-tiny"), model_kwargs={"quantization_config": object()})


def test_copies_share_the_model(special):
    assert copy.deepcopy(special).encoder is special.encoder
    assert pickle.loads(pickle.dumps(copy.copy(special))).get_text_embedding("a") == special.get_text_embedding("a")


def test_a_model_in_memory_needs_a_name_to_come_back(encoder):
    nameless = SLQEmbedding(model=encoder, query_instruction="ask.")
    with pytest.raises(ValueError, match="pass its folder as model_name= as well"):
        pickle.dumps(nameless)
    with pytest.raises(ValueError, match="There is no model to load"):
        SLQEmbedding.from_dict(nameless.to_dict())
    again = SLQEmbedding.from_dict(nameless.to_dict(), model=encoder)
    assert (again.encoder, again.query_instruction) == (encoder, "ask.")
    other = encoder.with_queries(seed=1)
    assert again.model_name == nameless.model_name != SLQEmbedding(model=other).model_name, "caches go by it"
    assert SLQEmbedding.from_dict(nameless.to_dict(), model=other).model_name == SLQEmbedding(model=other).model_name
    named = SLQEmbedding(pretrained("slq-tiny"), model=encoder)
    again = pickle.loads(pickle.dumps(named))
    assert np.abs(np.array(again.get_text_embedding("a")) - named.get_text_embedding("a")).max() < 1e-6


def test_a_folder_may_have_any_name(encoder, tmp_path, monkeypatch):
    encoder.save_pretrained(tmp_path / "unknown-animals")
    monkeypatch.chdir(tmp_path)
    restored = pickle.loads(pickle.dumps(SLQEmbedding("unknown-animals")))
    assert restored.model_name == SLQEmbedding("unknown-animals", model=encoder).model_name == "unknown-animals"


def test_what_decides_loading_is_not_changed_afterwards(special):
    with pytest.raises(ValueError, match="frozen"):
        special.truncate_dim = 32
    special.embed_batch_size = 2


def test_a_cache_travels_with_a_pickle_and_callbacks_stay(special):
    special.embeddings_cache = SimpleKVStore()
    handler = LlamaDebugHandler(print_trace_on_end=False)
    handler.unpicklable = lambda: None
    special.callback_manager = CallbackManager([handler])
    expected = special.get_text_embedding("a")
    again = pickle.loads(pickle.dumps(special))
    assert again.embeddings_cache.get("a", collection="embeddings") is not None
    assert again.get_text_embedding("a") == expected
    assert again.callback_manager.handlers == []
