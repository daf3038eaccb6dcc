"""A small world of coloured shapes, its pictures and texts, and the models that know it and nothing else."""

from slq_embed.toy.pretrained import pretrained
from slq_embed.toy.scene_text import DESCRIBE, RESTATE, caption, captions, facts, implicit, questions
from slq_embed.toy.scenes import (
    COLOURS,
    KINDS,
    SHAPES,
    Scene,
    Thing,
    all_scenes,
    draw,
    is_unseen,
    render,
    sample_scenes,
)

__all__ = [
    "COLOURS",
    "DESCRIBE",
    "KINDS",
    "RESTATE",
    "SHAPES",
    "Scene",
    "Thing",
    "all_scenes",
    "caption",
    "captions",
    "draw",
    "facts",
    "implicit",
    "is_unseen",
    "pretrained",
    "questions",
    "render",
    "sample_scenes",
]
