"""Scores of yes-or-no probes for things that a picture may not show, as POPE asks them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from adapters.evaluation.intervals import interval_of

SCORES = ("accuracy", "precision", "recall", "F1", "yes_rate")
_NO = {"no", "not"}


def says_yes(answer: str) -> bool:
    """Whether an answer counts as yes: its first sentence has neither the word "no" nor "not".

    Li et al. 2023 (arXiv 2305.10355), section 4 and its evaluation: whatever is not a no is a yes. Here case does not
    count, so that "NO" is one too. `plain` tells which answers were neither word.
    """
    return not _NO & set(_words(answer))


def plain(answer: str) -> bool:
    """Whether an answer says yes, no or not in so many words."""
    return bool(({"yes"} | _NO) & set(_words(answer)))


def score_probes(said: Sequence[bool], right: Sequence[bool], pictures: Sequence[Hashable]) -> dict[str, float]:
    """POPE's five scores with their intervals; yes is what is looked for.

    Args:
        said: whether each probe was answered with yes.
        right: whether yes is right.
        pictures: which picture each probe is about.

    Returns:
        "n", "accuracy", "precision", "recall", "F1" and "yes_rate" as fractions and, if there are two pictures or
        more, each with "_low" and "_high" behind it: the 95 % interval by picture. A fraction of nothing, such as the
        precision if yes is never said, is 0.

    Raises:
        ValueError: there is no probe, or the lists are not of one length.
    """
    pairs = list(zip(said, right, strict=True))
    if not pairs:
        raise ValueError("no probes, so no scores")
    # [rows, 4]: true positives, false positives, false negatives, true negatives
    parts = np.array([[a and b, a and not b, b and not a, not a and not b] for a, b in pairs], dtype=float)
    values = _scores(parts.sum(axis=0, keepdims=True))
    found: dict[str, float] = {"n": len(pairs)}
    for name, value in values.items():
        found[name] = float(value[0])
        if len(set(pictures)) > 1:

            def of_draws(sums: NDArray[np.float64], name: str = name) -> NDArray[np.float64]:
                return _scores(sums)[name]

            found[f"{name}_low"], found[f"{name}_high"] = interval_of(parts, pictures, of_draws)
    return found


def _scores(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The five scores, [draws] each, of counts [draws, 4]."""
    hits, false, missed, refused = sums.T
    return {
        "accuracy": _share(hits + refused, sums.sum(axis=1)),
        "precision": _share(hits, hits + false),
        "recall": _share(hits, hits + missed),
        "F1": _share(2 * hits, 2 * hits + false + missed),
        "yes_rate": _share(hits + false, sums.sum(axis=1)),
    }


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _words(answer: str) -> list[str]:
    return answer.split(".")[0].replace(",", "").lower().split()
