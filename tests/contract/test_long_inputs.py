"""Backbones that compute a whole batch otherwise where one of its sequences is long: such an input is refused, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder
from tests.families import others
from tests.families.building import write

LONGEST, QUERIES = 200, 4
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LONGEST,
}
KINDS = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LONGEST}),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": LONGEST,
        },
    ),
}


@pytest.fixture(params=KINDS)
def encoder(request, tmp_path) -> SLQEncoder:
    kind, more = KINDS[request.param]
    folder = write(tmp_path, others.text_only(kind, **more))
    return SLQEncoder.from_backbone(folder, num_queries=QUERIES, seed=0, device="cpu")


def length_of(encoder: SLQEncoder, text: Any) -> int:
    return int(encoder.preprocess([text])["attention_mask"].sum())


def test_the_longest_input_is_exact_and_the_next_one_is_refused(encoder):
    room = LONGEST - QUERIES
    longest = next("z" * n for n in range(100, 400) if length_of(encoder, "z" * n) == room)
    features = encoder.preprocess([longest])
    with torch.no_grad():
        prefix = encoder(dict(features))["sentence_embedding"]
        whole = encoder.transformer.all_positions(features).mean(dim=1)
    assert (prefix - torch.nn.functional.normalize(whole, dim=-1)).abs().max() < 1e-6
    with pytest.raises(
        ValueError, match=rf"Input (1 \(z+ a\)|0 of 2): It has {room + 1} tokens, but at most {room} beside the queries"
    ):
        encoder.encode(["short", longest + " a"])


def test_a_stream_goes_on_without_it(encoder):
    texts = ["short", "a red circle " * 100, "another one"]
    batches = list(encoder.encode_stream(texts))
    assert [skipped.index for batch in batches for skipped in batch.skipped] == [1]
    indices = [index for batch in batches for index in batch.indices]
    alone = np.stack([encoder.encode(texts[index]) for index in indices])
    assert np.abs(torch.cat([batch.embeddings for batch in batches]).numpy() - alone).max() < 1e-6


def test_plain_sentence_transformers_lets_it_change_the_others(encoder, tmp_path):
    """Why it is refused here."""
    encoder.save_pretrained(tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    together = plain.encode(["short", "a red circle " * 100])
    assert np.abs(together[0] - plain.encode("short")).max() > 0.01


def test_other_backbones_have_no_such_end(tmp_path):
    folder = write(tmp_path, others.text_only("llama", max_position_embeddings=LONGEST))
    encoder = SLQEncoder.from_backbone(folder, num_queries=QUERIES, seed=0, device="cpu")
    long = "a red circle " * 100
    together = encoder.encode(["short", long])
    assert np.abs(together[0] - encoder.encode("short")).max() < 1e-6
