"""What can be said of a scene: captions, implicit descriptions, questions with answers, and plain facts.

An *implicit* description names no colour, shape, number, size or relation: each is described by what it is like
("the outline of a coin", "the colour of grass"), so that only knowledge connects it with the caption.
This is the idea of KARR-Bench (arXiv:2604.13710) at toy size.
"""

from __future__ import annotations

from random import Random

from slq_embed.toy.scenes import COLOURS, SHAPES, SIZES, Scene, Thing

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
IMPLICIT_COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("blood", "ripe tomatoes", "fire engines"),
    "green": ("grass", "frogs", "spring leaves"),
    "blue": ("clear sky", "deep sea", "sapphires"),
    "yellow": ("lemons", "ripe bananas", "sunflowers"),
    "orange": ("carrots", "pumpkins", "basketballs"),
    "purple": ("aubergines", "plums", "lavender"),
    "pink": ("flamingos", "bubble gum", "piglets"),
    "white": ("snow", "milk", "clouds"),
    "black": ("coal", "midnight", "ravens"),
    "brown": ("chocolate", "tree bark", "coffee beans"),
}
IMPLICIT_SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("a coin", "a wheel", "the full moon"),
    "square": ("a chess board", "a window pane", "a dice face"),
    "triangle": ("a slice of pizza", "a pyramid", "a tent"),
    "star": ("what twinkles at night", "a sheriff badge", "what you wish upon"),
    "heart": ("a sign of love", "a valentine card", "what beats in your chest"),
    "cross": ("a plus sign", "a hospital sign", "an addition mark"),
    "crescent": ("a new moon", "a croissant", "a sickle"),
    "ring": ("a doughnut", "a tyre", "a wedding band"),
    "arrow": ("a sign that points the way", "what an archer shoots", "a compass needle"),
    "diamond": ("a kite", "a gem", "a baseball field"),
}
IMPLICIT_NUMBERS = {
    2: ("wheels on a bicycle", "eyes on a face", "shoes for a walk"),
    3: ("wheels on a tricycle", "lights on a traffic signal", "pigs in the fairy tale"),
    4: ("legs of a dog", "wheels of a car", "seasons of a year"),
}
IMPLICIT_SIZES = {"big": ("an elephant", "a whale"), "small": ("a mouse", "an ant")}
IMPLICIT_RELATIONS = {"above": ("higher than", "floating on"), "left": ("west of", "earlier in reading than")}

DESCRIBE = ("describe the image.", "what is in the image?", "")
"""Requests for a caption of a picture; the empty one is a picture alone."""
RESTATE = ("say it plainly.", "")
"""Requests for a literal caption of an implicit description."""


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _noun(thing: Thing) -> str:
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.shape}"


def _group(thing: Thing, count: int) -> str:
    return f"{NUMBERS[count]} {thing.colour} {_plural(thing.shape)}"


def caption(scene: Scene) -> str:
    """The canonical caption, which tells everything that was chosen about a scene.

    Example:
        >>> caption(Scene("pair", Thing("red", "circle"), Thing("blue", "square"), detail="left"))
        'a red circle left of a blue square'
    """
    if scene.kind == "single":
        return f"a {scene.detail} {scene.first.colour} {scene.first.shape}"
    if scene.kind == "count":
        return _group(scene.first, scene.count)
    assert scene.second is not None
    if scene.kind == "pair":
        relation = "above" if scene.detail == "above" else "left of"
        return f"{_noun(scene.first)} {relation} {_noun(scene.second)}"
    return f"{_group(scene.first, scene.count)} and {_noun(scene.second)}"


def _turned(scene: Scene) -> str:
    """The caption from its other end."""
    thing = scene.first
    if scene.kind == "single":
        return f"one {thing.shape} that is {scene.detail} and {thing.colour}"
    if scene.kind == "count":
        return f"{_plural(thing.shape)} that are {thing.colour}, {NUMBERS[scene.count]} of them"
    assert scene.second is not None
    if scene.kind == "pair":
        relation = "below" if scene.detail == "above" else "right of"
        return f"{_noun(scene.second)} {relation} {_noun(thing)}"
    return f"{_noun(scene.second)} with {_group(thing, scene.count)}"


def captions(scene: Scene) -> list[str]:
    """The five literal captions of a scene; the first is the canonical one."""
    plain = caption(scene)
    return [plain, f"a picture of {plain}", f"you can see {plain} here", f"the image shows {plain}", _turned(scene)]


def implicit(scene: Scene, seed: int = 0) -> str:
    """A description without one content word of the captions; the phrases differ by seed.

    Example:
        >>> implicit(Scene("single", Thing("green", "triangle"), detail="small"))
        'an item with the hue of grass and the outline of a pyramid, sized like an ant'
    """
    rng = Random(f"{seed}|{scene.key}")
    thing = _implicit_thing(scene.first, rng)
    if scene.kind == "single":
        return f"an item {thing}, sized like {rng.choice(IMPLICIT_SIZES[scene.detail])}"
    if scene.kind == "count":
        return f"as many items as {rng.choice(IMPLICIT_NUMBERS[scene.count])}, all {thing}"
    assert scene.second is not None
    other = _implicit_thing(scene.second, rng)
    if scene.kind == "pair":
        return f"an item {thing}, {rng.choice(IMPLICIT_RELATIONS[scene.detail])} an item {other}"
    return f"as many items as {rng.choice(IMPLICIT_NUMBERS[scene.count])}, all {thing}, plus an item {other}"


def _implicit_thing(thing: Thing, rng: Random) -> str:
    colour, shape = rng.choice(IMPLICIT_COLOURS[thing.colour]), rng.choice(IMPLICIT_SHAPES[thing.shape])
    return f"with the hue of {colour} and the outline of {shape}"


def questions(scene: Scene, rng: Random) -> list[tuple[str, str]]:
    """Questions about a picture of the scene with their answers, in literal and in implicit wording."""
    things = [scene.first] + ([scene.second] if scene.second else [])
    asked: list[tuple[str, str]] = []
    for thing, other in zip(things, reversed(things), strict=True):
        if other is thing or other.shape != thing.shape:
            asked.append((f"which colour has the {thing.shape}?", thing.colour))
            asked.append(
                (f"which colour has what is shaped like {rng.choice(IMPLICIT_SHAPES[thing.shape])}?", thing.colour)
            )
        if other is thing or other.colour != thing.colour:
            asked.append((f"which shape is {thing.colour}?", thing.shape))
            asked.append((f"which shape has the hue of {rng.choice(IMPLICIT_COLOURS[thing.colour])}?", thing.shape))
    total = scene.count + (scene.second is not None)
    asked.append(("how many shapes are there?", NUMBERS[total]))
    asked.append((f"how many {scene.first.colour} {_plural(scene.first.shape)} are there?", NUMBERS[scene.count]))
    shown = rng.choice(things)
    asked.append((f"is there {_noun(shown)}?", "yes"))
    absent = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    if absent not in things:
        asked.append((f"is there {_noun(absent)}?", "no"))
    near = Thing(shown.colour, rng.choice(SHAPES))
    if near not in things:
        asked.append((f"is there {_noun(near)}?", "no"))
    if scene.kind == "pair" and scene.second is not None:
        first, second = _noun(scene.first), _noun(scene.second)
        words = ("above", "below") if scene.detail == "above" else ("left of", "right of")
        asked.append((f"what is {words[0]} {second}?", first))
        asked.append((f"what is {words[1]} {first}?", second))
    return asked


def facts() -> list[tuple[str, str]]:
    """Plain knowledge as questions with answers: what a model must know to read implicit descriptions."""
    pairs: list[tuple[str, str]] = []
    for colour, things in IMPLICIT_COLOURS.items():
        pairs += [(f"which colour has {thing}?", colour) for thing in things]
        pairs += [(f"the hue of {thing}?", colour) for thing in things]
        pairs += [(f"name something {colour}.", things[0])]
    for shape, things in IMPLICIT_SHAPES.items():
        pairs += [(f"which shape has {thing}?", shape) for thing in things]
        pairs += [(f"the outline of {thing}?", shape) for thing in things]
        pairs += [(f"name something shaped like a {shape}.", things[0])]
    for number, things in IMPLICIT_NUMBERS.items():
        pairs += [(f"how many are the {thing}?", NUMBERS[number]) for thing in things]
    for size in SIZES:
        pairs += [(f"how large is {thing}?", size) for thing in IMPLICIT_SIZES[size]]
    sides = {"triangle": "three", "square": "four", "diamond": "four"}
    pairs += [(f"how many sides has a {shape}?", number) for shape, number in sides.items()]
    pairs += [("how many points has a star?", "five"), ("how many sides has a circle?", "none")]
    return pairs
