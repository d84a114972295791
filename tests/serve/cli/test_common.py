"""What the commands share."""

from __future__ import annotations

import pytest

from qformer.errors import UserError
from serve.cli.common import split_list


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("red,green, blue", ["red", "green", " blue"]),
        ('["red, blue", "green"]', ["red, blue", "green"]),
        (' ["34,12","12,34"] ', ["34,12", "12,34"]),
        ("[1, 2.50]", ["1", "2.50"]),
        ("[a],[b]", ["[a]", "[b]"]),  # no JSON
        ("3,4", ["3", "4"]),
        ("yes", ["yes"]),
        ('"a","b"', ['"a"', '"b"']),
    ],
)
def test_a_list_of_a_flag_may_hold_commas(text: str, entries: list[str]) -> None:
    assert split_list(text, "--choices") == entries


@pytest.mark.parametrize(
    ("text", "told"), [('["a, b", "c"', "--choices"), ('["a", null]', "into double quotes"), ("[[1]]", "double quotes")]
)
def test_a_list_of_a_flag_that_is_none_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        split_list(text, "--choices")
