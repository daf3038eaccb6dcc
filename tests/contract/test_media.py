"""Several images, and videos, in one input: exact on every path, and the same in plain Sentence Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from jinja2 import TemplateError
from packaging.version import Version
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.inputs.rows import read_row
from slq_embed.prefix.features import select_rows
from slq_embed.prefix.keys import prefix_key
from tests.checkpoints import build
from tests.families import llava
from tests.families import qwen as families_qwen
from tests.families.building import write

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23")

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (8, 40, 48, 3), dtype=np.uint8)
SHORT = RNG.integers(0, 255, (6, 32, 40, 3), dtype=np.uint8)


def timed(frames: Any, fps: float = 2.0) -> dict[str, Any]:
    return {"array": frames, "video_metadata": {"fps": fps, "total_num_frames": len(frames)}}


KINDS = {"qwen3_vl": True, "qwen2_5_vl": True, "internvl": True, "fast_vlm": False, "llava_onevision": False}
"""Families, and whether videos of unequal length go together in one batch; FastVLM reads no videos at all."""


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, tmp_path_factory) -> SLQEncoder:
    name = request.param
    if name == "fast_vlm":
        pytest.importorskip("timm")
    folder: Path = tmp_path_factory.mktemp(name)
    folder = write(folder, llava.llava_onevision()) if name == "llava_onevision" else build(folder, name)
    return SLQEncoder.from_backbone(folder, num_queries=3, seed=0, device="cpu")


def several(images: list[Image.Image]) -> list[Any]:
    first, second, third, fourth = images
    return [
        "hello there",
        first,
        {"image": [first, second], "text": "now in blue"},
        {"image": [second, first]},
        {"text": "three", "image": [third, fourth, first]},
    ]


def videos(encoder: SLQEncoder, images: list[Image.Image]) -> list[Any]:
    """In the spellings of the host."""
    if not encoder.transformer.reader.reads_videos:
        return []
    other = SHORT if encoder.backbone.config.model_type != "llava_onevision" else FRAMES[::-1].copy()
    return [
        {"video": FRAMES},
        {"video": [Image.fromarray(frame) for frame in FRAMES], "text": "a video"},
        {"video": other, "text": "another"},
        {"text": "all", "video": FRAMES, "image": [images[0], images[1]]},
    ]


def values_and_gradient(module: Any, batches: list[list[Any]], run: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1))
    values, gradient = [], torch.zeros(())
    for batch in batches:
        states = run(module.preprocess(batch, keyed=False))
        vectors = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
        gradient = gradient + torch.autograd.grad((vectors @ weights).sum(), module.queries)[0]
        values.append(vectors.detach())
    return torch.cat(values), gradient


def test_the_prefix_path_is_exact_in_a_batch(encoder, images):
    module = encoder.transformer
    inputs = several(images) + videos(encoder, images)
    expected, gradient = values_and_gradient(module, [[one] for one in inputs], module.all_positions)
    apart = [(expected[a] - expected[b]).abs().max() for a in range(len(inputs)) for b in range(a)]
    assert min(apart) > 0.01, "the checkpoint must tell inputs apart, in the order of images too"
    for run in (lambda features: module.query_states(module.prefix(features)), module.query_states):
        found, own = values_and_gradient(module, [inputs[::-1]], run)
        assert (found.flip(0) - expected).abs().max() < 1e-6
        assert (own - gradient).norm() / gradient.norm() < 1e-5


def test_rows_are_cut_with_their_own_media(encoder, images):
    module = encoder.transformer
    inputs = several(images) + videos(encoder, images)
    features = module.preprocess(inputs, keyed=False)
    having = [bool(read_row(one).media) for one in inputs]
    pieces = features["media"].pieces.values()
    assert [any(counts) for counts in zip(*pieces, strict=True)] == having
    expected = encoder.encode(inputs)
    for chosen in ([2], [3, 0, 4, 2, 2], [0], list(range(5, len(inputs))) or [1]):
        cut = select_rows(features, chosen)
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(module.query_states(module.prefix(cut)).mean(dim=1), dim=-1)
        assert np.abs(vectors.numpy() - expected[chosen]).max() < 1e-5


def test_plain_sentence_transformers_gives_the_same(encoder, images, tmp_path):
    encoder.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert stock.supports("video") == encoder.supports("video") == encoder.transformer.reader.reads_videos
    inputs = several(images) + videos(encoder, images)
    if encoder.transformer.reader.reads_videos:
        # Messages, several videos, and what is known of the frames.
        content = [
            {"type": "video", "video": FRAMES},
            {"type": "image", "image": images[0]},
            {"type": "text", "text": "a"},
        ]
        chat = [{"role": "system", "content": "Look."}, {"role": "user", "content": content}]
        inputs += [chat, {"video": timed(FRAMES)}, timed(FRAMES), {"video": [FRAMES, FRAMES]}]
    ours = encoder.encode(inputs)
    alone = np.concatenate([stock.encode([one]) for one in inputs])
    assert np.abs(alone - ours).max() < 1e-5
    assert np.abs(stock.encode(inputs[:5]) - ours[:5]).max() < 1e-5
    assert np.abs(stock.encode(inputs[:5], prompt="Look.") - encoder.encode(inputs[:5], prompt="Look.")).max() < 1e-5
    spelled = {"images": inputs[2]["image"], "text": inputs[2]["text"]}
    assert np.abs(encoder.encode([spelled])[0] - ours[2]).max() < 1e-6
    assert np.abs(SLQEncoder(tmp_path, device="cpu").encode(inputs) - ours).max() < 1e-6


def test_a_chat_beside_other_inputs_is_read_or_refused(encoder, images, tmp_path):
    """Plain Sentence Transformers hides such a chat in a part of another, where no template looks for it."""
    encoder.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "a"}]}]
    (alone, _) = encoder.encode([chat, "b"])
    assert np.abs(alone - stock.encode([chat, chat])).max() < 1e-5
    for other in ("b", images[1], {"image": images[1], "text": "b"}):
        with pytest.raises(TemplateError, match="encode the chats in a call of their own"):
            stock.encode([chat, other])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_after_a_long_video_queries_stand_where_text_would(checkpoint, tmp_path, kind):
    """Its last frames have larger positions than the text behind it."""
    encoder = SLQEncoder.from_backbone(checkpoint(kind), num_queries=3, seed=0, device="cpu")
    encoder.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    inputs = [{"video": timed(np.concatenate([FRAMES] * 6), fps=1.0)}, {"video": timed(FRAMES, fps=0.1), "text": "a"}]
    expected = np.concatenate([stock.encode([one]) for one in inputs])
    assert np.abs(encoder.encode(inputs) - expected).max() < 1e-5
    encoder.prefix_store = PrefixStore()
    assert np.abs(encoder.encode(inputs) - expected).max() < 1e-5


def test_cached_losses_cut_them(encoder, images):
    """A chunk has the media of its rows, whatever they are."""
    inputs = several(images) + videos(encoder, images)
    columns = (inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :][: len(inputs) // 2])

    def gradient(loss: torch.nn.Module) -> torch.Tensor:
        encoder.queries.grad = None
        loss([encoder.preprocess(column) for column in columns], None).backward()
        return encoder.queries.grad.clone()

    encoder.train()
    try:
        plain = gradient(losses.MultipleNegativesRankingLoss(encoder))
        cached = gradient(losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=1))
    finally:
        encoder.eval()
        encoder.zero_grad()
    assert (plain - cached).norm() < 1e-4 * plain.norm()


def test_stored_prefixes_give_the_same(encoder, images):
    inputs = several(images) + videos(encoder, images)
    expected = encoder.encode(inputs)
    level = "vision" if encoder.backbone.config.model_type != "llava_onevision" else "keys_values"
    try:
        for store, own in ((PrefixStore(), inputs), (PrefixStore(level=level), inputs[:5])):
            encoder.prefix_store = store
            for _ in range(2):
                assert np.abs(encoder.encode(own) - expected[: len(own)]).max() < 1e-5
            assert store.counts.reused == store.counts.computed == len(own) - (store.level == "vision")
        if level == "vision" and len(inputs) > 5:
            with pytest.raises(ValueError, match=r"Input \d.*keeps none of videos.*level=\"keys_values\""):
                encoder.encode(inputs[5:])
    finally:
        encoder.prefix_store = None


@pytest.fixture
def qwen(checkpoint) -> SLQEncoder:
    return SLQEncoder.from_backbone(checkpoint(), num_queries=3, seed=0, device="cpu")


def test_sampling_as_the_host_spells_it(checkpoint, tmp_path):
    """A rate for a call, in both; a rate for an input, in ours, is the same."""
    for kind in ("qwen3_vl", "qwen2_5_vl"):
        encoder = SLQEncoder.from_backbone(checkpoint(kind), num_queries=3, seed=0, device="cpu")
        encoder.save_pretrained(tmp_path / kind)
        stock = SentenceTransformer(str(tmp_path / kind), device="cpu")
        options = {"video": {"fps": 2, "do_sample_frames": True}}
        inputs = [{"video": timed(FRAMES, 4.0), "text": "t"}, {"video": timed(SHORT, 4.0)}]
        expected = np.concatenate([stock.encode([one], processing_kwargs=options) for one in inputs])
        assert np.abs(encoder.encode(inputs, processing_kwargs=options) - expected).max() < 1e-5
        assert np.abs(encoder.encode([{**one, "fps": 2} for one in inputs]) - expected).max() < 1e-5
        assert np.abs(encoder.encode([{**inputs[0], "fps": 4}])[0] - expected[0]).max() > 1e-3
        # Frames that were chosen, with what is known of them, as the host takes them.
        bounded = {**inputs[0], "max_frames": 2}
        (video,) = read_row(bounded).videos
        frames, metadata = video.sample(encoder.processor.video_processor, {})
        assert len(frames) == 2
        kept = {"video": {"array": frames, "video_metadata": metadata}, "text": "t"}
        given = stock.encode([kept], processing_kwargs={"video": {"do_sample_frames": False}})
        assert np.abs(encoder.encode([bounded]) - given).max() < 1e-5
        assert np.abs(encoder.encode([kept]) - given).max() < 1e-5


def test_keys_tell_media_apart(qwen, images):
    qwen.prefix_store = PrefixStore()
    first, second = images[:2]
    inputs = [
        first,
        {"images": [first, first]},
        {"images": [first, second]},
        {"images": [second, first]},
        {"images": [first, second], "text": "t"},
        {"video": FRAMES},
        {"video": FRAMES[::-1]},
        {"video": FRAMES, "fps": 1},
        {"video": FRAMES, "max_frames": 2},
        {"video": timed(FRAMES)},
        {"video": FRAMES, "image": first},
    ]
    keys = qwen.transformer.prefix_keys(inputs)
    assert len(set(keys)) == len(inputs)
    qwen.processor.video_processor.fps = 1
    after = qwen.transformer.prefix_keys(inputs)
    assert after[:5] == keys[:5], "settings of videos do not change the keys of images"
    assert not set(after[5:]) & set(keys)
    assert prefix_key(read_row(first), "<chat>", b"space").hex() == "1dd0c7b58a49b8cc2fc654ade5fb2886", (
        "existing stores stay valid"
    )


def test_a_refused_input_is_named(qwen, checkpoint):
    with pytest.raises(ValueError, match=r"Input 1 of 2.*'images' of an input is an empty list"):
        qwen.preprocess(["a", {"images": []}])
    fast = SLQEncoder.from_backbone(checkpoint("internvl"), num_queries=3, seed=0, device="cpu")
    fast.processor.video_processor = None
    assert "video" not in fast.modalities
    with pytest.raises(ValueError, match=r"Input 0 of 1: There is a video, but this internvl reads no videos"):
        fast.preprocess([{"video": FRAMES}])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of processors, with NumPy 2
def test_a_family_that_reads_videos_wrongly_refuses_them(tmp_path):
    encoder = SLQEncoder.from_backbone(
        write(tmp_path / "glm", families_qwen.glm4v()), num_queries=3, seed=0, device="cpu"
    )
    encoder.save_pretrained(tmp_path / "slq")
    for model in (encoder, SentenceTransformer(str(tmp_path / "slq"), device="cpu")):
        assert not model.supports("video")
        with pytest.raises(ValueError, match=r"reads no videos|Modality 'video' is not supported"):
            model.encode([{"video": timed(FRAMES)}])


def test_a_chat_is_one_input(qwen, images):
    content = [{"type": "text", "text": "now in blue"}, {"type": "image", "image": images[0]}]
    chat = [{"role": "user", "content": content}]
    expected = qwen.encode({"image": images[0], "text": "now in blue"})
    assert np.abs(qwen.encode(chat) - expected).max() < 1e-6
    assert np.abs(qwen.encode([chat, "a"])[0] - expected).max() < 1e-6
    asked = [{"role": "system", "content": "find"}, {"role": "user", "content": "a"}]
    assert np.abs(qwen.encode(asked) - qwen.encode("a", prompt="find")).max() < 1e-6


def test_videos_of_unequal_length_are_refused_where_the_model_cannot_take_them(tmp_path):
    encoder = SLQEncoder.from_backbone(write(tmp_path, llava.llava_onevision()), num_queries=3, seed=0, device="cpu")
    inputs = [{"video": FRAMES}, {"video": SHORT}]
    with pytest.raises(ValueError, match=r"differ in how many frames.*batch_size=1"):
        encoder.encode(inputs)
    assert np.abs(encoder.encode(inputs, batch_size=1)[0] - encoder.encode(inputs[0])).max() < 1e-6


def test_training_takes_videos_and_several_images(qwen, images):
    inputs = [{"images": images[:2]}, {"video": FRAMES, "text": "t"}, "a"]
    qwen.train()
    embeddings = qwen(qwen.preprocess(inputs))["sentence_embedding"]
    (embeddings[0] @ embeddings[1]).backward()
    assert qwen.queries.grad.norm() > 0
