from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small gain nothing from threads, and on a busy machine waiting threads cost them ten times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ANONYMIZED_TELEMETRY"] = "False"  # Chroma's
os.environ["LANGSMITH_TRACING"] = "false"

from pathlib import Path
from types import SimpleNamespace

import pytest
from slq_embed import pretrained
from slq_embed.toy import Scene, Thing, caption, render

from langchain_slq import SLQEmbeddings

SCENES = [
    Scene("single", Thing(colour, shape), detail="big")
    for colour in ("red", "blue", "yellow")
    for shape in ("circle", "square", "star", "heart")
]


@pytest.fixture(scope="session")
def embeddings() -> SLQEmbeddings:
    return SLQEmbeddings(model=pretrained("slq-tiny"), device="cpu", batch_size=8)


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Pictures to be found; for each another picture of the same scene, a text, and both as a composed query."""
    folder = tmp_path_factory.mktemp("gallery")
    paths, others = [], []
    for n, scene in enumerate(SCENES):
        for seed, files in ((0, paths), (7, others)):
            path: Path = folder / f"{n}-{seed}.png"
            render(scene, seed).save(path)
            files.append(str(path))
    texts = [caption(scene) for scene in SCENES]
    composed = [{"image": path, "text": text} for path, text in zip(others, texts, strict=True)]
    return SimpleNamespace(
        paths=paths, others=others, texts=texts, composed=composed, names=[str(n) for n in range(12)]
    )


@pytest.fixture(scope="session")
def check_retrieval(embeddings, gallery):
    """Assert that a filled store finds the right picture first, for texts, images, and images with texts."""

    def check(store, name_of) -> None:
        def first(vector):
            return name_of(store.similarity_search_by_vector(vector, k=3)[0])

        names = [name_of(store.similarity_search(text, k=3)[0]) for text in gallery.texts]
        assert names == gallery.names
        assert [first(vector) for vector in embeddings.embed_image(gallery.others)] == gallery.names
        assert [first(vector) for vector in embeddings.embed_inputs(gallery.composed)] == gallery.names

    return check
