"""Positions of the tokens of a batch: each row has those that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from slq_embed import SLQEncoder
from slq_embed.prefix.features import lay_out
from slq_embed.prefix.passes import last_positions, token_positions
from tests.families import newer
from tests.families.building import write

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("hunyuan_vl"), newer.hunyuan_vl())


def positions_of(folder: Path, *inputs: Any) -> torch.Tensor:
    module = SLQEncoder.from_backbone(folder, num_queries=2, seed=0, device="cpu").transformer
    return token_positions(module.query_decoder, lay_out(module.preprocess(list(inputs), keyed=False)))


def test_a_row_does_not_count_the_images_of_the_rows_before(folder):
    """HunYuan-VL's model does: the image of the second row would be its second."""
    images = [Image.fromarray(np.full((size, 48, 3), 9, dtype=np.uint8)) for size in (32, 48)]
    together = positions_of(folder, *images, "a red circle")
    for row, image in enumerate(images):
        alone = positions_of(folder, image)
        assert torch.equal(together[:, row : row + 1, -alone.shape[2] :], alone)
        assert len(alone[:2].unique(dim=0)) == 2  # the width of an image is not its place in the sequence


def test_texts_have_as_many_axes_as_images(folder):
    positions = positions_of(folder, "a red circle", "two")
    assert positions.shape[:2] == (4, 2)
    assert positions[:, 0].unique(dim=0).shape[0] == 1
    assert last_positions(positions).tolist()[0] == positions.shape[2] - 1
