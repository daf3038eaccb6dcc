"""Which language models vLLM serves with the vectors of SLQEncoder: tiny models, in float32, on a CPU. Run by make test-vllm-families."""

from __future__ import annotations

from pathlib import Path

import pytest

from slq_embed import SLQEncoder
from slq_embed.saving import export_vllm
from tests.families.building import write
from tests.families.language_models import PREFIX, WHOLE, language_model
from tests.parts import trained
from tests.vllm.backbones import for_vllm
from tests.vllm.test_families import STEPS, TEXTS, Offline, offline, require_listed, require_ours

__all__ = ["offline"]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RIGHT = (
    *("apertus", "arcee", "bloom", "cohere", "cohere2", "cwm", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe"),
    *("flex_olmo", "gemma2", "glm", "glm4", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa"),
    *("granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "jais2", "lfm2"),
    *("lfm2_moe", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3_moe", "seed_oss", "stablelm", "starcoder2", "vaultgemma", "falcon_h1"),
)
TRANSFORMERS = ("bitnet", "doge", "dots1", "ministral", "nanochat", "persimmon", "solar_open")
"""Which vLLM runs with the code of transformers because the plugin says so."""

ALIKE = ("exaone4", "exaone_moe", "olmo3")
"""Whose tiny models give any two texts nearly the same vector."""


def test_they_are_kinds_that_are_known():
    assert {*RIGHT, *TRANSFORMERS} <= {*PREFIX, *WHOLE}


@pytest.mark.parametrize("kind", [*RIGHT, *TRANSFORMERS])
def test_the_vectors_are_ours(kind: str, offline: Offline, tmp_path: Path):
    backbone = write(tmp_path / "backbone", for_vllm(language_model(kind)))
    encoder = trained(SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu", form="merged"))
    export_vllm(encoder, tmp_path / "model")
    found = offline.embed(tmp_path / "model", TEXTS, **STEPS)
    require_listed(tmp_path / "model")
    require_ours(kind, encoder, TEXTS, found, limit=1e-8 if kind in ALIKE else 1e-5)
