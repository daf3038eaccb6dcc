"""Features of the vision tower that are kept and used again: checked by running, and refused with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.prefix import vision, vision_check
from slq_embed.prefix.vision_check import vision_refusal
from tests.families import llava, others, qwen
from tests.families.building import write

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="needs mm_encoder_outputs")


@pytest.fixture
def encoder(tmp_path) -> SLQEncoder:
    return SLQEncoder.from_backbone(write(tmp_path, llava.llava_next()), num_queries=3, seed=0, device="cpu")


@pytest.mark.parametrize("build", [llava.llava_next, others.gemma4, qwen.qwen3_5, qwen.kimi_k25])
def test_other_families_keep_them(build, images, tmp_path):
    """Gemma 4 and Kimi have keys and values of several shapes, so this is all that a store can keep of them."""
    encoder = SLQEncoder.from_backbone(write(tmp_path, build()), num_queries=3, seed=0, device="cpu")
    inputs: list[Any] = ["hello", images[0], {"image": images[1], "text": "a"}, {"image": [images[2], images[0]]}]
    expected = encoder.encode(inputs)
    encoder.prefix_store = PrefixStore(level="vision")
    for _ in range(2):
        assert np.abs(encoder.encode(inputs) - expected).max() < 1e-5
    assert (encoder.prefix_store.counts.computed, encoder.prefix_store.counts.reused) == (3, 3)


def test_known_families_are_not_run(checkpoint, monkeypatch):
    monkeypatch.setattr(vision_check, "run_vision", lambda *args: pytest.fail("it was run"))
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=3, device="cpu")
    assert vision_refusal(encoder.transformer) is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (others.llama, "it reads texts only"),
        (
            others.phi4_multimodal,
            r"this version of transformers cannot run it on them \(there is no mm_encoder_outputs\)",
        ),
        (llava.ovis2, "a run on them fails .*visual_indicator_features"),
    ],
)
def test_where_it_does_not_work_the_reason_is_said(build, reason, tmp_path):
    encoder = SLQEncoder.from_backbone(write(tmp_path, build()), num_queries=3, seed=0, device="cpu")
    message = rf'cannot be kept: {reason}.*Use PrefixStore\(level="keys_values"\)'
    with pytest.raises(ValueError, match=message):
        encoder.prefix_store = PrefixStore(level="vision")
    assert encoder.prefix_store is None


def test_a_model_is_checked_once(encoder, monkeypatch):
    runs: list[Any] = []
    run = vision_check.run_vision
    monkeypatch.setattr(vision_check, "run_vision", lambda *args: runs.append(args) or run(*args))
    for _ in range(2):
        encoder.prefix_store = PrefixStore(level="vision")
    assert len(runs) == 3


def test_features_that_are_wrong_are_found(encoder, monkeypatch):
    assert vision_refusal(encoder.transformer) is None
    run, join = vision.run_vision, vision.join_rows

    def scaled(*args: Any) -> Any:
        return [{**row, "features": row["features"] * 1.01} for row in run(*args)]

    def exchanged(rows: Any, pad_token: int) -> Any:
        features = [row["features"] for row in rows]
        return join([{**row, "features": part} for row, part in zip(rows, features[::-1], strict=True)], pad_token)

    monkeypatch.setattr(vision_check, "run_vision", scaled)
    assert vision_refusal(encoder.transformer) == "a run on them gives other embeddings"
    monkeypatch.setattr(vision_check, "run_vision", run)
    monkeypatch.setattr(vision_check, "join_rows", exchanged)
    assert vision_refusal(encoder.transformer) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason(dtype, tmp_path):
    folder = write(tmp_path, llava.llava_next())
    encoder = SLQEncoder.from_backbone(folder, num_queries=3, seed=0, device="cpu", dtype=dtype)
    assert vision_refusal(encoder.transformer) is None
