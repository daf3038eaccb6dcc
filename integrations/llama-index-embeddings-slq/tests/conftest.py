from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small gain nothing from threads, and on a busy machine waiting threads cost them ten times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")

import torch
from llama_index.core.schema import BaseNode, ImageNode, TextNode
from llama_index.embeddings.slq import SLQEmbedding

from slq_embed import SLQEncoder, pretrained
from slq_embed.serving import shared_encoder
from slq_embed.toy import caption, implicit, render, sample_scenes


@dataclass(frozen=True)
class Shown:
    """A scene: two drawings of it, its caption, and words for it that share none with the caption."""

    number: int
    picture: Path
    other: Path
    caption: str
    implicit: str


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that handing its work to threads takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Shown]:
    folder = tmp_path_factory.mktemp("scenes with a blank")
    shown = []
    for number, scene in enumerate(sample_scenes(12, "test")):
        row = Shown(number, folder / f"{number}.png", folder / f"o{number}.png", caption(scene), implicit(scene))
        render(scene).save(row.picture)
        render(scene, seed=1).save(row.other)
        shown.append(row)
    return shown


@pytest.fixture(scope="session")
def encoder() -> SLQEncoder:
    return shared_encoder(pretrained("slq-tiny"), device="cpu")


@pytest.fixture
def embedding(encoder: SLQEncoder) -> SLQEmbedding:
    return SLQEmbedding(pretrained("slq-tiny"), device="cpu", embed_batch_size=5)


@pytest.fixture
def nodes(scenes: list[Shown]) -> list[BaseNode]:
    """An image and a text for each scene, each with its number as metadata."""
    rows: list[BaseNode] = []
    for scene in scenes:
        number = {"scene": scene.number}
        rows.append(ImageNode(image_path=str(scene.picture), metadata=number))
        rows.append(TextNode(text=scene.implicit, metadata=number, excluded_embed_metadata_keys=["scene"]))
    return rows
