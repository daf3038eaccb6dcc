"""What docs/limits.md says of Sentence Transformers itself: a host that changes makes the page wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MultipleNegativesRankingLoss,
)

from slq_embed import SLQEncoder, pretrained
from slq_embed.toy import render, sample_scenes


@pytest.fixture(scope="module")
def both() -> list[SentenceTransformer]:
    folder = pretrained("slq-tiny")
    return [SLQEncoder(folder, device="cpu"), SentenceTransformer(folder, device="cpu")]


def unusual(kind: str, picture: Image.Image) -> Image.Image:
    if kind == "transparent":
        pixels = np.asarray(picture.convert("RGBA")).copy()
        pixels[(pixels[..., :3] > 230).all(axis=-1)] = 0
        return Image.fromarray(pixels)
    if kind == "16 bits":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    return picture.rotate(90)


@pytest.mark.filterwarnings(
    "ignore:The image decoding:DeprecationWarning"
)  # of TorchVision, which the host opens files with
@pytest.mark.parametrize("kind", ["plain", "transparent", "16 bits", "turned"])
def test_unusual_images_are_read_otherwise_by_plain_sentence_transformers(both, tmp_path, kind):
    """8-bit RGB, as the page advises, is the same."""
    picture = render(sample_scenes(2, "test")[1]).convert("RGB")
    if kind != "plain":
        picture = unusual(kind, picture)
    (exif := Image.Exif())[0x0112] = 6
    picture.save(file := tmp_path / "image.png", **({"exif": exif} if kind == "turned" else {}))
    with Image.open(file) as opened:
        ours, theirs = (model.encode(opened) for model in both)
    if kind in ("plain", "transparent"):  # the host opens a file otherwise than it takes an image
        theirs = both[1].encode(str(file))
    assert (float(ours @ theirs) > 1 - 1e-5) == (kind == "plain")


@pytest.mark.parametrize("build", [AdaptiveLayerLoss, lambda *args: Matryoshka2dLoss(*args, [32, 16])])
def test_losses_over_layers_need_the_hosts_own_transformer(encoder, build):
    with pytest.raises(AssertionError):
        build(encoder, MultipleNegativesRankingLoss(encoder))


@pytest.mark.slow
def test_a_pool_counts_inputs_by_chunk(both):
    pool = both[0].start_multi_process_pool(["cpu"])
    try:
        with pytest.raises(Exception, match=r"^Input 0: an image of 7 bytes"):
            both[0].encode(["a", "b", {"image": b"damaged"}], pool=pool, chunk_size=2)
    finally:
        both[0].stop_multi_process_pool(pool)
