"""Tools that take a Sentence Transformers model take an SLQ folder: nothing of this package is in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slq_embed import SLQEncoder, pretrained
from slq_embed.toy import captions, render, sample_scenes

MODEL = pretrained("slq-tiny")
SCENES = sample_scenes(12, "test")
TEXTS = [captions(scene)[0] for scene in SCENES]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, scene in enumerate(SCENES):
        render(scene, seed=number).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(SCENES))]


def test_chroma(pictures, tmp_path):
    chromadb = pytest.importorskip("chromadb")
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    client = chromadb.PersistentClient(str(tmp_path / "chroma"), settings=chromadb.Settings(anonymized_telemetry=False))
    function = SentenceTransformerEmbeddingFunction(model_name=MODEL)
    collection = client.create_collection("scenes", embedding_function=function)
    collection.add(ids=[str(n) for n in range(12)], documents=pictures)  # stock models open paths of pictures
    results = collection.query(query_texts=TEXTS, n_results=1)["ids"]
    assert sum(line == [str(n)] for n, line in enumerate(results)) >= 11
    assert collection.query(query_texts=pictures[3:4], n_results=1)["ids"] == [["3"]]


def test_lancedb(pictures, tmp_path):
    lancedb = pytest.importorskip("lancedb")
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    function = get_registry().get("sentence-transformers").create(name=MODEL)

    class Picture(LanceModel):
        path: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(str(tmp_path / "lance")).create_table("scenes", schema=Picture)
    table.add([{"path": path} for path in pictures])
    results = [table.search(text).limit(1).to_pydantic(Picture)[0].path for text in TEXTS]
    assert sum(path == picture for path, picture in zip(results, pictures, strict=True)) >= 11


def test_haystack(pictures):
    pytest.importorskip("haystack")
    pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    from haystack import Document
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders import sentence_transformers as embedders

    cpu = ComponentDevice.from_str("cpu")
    components = {
        name: getattr(embedders, f"SentenceTransformers{name}Embedder")(model=MODEL, device=cpu, progress_bar=False)
        for name in ("Text", "Document", "DocumentImage")
    }
    for embedder in components.values():
        embedder.warm_up()

    def first(store: InMemoryDocumentStore, query: str) -> str | None:
        embedding = components["Text"].run(text=query)["embedding"]
        return InMemoryEmbeddingRetriever(store, top_k=1).run(query_embedding=embedding)["documents"][0].content

    documents = [Document(content=text, meta={"file_path": path}) for text, path in zip(TEXTS, pictures, strict=True)]
    for name in ("Document", "DocumentImage"):
        store = InMemoryDocumentStore(embedding_similarity_function="cosine")
        store.write_documents(components[name].run(documents=documents)["documents"])
        assert sum(first(store, text) == text for text in TEXTS) >= 11, name
    assert Path(documents[0].meta["file_path"]).is_file()


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> str:
    model = SLQEncoder(MODEL, device="cpu")
    model.prompts = {"query": "find this", "document": "keep this"}
    model.save_pretrained(folder := str(tmp_path_factory.mktemp("prompted")))
    return folder


def vectors_of(tool: str, folder: str) -> tuple[list[float], list[float]]:
    """The vectors of one text, as a query and as a document."""
    if tool == "chroma":
        pytest.importorskip("chromadb")
        from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

        function = SentenceTransformerEmbeddingFunction(model_name=folder)
        return function.embed_query(TEXTS[:1])[0], function(TEXTS[:1])[0]
    if tool == "lancedb":
        pytest.importorskip("lancedb")
        from lancedb.embeddings import get_registry

        function = get_registry().get("sentence-transformers").create(name=folder)
        return function.compute_query_embeddings(TEXTS[0])[0], function.compute_source_embeddings(TEXTS[0])[0]
    pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.embedders import sentence_transformers as embedders

    names = [{"prompt_name": name} if tool == "haystack, told" else {} for name in ("query", "document")]
    cpu = {"model": folder, "device": ComponentDevice.from_str("cpu"), "progress_bar": False}
    query = embedders.SentenceTransformersTextEmbedder(**cpu, encode_kwargs=names[0])
    document = embedders.SentenceTransformersDocumentEmbedder(**cpu, encode_kwargs=names[1])
    query.warm_up()
    document.warm_up()
    return query.run(text=TEXTS[0])["embedding"], document.run([Document(content=TEXTS[0])])["documents"][0].embedding


@pytest.mark.parametrize("tool", ["chroma", "lancedb", "haystack", "haystack, told"])
def test_saved_prompts_of_queries_and_documents_are_used_only_where_they_are_named(prompted, tool):
    given, model = vectors_of(tool, prompted), SLQEncoder(prompted, device="cpu")
    if tool == "haystack, told":
        expected = model.encode_query(TEXTS[0]), model.encode_document(TEXTS[0])
    else:
        expected = model.encode(TEXTS[0]), model.encode(TEXTS[0])
        assert np.abs(np.asarray(given[0]) - model.encode_query(TEXTS[0])).max() > 0.01
    for vector, other in zip(given, expected, strict=True):
        assert np.abs(np.asarray(vector) - other).max() < 1e-6
