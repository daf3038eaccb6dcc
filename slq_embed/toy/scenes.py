"""Scenes of coloured shapes: a small world that is generated, deterministic by seed and free of any licence.

The embedded default model is trained and measured on it. A scene is a value (:class:`Scene`); :func:`render`
draws it as a 64 x 64 picture, and :mod:`slq_embed.toy.scene_text` puts it into words.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 34),
    "green": (34, 150, 50),
    "blue": (32, 80, 214),
    "yellow": (244, 220, 30),
    "orange": (248, 134, 16),
    "purple": (126, 42, 156),
    "pink": (250, 150, 196),
    "white": (252, 252, 252),
    "black": (12, 12, 12),
    "brown": (116, 70, 30),
}
"""Colours by name, as red, green and blue from 0 to 255."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "crescent", "ring", "arrow", "diamond")
"""Shapes by name."""
RELATIONS = ("above", "left")
SIZES = ("big", "small")
IMAGE_SIZE = 64
"""Width and height of a picture, in pixels."""

Split = Literal["train", "validation", "test"]
Kind = Literal["single", "count", "pair", "mix"]
KINDS: tuple[Kind, ...] = ("single", "count", "pair", "mix")
"""What a scene may show; see :class:`Scene`."""
_OVERSAMPLE = 4  # shapes are drawn this many times larger and averaged down, which smooths their edges


@dataclass(frozen=True)
class Thing:
    """A shape in a colour, such as a red circle."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Args:
        kind: ``"single"`` (one thing, big or small), ``"count"`` (two to four alike), ``"pair"`` (two things
            in a relation) or ``"mix"`` (two or three alike and one other).
        first: The thing named first.
        second: The other thing of a pair or a mix.
        count: How many of the first thing there are.
        detail: The size of a single thing, or the relation of a pair.
    """

    kind: Kind
    first: Thing
    second: Thing | None = None
    count: int = 1
    detail: str = ""

    @property
    def key(self) -> str:
        """A stable name, equal for equal scenes in every process."""
        return f"{self.kind}|{self.count}|{self.first}|{self.detail}|{self.second}"

    @property
    def has_unseen_thing(self) -> bool:
        """Whether it holds one of the ten colour-shape pairs that no training scene shows."""
        return is_unseen(self.first) or (self.second is not None and is_unseen(self.second))

    @property
    def split(self) -> Split | None:
        """``"test"`` for a tenth of all scenes by hash, ``"validation"`` for another, else ``"train"``.

        Scenes with an unseen thing are tested on or left out (``None``): never trained on, nor used to choose.
        """
        bucket = zlib.crc32(self.key.encode()) % 10
        if bucket == 0:
            return "test"
        if self.has_unseen_thing:
            return None
        return "validation" if bucket == 1 else "train"


def is_unseen(thing: Thing) -> bool:
    """Whether the pair of colour and shape is held out of training: one shape for each colour."""
    return (3 * list(COLOURS).index(thing.colour) + 1) % len(SHAPES) == SHAPES.index(thing.shape)


@cache
def all_scenes(kind: Kind) -> tuple[Scene, ...]:
    """Every scene of one kind, in a fixed order."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    if kind == "single":
        return tuple(Scene(kind, thing, detail=size) for thing in things for size in SIZES)
    if kind == "count":
        return tuple(Scene(kind, thing, count=count) for thing in things for count in (2, 3, 4))
    others = [(a, b) for a, b in itertools.product(things, things) if a != b]
    if kind == "pair":
        return tuple(Scene(kind, a, b, detail=relation) for a, b in others for relation in RELATIONS)
    return tuple(Scene(kind, a, b, count=count) for a, b in others for count in (2, 3))


@cache
def _of_split(kind: Kind, split: Split) -> tuple[Scene, ...]:
    return tuple(scene for scene in all_scenes(kind) if scene.split == split)


def sample_scenes(
    count: int, split: Split, seed: int = 0, weights: tuple[float, float, float, float] = (0.04, 0.06, 0.5, 0.4)
) -> list[Scene]:
    """Draw distinct scenes of a split.

    Args:
        count: How many scenes.
        split: Which part of the world to draw from.
        seed: The same seed gives the same list everywhere.
        weights: Share of single, count, pair and mix scenes. A kind with too few scenes gives what it has,
            and mixes fill the rest.

    Returns:
        ``count`` different scenes in random order.

    Raises:
        ValueError: If the split does not hold that many scenes.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    drawn: list[Scene] = []
    for kind, weight in zip(KINDS, weights, strict=True):
        pool = _of_split(kind, split)
        count_of_kind = count - len(drawn) if kind == "mix" else round(count * weight)
        if kind == "mix" and count_of_kind > len(pool):
            raise ValueError(f"{count} scenes were asked for, but the {split} split has too few. Ask for fewer.")
        drawn += [pool[i] for i in rng.permutation(len(pool))[:count_of_kind]]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def _polygon(points: list[tuple[float, float]], x: float, y: float, radius: float) -> list[tuple[float, float]]:
    return [(x + radius * px, y + radius * py) for px, py in points]


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when every second radius is ``inner``."""
    steps = corners if inner == 1.0 else 2 * corners
    radii = [inner if inner != 1.0 and i % 2 else 1.0 for i in range(steps)]
    angles = [2 * math.pi * i / steps - math.pi / 2 for i in range(steps)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "star": _regular(5, inner=0.42),
    "cross": [
        *((-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3)),
        *((0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)),
    ],
    "arrow": [(-1.0, -0.25), (0.1, -0.25), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.25), (-1.0, 0.25)],
    "diamond": [(0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)],
    "heart": [
        (16 * math.sin(t) ** 3 / 16.5, (-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t)) / 16.5)
        for t in np.linspace(0, 2 * math.pi, 40)
    ],
}


def _mask(shape: str, x: float, y: float, radius: float) -> Image.Image:
    size = IMAGE_SIZE * _OVERSAMPLE
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    x, y, radius = x * _OVERSAMPLE, y * _OVERSAMPLE, radius * _OVERSAMPLE
    if shape in _POLYGONS:
        draw.polygon(_polygon(_POLYGONS[shape], x, y, radius), fill=255)
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = 0.55 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        elif shape == "crescent":
            bite = 0.85 * radius
            draw.ellipse((x - bite + 0.5 * radius, y - bite, x + bite + 0.5 * radius, y + bite), fill=0)
    return mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _positions(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, float, float, float]]:
    """Thing, centre and radius (pixels) of all that is drawn."""
    if scene.kind == "single":
        radius = rng.uniform(20, 25) if scene.detail == "big" else rng.uniform(8, 11)
        room = IMAGE_SIZE / 2 - radius - 3
        return [(scene.first, 32 + rng.uniform(-room, room), 32 + rng.uniform(-room, room), radius)]
    if scene.kind == "pair":
        assert scene.second is not None
        near, far, free = rng.uniform(15, 17), rng.uniform(47, 49), rng.uniform(20, 44, size=2)
        radii = rng.uniform(11, 14, size=2)
        if scene.detail == "above":
            return [(scene.first, free[0], near, radii[0]), (scene.second, free[1], far, radii[1])]
        return [(scene.first, near, free[0], radii[0]), (scene.second, far, free[1], radii[1])]
    things = [scene.first] * scene.count + ([] if scene.second is None else [scene.second])
    corners = rng.permutation([(16, 16), (48, 16), (16, 48), (48, 48)])[: len(things)]
    jitter, radii = rng.uniform(-2, 2, size=(len(things), 2)), rng.uniform(10, 13, size=len(things))
    return [
        (thing, corner[0] + move[0], corner[1] + move[1], radius)
        for thing, corner, move, radius in zip(things, corners, jitter, radii, strict=True)
    ]


def draw(scene: Scene, seed: int = 0) -> tuple[Image.Image, list[tuple[Thing, float, float, float]]]:
    """Draw a scene on a noisy grey ground.

    Args:
        scene: What to show.
        seed: Place, size and noise differ by seed; equal arguments give equal pixels.

    Returns:
        A 64 x 64 RGB picture, and for each thing in it the thing, its centre (x, y) and its radius in pixels.
    """
    rng = np.random.default_rng([seed, zlib.crc32(scene.key.encode())])
    ground = rng.uniform(105, 165) + rng.normal(0, 9, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    pixels = np.repeat(ground, 3, axis=2)
    positions = _positions(scene, rng)
    for thing, x, y, radius in positions:
        colour = np.array(COLOURS[thing.colour]) + rng.normal(0, 6, size=3)
        alpha = np.asarray(_mask(thing.shape, x, y, radius), dtype=np.float64)[..., None] / 255
        pixels = pixels * (1 - alpha) + colour * alpha
    pixels += rng.normal(0, 3, size=pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), positions


def render(scene: Scene, seed: int = 0) -> Image.Image:
    """Draw a scene as a 64 x 64 RGB picture; see :func:`draw`."""
    return draw(scene, seed)[0]
