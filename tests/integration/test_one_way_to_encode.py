"""Everything that embeds gives the same vectors: with prompts, shorter embeddings, kept prefixes and too little memory."""

from __future__ import annotations

import builtins
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.backbone import lock_of
from slq_embed.index import EmbeddingIndex
from slq_embed.serving import embed, embed_images

BATCH = 5
TEXTS = ["a red circle", "two green stars and a heart " * 6, "", "blue", "a long text about squares " * 3, "x"]
UNTRUNCATED = {"normalize_embeddings": True, "batch_size": BATCH, "show_progress_bar": False}


def prompt_name(model):
    """What ``encode_document`` would use; without one, methods that know no task use the model's default prompt."""
    return "document" if model.prompts["document"] else None


def by_encode(model, inputs, folder):
    return model.encode(inputs, prompt_name=prompt_name(model), **UNTRUNCATED)


def by_encode_document(model, inputs, folder):
    return model.encode_document(inputs, **UNTRUNCATED)


def by_query_sets(model, inputs, folder):
    return model.encode(inputs, query_sets={"own": model}, prompt_name=prompt_name(model), **UNTRUNCATED)["own"]


def by_stream(model, inputs, folder):
    rows = np.full((len(inputs), model.get_embedding_dimension()), np.nan)
    for batch in model.encode_stream(inputs, prompt_name=prompt_name(model), **UNTRUNCATED):
        rows[batch.indices] = batch.embeddings.numpy()
    return rows


def by_file(model, inputs, folder):
    file = model.encode_to_file(inputs, folder / "e.npy", prompt_name=prompt_name(model), **UNTRUNCATED)
    return file.embeddings


def by_embed(model, inputs, folder):
    return embed(model, inputs, task="document", batch_size=BATCH)


def by_index(model, inputs, folder):
    index = EmbeddingIndex(model)
    assert index.add(inputs, ids=map(str, range(len(inputs))), batch_size=BATCH) == []
    rows = np.zeros((len(inputs), index.dimension))
    for number, hits in enumerate(index.search_embeddings(np.eye(index.dimension), k=len(inputs))):
        for hit in hits:  # the inner product with a unit vector is one number of the embedding
            rows[int(hit.id), number] = hit.score
    return rows


def in_two_parts(texts, images, inputs):
    """Frameworks have one method for texts and another for images."""
    rows = [None] * len(inputs)
    for kind, method, name in ((str, texts, str), (Path, images, str)):
        indices = [n for n, value in enumerate(inputs) if isinstance(value, kind)]
        for index, row in zip(indices, method([name(inputs[n]) for n in indices]), strict=True):
            rows[index] = row
    return np.array(rows)


def by_embed_images(model, inputs, folder):
    def of(function):
        return lambda values: function(model, values, task="document", batch_size=BATCH)

    return in_two_parts(of(embed), of(embed_images), inputs)


def by_langchain(model, inputs, folder):
    langchain_slq = pytest.importorskip("langchain_slq")
    embeddings = langchain_slq.SLQEmbeddings(model=model, batch_size=BATCH)
    return in_two_parts(embeddings.embed_documents, embeddings.embed_image, inputs)


def by_llama_index(model, inputs, folder):
    slq = pytest.importorskip("llama_index.embeddings.slq")
    embedding = slq.SLQEmbedding(model=model, embed_batch_size=BATCH)
    return in_two_parts(embedding.get_text_embedding_batch, embedding.get_image_embedding_batch, inputs)


WITHOUT_TASK = [by_encode, by_query_sets, by_stream, by_file]
OF_DOCUMENTS = [by_encode_document, by_embed, by_embed_images, by_index, by_langchain, by_llama_index]


def document_prompt(model, patch):
    model.prompts["document"] = "A document."


def default_prompt(model, patch):
    model.prompts["all"] = "Everything."
    model.default_prompt_name = "all"


def shorter(model, patch):
    model.truncate_dim = 8


def kept_prefixes(model, patch):
    model.prefix_store = PrefixStore()


def little_memory(model, patch):
    """No more than two inputs fit."""
    forward, query_states = model.forward, model.transformer.query_states

    def limited(run):
        def call(value, **kwargs):
            if len(value["input_ids"] if isinstance(value, dict) else value.attention_mask) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return run(value, **kwargs)

        return call

    patch.setattr(model, "forward", limited(forward))
    patch.setattr(model.transformer, "query_states", limited(query_states))


def everything(model, patch):
    for change in (document_prompt, default_prompt, shorter, kept_prefixes, little_memory):
        change(model, patch)


CHANGES = [None, document_prompt, default_prompt, shorter, kept_prefixes, little_memory, everything]
EXPECTED_PROMPT = {document_prompt: "A document.", everything: "A document.", default_prompt: "Everything."}
"""The host's prompt for documents is "" by default, and holds: the default prompt is for calls without a task."""


@pytest.fixture(scope="module")
def inputs(images, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    paths = [folder / f"{number}.png" for number in range(len(images))]
    return [value for pair in zip(TEXTS, paths, strict=False) for value in pair] + TEXTS[len(paths) :]


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", "plain"))
@pytest.mark.parametrize("way", WITHOUT_TASK + OF_DOCUMENTS, ids=lambda way: way.__name__)
def test_all_ways_give_the_same_vectors(backbone, inputs, way, change, tmp_path, monkeypatch):
    """The same as each input alone through the modules, with the prompt given by hand."""
    if (
        way in (by_encode, by_encode_document)
        and change in (little_memory, everything)
        and not hasattr(SentenceTransformer, "_inference")
    ):
        pytest.skip("encode has no smaller batches before sentence-transformers 6.2")
    model = backbone.with_queries(4, seed=0)
    prompt = None if way in OF_DOCUMENTS and change is default_prompt else EXPECTED_PROMPT.get(change)
    with torch.no_grad():
        alone = [model(model.preprocess([value], prompt=prompt))["sentence_embedding"][0].numpy() for value in inputs]
    expected = np.array(alone)
    if change in (shorter, everything):
        expected = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    if change is not None:
        change(model, monkeypatch)
    rows = way(model, inputs, tmp_path)
    assert rows.shape == expected.shape
    assert np.abs(rows - expected).max() < 1e-6


def test_prompts_move_the_vectors(backbone):
    """Else the table above would prove nothing of prompts."""
    vectors = [backbone.encode("a red circle", prompt=prompt) for prompt in (None, *EXPECTED_PROMPT.values())]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert np.abs(vectors[1] - vectors[-1]).max() > 0.01


def test_no_prompt_is_not_the_default_prompt_in_a_file(backbone, inputs, tmp_path):
    encoder = backbone.with_queries(4, seed=0)
    encoder.prompts, encoder.default_prompt_name = {"query": "Find it."}, "query"
    found = {
        prompt: encoder.encode_to_file(inputs, tmp_path / f"e-{prompt}.npy", prompt=prompt) for prompt in (None, "")
    }
    for prompt, file in found.items():
        assert np.abs(file.embeddings - encoder.encode(inputs, prompt=prompt)).max() < 1e-6
    assert np.abs(found[None].embeddings - found[""].embeddings).max() > 1e-3


def test_what_encode_kept_is_forgotten(backbone, inputs):
    model = backbone.with_queries(4, seed=0)
    default_prompt(model, None)
    kept_prefixes(model, None)
    model.encode(inputs)
    assert len(model.prefix_store) == len(inputs)
    assert model.forget(inputs) == len(inputs)
    assert len(model.prefix_store) == 0


def test_a_batch_that_does_not_fit_is_halved_once(backbone, inputs, monkeypatch, caplog):
    model = backbone.with_queries(4, seed=0)
    sizes, forward = [], model.forward

    def limited(features):
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(features)

    monkeypatch.setattr(model, "forward", limited)
    with caplog.at_level(logging.WARNING):
        list(model.encode_stream(inputs, batch_size=BATCH))
    assert sizes == [5, 2, 2, 1, 2, 2, 1], "the second batch is not tried whole"
    assert caplog.text.count("going on with 2 at a time") == 1
    model.num_workers = 1
    sizes.clear()
    list(model.encode_stream(inputs, batch_size=BATCH))
    assert sizes == [5, 2, 2, 1, 2, 2, 1]
    monkeypatch.setattr(model, "forward", lambda features: limited({"input_ids": range(9)}))
    with pytest.raises(RuntimeError, match=r"One input alone does not fit into memory .*smaller max_pixels"):
        model.encode(inputs)


def test_the_lock_is_free_while_inputs_are_awaited(backbone):
    model = backbone.with_queries(4, seed=0)
    free = []

    def is_free() -> bool:
        return not lock_of(model.backbone)._lock.locked()

    def slow_inputs():
        for text in TEXTS:
            free.append(is_free())
            yield text

    held = []
    forward = model.forward
    model.forward = lambda features: (held.append(not is_free()), forward(features))[1]
    list(model.encode_stream(slow_inputs(), batch_size=2))
    assert free == [True] * len(TEXTS)
    assert held == [True] * 3


def test_an_image_file_is_opened_once(backbone, inputs, monkeypatch):
    paths = [value for value in inputs if isinstance(value, Path)]
    opened = []

    def counting(open_file):
        def call(file, *args, **kwargs):
            if str(file) in map(str, paths):
                opened.append(Path(file))
            return open_file(file, *args, **kwargs)

        return call

    monkeypatch.setattr("builtins.open", counting(builtins.open))  # Pillow's
    monkeypatch.setattr("io.open", counting(io.open))  # pathlib's
    model = backbone.with_queries(4, seed=0)
    for store in (None, PrefixStore()):
        monkeypatch.setattr(model.transformer.source, "store", store)
        opened.clear()
        list(model.encode_stream(paths, batch_size=2))
        assert sorted(opened) == sorted(paths)
        opened.clear()
        model.preprocess(paths)
        assert sorted(opened) == sorted(paths)


@pytest.mark.parametrize("keyed", [False, True])
def test_a_text_is_rendered_and_tokenised_once(backbone, monkeypatch, keyed):
    model = backbone.with_queries(4, seed=0)
    processor = model.processor
    rendered, tokenised = [], []
    render, tokenise = processor.apply_chat_template, type(processor.tokenizer).__call__

    def counting_render(chats, **kwargs):
        rendered.extend(chats)
        return render(chats, **kwargs)

    def counting_tokenise(tokenizer, text, **kwargs):
        tokenised.extend([text] if isinstance(text, str) else text)
        return tokenise(tokenizer, text, **kwargs)

    monkeypatch.setattr(processor, "apply_chat_template", counting_render)
    monkeypatch.setattr(type(processor.tokenizer), "__call__", counting_tokenise)
    model.transformer.preprocess(["a", "b", "c"], keyed=keyed)
    assert (len(rendered), len(tokenised)) == (3, 3)
