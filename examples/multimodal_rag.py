"""Retrieve pictures, rerank them, and answer from the best one: one backbone, offline, in three forms.

    python examples/multimodal_rag.py ["a red circle"] [--framework slq langchain llama-index]

The same encoder serves slq_embed's own index, LangChain (with Chroma) and LlamaIndex: one copy of the weights retrieves,
reranks and answers. Hardware: 2 CPU cores, under a minute. Expected output: for each framework the pictures that
were retrieved and how sure the backbone is that they match, and its description of the best one, beside the true one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from transformers import AutoProcessor

from slq_embed import SLQEncoder, pretrained
from slq_embed.generation import answer, build_reranker
from slq_embed.index import EmbeddingIndex
from slq_embed.toy import captions, render, sample_scenes

CANDIDATES = 8
Search = Callable[[str], list[Path]]


def with_slq(model: SLQEncoder, pictures: list[Path]) -> Search:
    index = EmbeddingIndex(model)
    index.add(pictures)
    return lambda query: [Path(hit.metadata["path"]) for hit in index.search(query, k=CANDIDATES)]


def with_langchain(model: SLQEncoder, pictures: list[Path]) -> Search:
    from langchain_chroma import Chroma
    from langchain_slq import SLQEmbeddings

    store = Chroma("multimodal-rag", SLQEmbeddings(model=model), collection_metadata={"hnsw:space": "cosine"})
    store.add_images([str(path) for path in pictures], metadatas=[{"path": str(path)} for path in pictures])
    retriever = store.as_retriever(search_kwargs={"k": CANDIDATES})
    return lambda query: [Path(document.metadata["path"]) for document in retriever.invoke(query)]


def with_llama_index(model: SLQEncoder, pictures: list[Path]) -> Search:
    from llama_index.core.indices import MultiModalVectorStoreIndex
    from llama_index.core.schema import ImageNode
    from llama_index.embeddings.slq import SLQEmbedding

    embedding = SLQEmbedding(model=model)
    nodes = [ImageNode(image_path=str(path), metadata={"path": str(path)}) for path in pictures]
    index = MultiModalVectorStoreIndex(nodes, embed_model=embedding, image_embed_model=embedding)
    retriever = index.as_retriever(image_similarity_top_k=CANDIDATES)
    return lambda query: [Path(n.node.metadata["path"]) for n in retriever.text_to_image_retrieve(query)]


FRAMEWORKS = {"slq": with_slq, "langchain": with_langchain, "llama-index": with_llama_index}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "query", nargs="?", default="a red circle", help="a shape, as the toy backbone knows it (default: %(default)s)"
    )
    parser.add_argument("--framework", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS), help="by default all")
    parser.add_argument(
        "--pictures",
        type=Path,
        default=Path("rag-pictures"),
        help="folder of pictures, which is made (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    scenes = sample_scenes(200, "test")
    args.pictures.mkdir(parents=True, exist_ok=True)
    pictures = [args.pictures / f"{number:03}.png" for number in range(len(scenes))]
    for path, scene in zip(pictures, scenes, strict=True):
        render(scene).save(path)

    model = SLQEncoder(pretrained("slq-tiny"))
    processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))
    reranker = build_reranker(model, instruction="{document}is there {query}?", processor=processor)
    for name in args.framework:
        candidates = FRAMEWORKS[name](model, pictures)(args.query)
        ranking = reranker.rank(args.query, candidates)
        print(f"{name}: {len(candidates)} pictures for {args.query!r}, by the log-odds of yes:")
        for row in ranking:
            picture = candidates[row["corpus_id"]]
            print(f"  {row['score']:6.1f}  {picture.name}  {captions(scenes[pictures.index(picture)])[0]}")
        best = candidates[ranking[0]["corpus_id"]]
        print(f"  the best shows: {answer(model, 'describe the image.', [best], processor=processor)}")


if __name__ == "__main__":
    main()
