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
from slq_embed.generation import answer, build_reranker
from slq_embed.toy import render, sample_scenes
from tests.families import FAMILIES
from tests.families.building import write


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
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of a processor, with NumPy 2
@pytest.mark.parametrize("family", ["phi4_multimodal", "paligemma", "llama4"])
def test_processors_that_stand_in_the_way_of_reranking(tmp_path, images, family):
    backbone = write(tmp_path, FAMILIES[family][1]())
    encoder = SLQEncoder.from_backbone(backbone, num_queries=2, seed=0, device="cpu")
    reranker = build_reranker(encoder, true_token="a", false_token="b")
    sizes = [(50, 40), (64, 120), (200, 32), (64, 64)]
    pairs = [("a", images[0].resize(size)) for size in sizes]
    if family == "phi4_multimodal":
        alone = np.array([reranker.predict(pair) for pair in pairs])
        assert np.abs(reranker.predict(pairs, batch_size=1) - alone).max() < 1e-5
        assert np.abs(reranker.predict(pairs) - alone).max() > 1e-3
    elif family == "paligemma":
        with pytest.raises(ValueError, match="to match target batch_size"):
            reranker.predict(pairs[0])
        assert isinstance(answer(encoder, "what?", images[0], max_new_tokens=2), str)
        with pytest.raises(ValueError, match="`images` are expected"):
            answer(encoder, "what?", "a text")
    else:
        assert np.isfinite(reranker.predict(("a", "b")))
        with pytest.raises(RuntimeError, match="Float but found BFloat16"):
            reranker.predict(pairs[0])


@pytest.mark.slow
def test_a_pool_counts_inputs_by_chunk(both):
    pool = both[0].start_multi_process_pool(["cpu"])
    try:
        with pytest.raises(Exception, match=r"^Input 0: an image of 7 bytes"):
            both[0].encode(["a", "b", {"image": b"damaged"}], pool=pool, chunk_size=2)
    finally:
        both[0].stop_multi_process_pool(pool)
