from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small gain nothing from threads, and on a busy machine waiting threads cost them ten times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from slq_embed import SLQEncoder
from tests.checkpoints import build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny checkpoint, built once for each set of arguments."""
    folders: dict[tuple, Path] = {}

    def get(kind: str = "qwen3_vl", **options) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in folders:
            folders[key] = build(tmp_path_factory.mktemp(kind), kind, **options)
        return folders[key]

    return get


@pytest.fixture
def encoder(checkpoint) -> SLQEncoder:
    """An untrained SLQ model on the tiny Qwen3-VL checkpoint, for one test."""
    return SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 50), (64, 32), (32, 32), (24, 48)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="session")
def mixed(images) -> list:
    """Texts, images and both, short and long."""
    return [
        "hello",
        "a much longer text about red circles, blue squares and everything else that there is",
        images[0],
        images[1],
        {"text": "now in blue", "image": images[0]},
        {"image": images[1], "text": "larger"},
    ]


if hasattr(os, "register_at_fork"):
    # Garbage of the parent stays in a child: what has threads, such as a database, would wait there for threads that only the parent has.
    os.register_at_fork(after_in_child=gc.freeze)


def pytest_collection_finish() -> None:
    """What was imported stays: a full garbage collection, of which each training does one, need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries report leaks when the process ends
