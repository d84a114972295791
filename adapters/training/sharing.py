"""Work that the processes of a run share: each does its part, and all have the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

Item = TypeVar("Item")
Made = TypeVar("Made")


def shared(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Made]]) -> list[Made]:
    """What `work` makes of all items, in their order; every process calls it and does a part, or all if it is alone.

    Args:
        items: the same on every process.
        work: makes one value of each item it is given; what it makes must be picklable.
    """
    rank, world = _place()
    if world == 1:
        return list(work(items))
    own = items[rank::world]
    parts = gather_object([list(work(own)) if len(own) else []])  # a list of each process's
    whole: list[Made | None] = [None] * len(items)
    for number, part in enumerate(parts):
        whole[number::world] = part
    return [made for made in whole if made is not None]


def summed(own: float) -> float:
    """The sum of every process's value."""
    return float(sum(gather_object([own]))) if _place()[1] > 1 else own


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """The items of this process."""
    rank, world = _place()
    return items[rank::world] if world > 1 else items


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    state: Any = PartialState()  # its attributes have no types
    return int(state.process_index), int(state.num_processes)
