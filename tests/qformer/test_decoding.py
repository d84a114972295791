"""The presets of decoding, as docs and papers give them."""

from __future__ import annotations

import pytest

from qformer.decoding import Decoding
from qformer.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("greedy", Decoding(max_new_tokens=32, num_beams=1)),
        ("paper-vqa", Decoding(max_new_tokens=10, num_beams=5, length_penalty=-1.0)),  # BLIP-2, section 4
        ("likeliest", Decoding(max_new_tokens=32, num_beams=5, length_penalty=0.0)),
        ("caption", Decoding(max_new_tokens=30, num_beams=5, length_penalty=0.5)),
    ],
)
def test_a_preset_is_what_its_docs_say(name: str, expected: Decoding) -> None:
    assert Decoding.preset(name) == expected


def test_an_unknown_preset_names_the_others() -> None:
    with pytest.raises(UserError, match=r"'best'.*greedy, paper-vqa, likeliest, caption"):
        Decoding.preset("best")
