"""Lazy sequences: the same as the lists they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from adapters.data.lazy import Joined, Mapped, Picked, places_where

LETTERS = list("abcdefgh")
PAIRS: list[tuple[Sequence[str], list[str]]] = [
    (Picked(LETTERS, [3, 0, 0, 7]), ["d", "a", "a", "h"]),
    (Picked(Picked(LETTERS, [5, 4, 3, 2]), [2, 0]), ["d", "f"]),
    (Joined([LETTERS[:2], [], Picked(LETTERS, [7]), LETTERS[2:3]]), ["a", "b", "h", "c"]),
    (Joined([[], []]), []),
    (Mapped(LETTERS, str.upper), list("ABCDEFGH")),
    (Mapped(Joined([LETTERS, LETTERS]), str.upper), list("ABCDEFGHABCDEFGH")),
]


@pytest.mark.parametrize(("lazy", "plain"), PAIRS)
def test_what_a_list_does(lazy: Sequence[str], plain: list[str]) -> None:
    assert lazy == plain and plain == lazy and list(lazy) == plain and len(lazy) == len(plain)
    assert bool(lazy) == bool(plain) and lazy != [*plain, "x"] and lazy != [*plain[1:], "x"]
    assert [lazy[place] for place in range(-len(plain), len(plain))] == plain + plain
    for part in (slice(2), slice(1, None), slice(None, None, 2), slice(-2, None), slice(None, None, -1)):
        assert lazy[part] == plain[part]
    for outside in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            lazy[outside]


def test_places() -> None:
    assert places_where("a1b22", str.isdigit).tolist() == [1, 3, 4]
