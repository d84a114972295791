"""Sequences whose items are made when they are asked for, so that a million of them take no more memory than one."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar, overload

import numpy as np

Item = TypeVar("Item")
Given = TypeVar("Given")


class LazySequence(Sequence[Item]):
    """Items that are made when they are asked for; equal to any list or tuple of equal items."""

    @abstractmethod
    def item(self, index: int) -> Item:
        """Make the item at an index from 0 on."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return Picked(self, np.arange(len(self))[index])
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"there are {len(self)} items, and none at {index}")
        return self.item(place)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LazySequence | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} items"


class Picked(LazySequence[Item]):
    """Items of a sequence by their places.

    Args:
        base: the sequence.
        places: [N], each from 0 to len(base) - 1; in any order, and one may come several times.
    """

    def __init__(self, base: Sequence[Item], places: np.ndarray | Sequence[int]) -> None:
        found = np.asarray(places, dtype=np.int32)
        self._base: Sequence[Item] = base._base if isinstance(base, Picked) else base
        self._places: np.ndarray = base._places[found] if isinstance(base, Picked) else found

    def __len__(self) -> int:
        return len(self._places)

    def item(self, index: int) -> Item:
        """Take the item of the base."""
        return self._base[int(self._places[index])]


class Joined(LazySequence[Item]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, index: int) -> Item:
        """Take the item of the part that holds it."""
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class Mapped(LazySequence[Item], Generic[Given, Item]):
    """What a function makes of each item of a sequence."""

    def __init__(self, base: Sequence[Given], change: Callable[[Given], Item]) -> None:
        self._base = base
        self._change = change

    def __len__(self) -> int:
        return len(self._base)

    def item(self, index: int) -> Item:
        """Make the item."""
        return self._change(self._base[index])


def places_where(items: Sequence[Item], is_wanted: Callable[[Item], Any]) -> np.ndarray:
    """The places, int32 [N], of the items that are wanted."""
    wanted = np.fromiter((bool(is_wanted(item)) for item in items), dtype=bool, count=len(items))
    return np.flatnonzero(wanted).astype(np.int32)
