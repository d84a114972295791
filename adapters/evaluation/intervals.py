"""95 % intervals of any score, by drawing whole pictures with replacement: the bootstrap over clusters.

Questions on one picture tend to be right or wrong together, so an interval that took them for independent would be too
narrow. This is the percentile bootstrap over clusters (Davison and Hinkley 1997, Bootstrap Methods and their
Application).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
_AT_ONCE = 100  # draws; a large set has tens of thousands of pictures
_LEVELS = (0.025, 0.975)

Combine = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def interval_by_picture(
    hits: Sequence[float], pictures: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean score.

    Args:
        hits: the score of each question.
        pictures: which picture each question is on.
        draws: how often as many pictures are drawn.
        seed: of the draws.

    Raises:
        ValueError: there is no question, or not one picture for each.
    """
    parts = np.stack([np.asarray(hits, dtype=float), np.ones(len(hits))], axis=1)  # [rows, 2]
    return interval_of(parts, pictures, lambda sums: sums[:, 0] / sums[:, 1], draws=draws, seed=seed)


def interval_of(
    parts: ArrayLike, pictures: Sequence[Hashable], combine: Combine, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a score that is made of sums over rows, such as precision, F1 or a difference of means.

    Args:
        parts: [rows, K]: what each row adds to each sum.
        pictures: which picture each row is on.
        combine: the score of each draw, [draws], from its sums, [draws, K].
        draws: how often as many pictures are drawn.
        seed: of the draws.

    Raises:
        ValueError: there is no row, or not one picture for each.
    """
    rows = np.asarray(parts, dtype=float)
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(picture, len(numbers)) for picture in pictures]
    if not len(rows) or len(rows) != len(places):
        raise ValueError(f"{len(rows)} rows and {len(places)} pictures, so no interval")
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, places, rows)  # [pictures, K]
    generator, even = np.random.default_rng(seed), np.full(len(sums), 1 / len(sums))
    scores = []
    for start in range(0, draws, _AT_ONCE):
        drawn = generator.multinomial(len(sums), even, size=min(_AT_ONCE, draws - start))  # [draws, pictures]
        scores.append(combine(drawn @ sums))
    low, high = np.quantile(np.concatenate(scores), _LEVELS)
    return float(low), float(high)


def with_interval(name: str, values: Sequence[float], pictures: Sequence[Hashable]) -> dict[str, float]:
    """A mean under its name and, if there are two pictures or more, its interval as NAME_low and NAME_high."""
    found = {name: sum(values) / len(values)}
    if len(set(pictures)) > 1:
        found[f"{name}_low"], found[f"{name}_high"] = interval_by_picture(values, pictures)
    return found
