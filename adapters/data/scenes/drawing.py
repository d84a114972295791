"""Drawn scenes: coloured shapes of two sizes on a plain light ground, made from a seed, no two alike.

What a picture shows is known exactly, so that a question about it, the steps to its answer and the answer can be made
by rule (`adapters.data.scenes.questions`) and a model that names a step without having seen it is found out. The idea
is that of CLEVR (Johnson et al. 2016, arXiv 1612.06890), drawn flat and small enough for a laptop.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from qformer.errors import UserError

SIDE = 128  # pixels, of a picture
GROUND = (247, 246, 241)
COLOURS = {
    "red": (214, 34, 40),
    "orange": (255, 141, 20),
    "yellow": (242, 211, 0),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "purple": (140, 50, 170),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
RADIUS = {"big": 17, "small": 9}  # pixels, of the circle that a shape stays within
FEWEST, MOST = 3, 7  # shapes in a scene
_GAP = 3  # pixels between two shapes' circles, and from the border
_FINER = 4  # a picture is drawn so many times as large, then averaged: smooth edges
_CELL = 32  # pixels; scenes that differ only by less than a move into another cell are alike
_TRIES = 200  # for the place of a shape, before the scene is begun again

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One shape.

    Args:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: "big" or "small".
        x: its centre, in pixels from the left.
        y: its centre, in pixels from the top.
    """

    shape: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """Three to seven things that do not touch, in the order of reading: from left to right."""

    things: tuple[Thing, ...]

    @property
    def key(self) -> str:
        """A hash of what is to be seen: scenes of the same things in the same cells of a 4×4 grid share it."""
        seen = sorted((t.shape, t.colour, t.size, t.x // _CELL, t.y // _CELL) for t in self.things)
        return hashlib.sha256(repr(seen).encode()).hexdigest()


def make_scenes(count: int, seed: int) -> list[Scene]:
    """Make scenes, no two of them alike; fewer from the same seed are the first of more.

    A scene has few colours and shapes of its own, one of each more often than the others, so that there is something
    to count.

    Raises:
        UserError: the count is negative.
    """
    if count < 0:
        raise UserError(f"{count} scenes: give a number from 0 on")
    rng = random.Random(seed)
    scenes: list[Scene] = []
    seen: set[str] = set()
    while len(scenes) < count:
        things = _lot(rng)
        if things is None:
            continue
        scene = Scene(tuple(sorted(things, key=lambda thing: (thing.x, thing.y))))
        if scene.key not in seen:
            seen.add(scene.key)
            scenes.append(scene)
    return scenes


def _lot(rng: random.Random) -> list[Thing] | None:
    """Things in places drawn at random; None if they do not fit."""
    number = rng.randint(FEWEST, MOST)
    shapes, colours = _some(SHAPES, 2, rng), _some(tuple(COLOURS), 2, rng)
    things: list[Thing] = []
    for _ in range(number):
        shape, colour, size = _one(shapes, rng), _one(colours, rng), rng.choice(tuple(RADIUS))
        border = RADIUS[size] + _GAP
        for _ in range(_TRIES):
            thing = Thing(shape, colour, size, rng.randint(border, SIDE - border), rng.randint(border, SIDE - border))
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:
            return None
    return things


def _some(names: Sequence[str], fewest: int, rng: random.Random) -> list[str]:
    return rng.sample(names, rng.randint(fewest, len(names)))


def _one(names: Sequence[str], rng: random.Random) -> str:
    """One of the names; the first as often as two others together."""
    return rng.choices(names, weights=[2.0] + [1.0] * (len(names) - 1))[0]


def _apart(thing: Thing, other: Thing) -> bool:
    distance = math.hypot(thing.x - other.x, thing.y - other.y)
    return distance >= RADIUS[thing.size] + RADIUS[other.size] + _GAP


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene, 128×128 RGB; the same scene is the same picture, pixel by pixel, with one version of Pillow."""
    image = Image.new("RGB", (SIDE * _FINER, SIDE * _FINER), GROUND)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        middle, radius = (thing.x * _FINER, thing.y * _FINER), RADIUS[thing.size] * _FINER
        colour = COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.circle(middle, 0.88 * radius, fill=colour)  # fills more than the others do: a little less wide
        else:
            pen.polygon(_outline(thing.shape, middle, radius), fill=colour)
    return image.reduce(_FINER)


def _outline(shape: str, middle: Point, radius: float) -> list[Point]:
    """The corners of a shape, upright, within a circle."""
    x, y = middle
    if shape == "cross":
        arm, half = 0.94 * radius, 0.32 * radius
        quarter = [(half, -half), (half, -arm), (-half, -arm)]  # an inner corner and the upper arm's end
        return [(x + dx, y + dy) for turn in range(4) for dx, dy in _turned(quarter, turn)]
    corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.42)}[shape]
    first = math.pi / 4 if shape == "square" else math.pi / 2  # a square lies on a side, the others point up
    points = []
    for step in range(2 * corners):
        reach = radius * (1.0 if step % 2 == 0 else inner)
        if step % 2 and inner == 1.0:
            continue  # a polygon has straight sides: nothing between its corners
        angle = first + math.pi * step / corners
        points.append((x + reach * math.cos(angle), y - reach * math.sin(angle)))
    return points


def _turned(points: Sequence[Point], quarters: int) -> list[Point]:
    """Points turned about the origin by quarters of a circle, against the clock as seen."""
    turned = list(points)
    for _ in range(quarters):
        turned = [(dy, -dx) for dx, dy in turned]
    return turned
