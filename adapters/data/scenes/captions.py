"""Captions of a drawn scene, each exact: what a first stage learns to see by, before anything is asked."""

from __future__ import annotations

from collections.abc import Iterable

from adapters.data.scenes.drawing import COLOURS, SHAPES, Scene, Thing
from adapters.data.scenes.questions import PLURAL

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")


def captions_of(scene: Scene) -> list[str]:
    """Five captions: things from left to right, and from top to bottom; colours by shape, shapes by colour; counts."""
    things = scene.things
    down = sorted(things, key=lambda thing: (thing.y, thing.x))
    across = ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in things)
    downwards = ", ".join(f"{thing.colour} {thing.shape}" for thing in down)
    by_shape = _grouped((shape, [thing.colour for thing in things if thing.shape == shape]) for shape in SHAPES)
    by_colour = _grouped((colour, [thing.shape for thing in things if thing.colour == colour]) for colour in COLOURS)
    return [
        f"From left to right: {across}.",
        f"From top to bottom: {downwards}.",
        f"By shape: {by_shape}.",
        f"By colour: {by_colour}.",
        f"{', '.join(_counted(things, shape) for shape in SHAPES if _having(things, shape))}.".capitalize(),
    ]


def _grouped(groups: Iterable[tuple[str, list[str]]]) -> str:
    return "; ".join(f"{name} {' '.join(members)}" for name, members in groups if members)


def _having(things: Iterable[Thing], shape: str) -> int:
    return sum(thing.shape == shape for thing in things)


def _counted(things: Iterable[Thing], shape: str) -> str:
    number = _having(things, shape)
    return f"{_NUMBERS[number]} {shape if number == 1 else PLURAL[shape]}"
