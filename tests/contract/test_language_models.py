"""Every language model of transformers that a tiny one can be made of: exact here and in plain Sentence Transformers, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder
from slq_embed.backbone import check
from slq_embed.backbone.families import load_backbone, load_processor
from tests.families.building import write
from tests.families.language_models import PREFIX, REFUSED, WHOLE, language_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23"),
]
TEXTS = ["hello", "a much longer text about red circles, blue squares and everything else that there is", ""]


@pytest.mark.parametrize("kind", [*PREFIX, *WHOLE])
def test_it_is_exact_alone_in_a_batch_and_in_plain_sentence_transformers(kind, tmp_path):
    folder = write(tmp_path / "backbone", language_model(kind))
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, seed=0, device="cpu")
    assert encoder.transformer.schedule == ("prefix" if kind in PREFIX else "all_positions")
    expected = encoder.encode(TEXTS)
    found = {"alone": np.stack([encoder.encode(text) for text in TEXTS])}
    for form in ("adapter", "merged"):
        encoder.save_pretrained(tmp_path / form, form=form)
        found[form] = SentenceTransformer(str(tmp_path / form), device="cpu").encode(TEXTS)
    apart = {name: float(np.abs(vectors - expected).max()) for name, vectors in found.items()}
    assert all(difference <= 1e-5 for difference in apart.values()), apart


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_the_reason(kind, tmp_path):
    folder = str(write(tmp_path, language_model(kind)))
    report = check(load_backbone(folder), load_processor(folder))
    assert report.schedule is None
    assert REFUSED[kind] in str(report.reason)
