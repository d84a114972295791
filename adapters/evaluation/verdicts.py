"""What the controls beside a score, and a comparison with another adapter, say in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONTROLS = (  # the name of the control, what it is, and what it means if the adapter is not above it
    ("blank", "the same questions on grey pictures", "what is asked may be answered without looking"),
    ("shuffled", "the same questions on other rows' pictures", "the answers may not come from these pictures"),
    ("commonest", "each question's commonest answer in training", "a table of answers may do as well"),
)
_SURE = 0.05  # between confidence and share of right answers


def verdicts(scores: Mapping[str, Any], measure: str) -> list[str]:
    """Sentences about the controls that were scored, the training's share in the test, and the confidences.

    Args:
        scores: as `serve.evaluation.run.evaluate` returns them. "over_blank", "over_shuffled" and "over_commonest",
            with "_low" and "_high", are how much the adapter is above each control.
        measure: the score that these are of, such as "exact_match".
    """
    told = [_over(scores, measure, *control) for control in _CONTROLS if f"over_{control[0]}" in scores]
    if scores.get("in_training"):
        told.append(
            f"{scores['in_training']} of the {scores.get('pictures', scores['n'])} pictures were learned from too, so"
            " the scores flatter."
        )
    if "expected_calibration_error" in scores and "confidence" in scores:
        told.append(_sureness(scores, measure))
    return told


def compared(against: Mapping[str, Any]) -> list[str]:
    """A comparison in words.

    Args:
        against: as `adapters.evaluation.comparison.compare_hits` returns it, and the "name" of the second.
    """
    difference, low, high = (against[f"difference{end}"] for end in ("", "_low", "_high"))
    interval = f" (95 % interval by picture {100 * low:.1f} to {100 * high:.1f})" if low is not None else ""
    verdict = "One picture has no interval."
    if low is not None:
        verdict = "That is more than chance." if low > 0 or high < 0 else "That is no more than chance."
    return [
        f"On the same questions {against['name']} has {amount(against['second'], '')} exact answers,"
        f" {100 * abs(difference):.1f} points {'fewer' if difference < 0 else 'more'}{interval}. {verdict}",
        f"{against['first_only']} are right with the first alone and {against['second_only']} with {against['name']}"
        f" alone, {against['both']} with both, {against['neither']} with neither: p = {against['mcnemar_p']:.3g}"
        " (McNemar's exact test, which takes questions for independent).",
    ]


def amount(value: float, measure: str) -> str:
    """A score as people write it: CIDEr as it is, a fraction in per cent."""
    return f"{value:.3f}" if measure == "CIDEr" else f"{value:.1%}".replace("%", " %")


def _over(scores: Mapping[str, Any], measure: str, name: str, what: str, doubt: str) -> str:
    control = scores["commonest_answer"] if name == "commonest" else scores[f"{name}_{measure}"]
    begin = f"{what[0].upper()}{what[1:]} would score {amount(control, measure)}: the adapter is "
    over, low, high = (scores.get(f"over_{name}{end}") for end in ("", "_low", "_high"))
    assert over is not None
    apart = _points(abs(over), measure)
    if low is None or high is None:
        return f"{begin}{apart} {'above' if over > 0 else 'below'} that. One picture has no interval."
    interval = f"(95 % interval {_points(low, measure, plain=True)} to {_points(high, measure, plain=True)})"
    if low > 0:
        return f"{begin}{apart} above that {interval}, which is more than chance."
    if high < 0:
        return f"{begin}{apart} below that {interval}: {doubt}."
    return f"{begin}{apart} {'above' if over > 0 else 'below'} that {interval}, no more than chance: {doubt}."


def _points(value: float, measure: str, *, plain: bool = False) -> str:
    if measure == "CIDEr":
        return f"{value:.3f}"
    return f"{100 * value:.1f}" + ("" if plain else " points")


def _sureness(scores: Mapping[str, Any], measure: str) -> str:
    apart = scores["confidence"] - scores[measure]
    how = "about as sure as it is right"
    if abs(apart) > _SURE:
        how = "surer than it is right" if apart > 0 else "more often right than it is sure"
    return (
        f"Its mean confidence is {amount(scores['confidence'], '')}, and {amount(scores[measure], '')} are right: it is"
        f" {how}. The expected calibration error is {amount(scores['expected_calibration_error'], '')}."
    )
