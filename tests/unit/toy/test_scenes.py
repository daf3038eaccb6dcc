from __future__ import annotations

import hashlib
import re
from random import Random

import numpy as np
import pytest

from slq_embed.toy.scene_text import caption, captions, facts, implicit, questions
from slq_embed.toy.scenes import KINDS, Scene, Thing, all_scenes, draw, is_unseen, render, sample_scenes

# Words that carry no content: the only ones captions and implicit descriptions may share.
WORDS = "a an the of and with in on to as all that is are your you than has have what at it by for"
FUNCTION_WORDS = set(WORDS.split())


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower())) - FUNCTION_WORDS


def test_implicit_descriptions_share_no_content_word_with_any_caption():
    scenes = sample_scenes(400, "test", seed=1) + sample_scenes(400, "train", seed=1)
    described = set().union(*(words(caption) for scene in scenes for caption in captions(scene)))
    hinted = set().union(*(words(implicit(scene, seed)) for scene in scenes for seed in range(5)))
    assert not described & hinted


def test_scenes_are_the_same_everywhere_for_a_seed():
    scenes = sample_scenes(50, "test", seed=3)
    assert scenes == sample_scenes(50, "test", seed=3)
    assert scenes != sample_scenes(50, "test", seed=4)
    pixels = hashlib.sha256(b"".join(render(scene, 5).tobytes() for scene in scenes[:5])).hexdigest()
    assert pixels == hashlib.sha256(b"".join(render(scene, 5).tobytes() for scene in scenes[:5])).hexdigest()
    assert render(scenes[0], 5) != render(scenes[0], 6)
    assert [implicit(scene, 1) for scene in scenes] == [implicit(scene, 1) for scene in scenes]


def test_splits_are_disjoint_and_unseen_things_are_only_tested_on():
    parts = {split: set(sample_scenes(900, split)) for split in ("train", "validation", "test")}
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert not any(scene.has_unseen_thing for scene in parts["train"] | parts["validation"])
    share = np.mean([scene.has_unseen_thing for scene in parts["test"]])
    assert 0.1 < share < 0.3
    unseen = {thing for scene in all_scenes("single") if is_unseen(thing := scene.first)}
    assert len(unseen) == 10
    assert len({thing.shape for thing in unseen}) == len({thing.colour for thing in unseen}) == 10


def test_every_caption_names_one_scene():
    for kind in KINDS:
        scenes = all_scenes(kind)[:4000]
        assert len({caption(scene) for scene in scenes}) == len(scenes)


def test_too_many_scenes_are_refused():
    with pytest.raises(ValueError, match="has too few"):
        sample_scenes(100_000, "test")


def test_pictures_show_what_was_asked_for():
    scene = Scene("pair", Thing("red", "square"), Thing("blue", "circle"), detail="left")
    image, positions = draw(scene, 1)
    assert image.size == (64, 64)
    (first, x1, _, _), (second, x2, _, _) = positions
    assert (first, second) == (scene.first, scene.second)
    assert x1 < x2
    red, _, blue = image.getpixel((round(x1), round(positions[0][2])))
    assert red > 150 > blue
    assert len(draw(Scene("count", Thing("red", "star"), count=4))[1]) == 4


def test_answers_fit_the_scene():
    scene = Scene("mix", Thing("red", "star"), Thing("blue", "ring"), count=2)
    answers = dict(questions(scene, Random(0)))
    assert answers["which colour has the star?"] == "red"
    assert answers["how many shapes are there?"] == "three"
    assert answers["how many red stars are there?"] == "two"
    assert dict(facts())["how many sides has a triangle?"] == "three"
