"""The plots of a report, as SVG images that stand by themselves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapters.evaluation.calibration import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MAIN, _OTHER = "#333333", "#00695c", "#b0bec5"
Scored = tuple[str, float, float | None, float | None]
"""What was scored, its score, and its interval."""


def plot_scores(rows: Sequence[Scored], *, fractions: bool) -> bytes:
    """A bar for each row with its interval, the first in the main colour.

    Args:
        rows: at least one.
        fractions: the axis goes from 0 to 100 %.
    """
    from matplotlib.ticker import PercentFormatter

    figure = _figure(6.2, 0.9 + 0.45 * len(rows))
    axes = figure.add_subplot()
    for place, (_, value, low, high) in enumerate(rows):
        axes.barh(place, value, color=_OTHER if place else _MAIN, height=0.6)
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=_INK, linewidth=1.5, marker="|", markersize=8)
        edge = max(value, high or value)
        text = f"{100 * value:.1f} %" if fractions else f"{value:.3f}"
        axes.annotate(text, (edge, place), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.invert_yaxis()
    if fractions:
        axes.set_xlim(0, 1.17)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    else:
        axes.margins(x=0.2)
    _clean(axes)
    return _svg(figure)


def plot_calibration(bins: Sequence[Bin]) -> bytes:
    """The share of right answers over confidence, and below it how many answers each bin has."""
    figure = _figure(5.2, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color=_OTHER, linestyle="--", label="as sure as right")
    above.plot(
        [each.confidence for each in bins], [each.right for each in bins], color=_MAIN, marker="o", label="this adapter"
    )
    above.set_ylim(-0.03, 1.03)
    above.set_ylabel("share of right answers")
    above.legend(frameon=False, loc="upper left")
    below.bar(
        [each.low for each in bins], [each.n for each in bins], [each.high - each.low for each in bins], align="edge",
        color=_OTHER, edgecolor="white",
    )  # fmt: skip
    below.set_xlim(0, 1)
    below.set_xlabel("confidence")
    below.set_ylabel("answers")
    for axes in (above, below):
        _clean(axes)
    return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> bytes:
    """The figure, without the date and with the same names inside each time."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "querybridge"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
