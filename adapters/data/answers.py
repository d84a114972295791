"""The form in which short answers are compared, and the letters of choices."""

from __future__ import annotations

import unicodedata

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choice_letter(place: int) -> str:
    """The letter of a choice as it is written, "(A)" for place 0.

    Raises:
        IndexError: there are fewer letters.
    """
    return f"({LETTERS[place]})"


def normalise(answer: str) -> str:
    """Lower case, underscores as spaces, single spaces, no full stop at the end; full-width characters as plain ones.

    Characters are in Unicode's form NFKC: "café" is the same whether é is one character or e with an accent after it.
    """
    answer = unicodedata.normalize("NFKC", answer)
    return " ".join(answer.lower().replace("_", " ").split()).rstrip(".").strip()


def answer_set(answer: str) -> frozenset[str]:
    """An answer that is a comma-separated list, as a set of its normalised items."""
    return frozenset(item for item in (normalise(part) for part in answer.split(",")) if item)
