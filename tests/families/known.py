"""The five families that need no check, as tests/checkpoints.py builds them."""

from __future__ import annotations

from tests.checkpoints import parts_of
from tests.families.building import Parts


def qwen3_vl() -> Parts:
    return Parts(*parts_of("qwen3_vl"))


def qwen2_5_vl() -> Parts:
    return Parts(*parts_of("qwen2_5_vl"))


def qwen2_vl() -> Parts:
    return Parts(*parts_of("qwen2_vl"))


def internvl3() -> Parts:
    """InternVL 3 has a Qwen2 decoder, 3.5 a Qwen3 decoder."""
    return Parts(*parts_of("internvl"))


def fast_vlm() -> Parts:
    return Parts(*parts_of("fast_vlm"))
