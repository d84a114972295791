"""Scores as people read them: a line each, what the controls say, then a table for each way of grouping the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 8  # lines of a table; --json has all
_TABLES = {
    "by_kind": "by kind",
    "by_form": "closed or open",
    "by_question": "by question",
    "by_opening": "by the question's first words",
    "by_answer": "by right answer",
}
_MEASURES = ("exact_match", "accuracy", "pointing", "CIDEr")  # the first that there is leads


def describe_scores(scores: Mapping[str, Any]) -> str:
    """Lines of single scores, an empty line, what the controls say, and tables of groups and of confusions."""
    from adapters.evaluation.verdicts import compared, verdicts

    single = {key: value for key, value in scores.items() if not isinstance(value, dict | list)}
    width = max(28, 2 + max(map(len, single)))
    lines = [f"{key:<{width}}{_written(value)}" for key, value in single.items()]
    measure = next((name for name in _MEASURES if name in scores), None)
    told = verdicts(scores, measure) if measure is not None else []
    told += compared(scores["against"]) if "against" in scores else []
    lines += ["", *told] if told else []
    for key, title in _TABLES.items():
        lines += _table(title, scores.get(key, {}))
    return "\n".join(lines + _confusions(scores.get("confusions", [])))


def describe_comparison(found: Mapping[str, Any], name: str) -> str:
    """A comparison of two files of predictions: its figures, and what they say.

    Args:
        found: as `serve.evaluation.predictions.compare_predictions` returns it.
        name: what the second is called.
    """
    from adapters.evaluation.verdicts import compared

    width = max(28, 2 + max(map(len, found)))
    lines = [f"{key:<{width}}{_written(value)}" for key, value in found.items()]
    if found["measure"] == "exact_match":
        lines += ["", *compared({**found, "name": name})]
    return "\n".join(lines)


def _written(value: object) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else f"{value:.4g}"


def _table(title: str, groups: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The largest groups, without those of a single row; nothing if that leaves fewer than two."""
    large = {name: group for name, group in groups.items() if group["n"] > 1}
    if len(large) < 2:
        return []
    shown = dict(list(large.items())[:SHOWN])
    width = max(26, *map(len, shown))
    measure = next(name for name in _MEASURES if name in next(iter(shown.values())))
    lines = ["", f"{title:<{width}}  {'n':>6}  {measure:<11}  interval"]
    for name, group in shown.items():
        low, high = group.get(f"{measure}_low"), group.get(f"{measure}_high")
        interval = f"{low:.3f}–{high:.3f}" if low is not None else ""
        lines.append(f"{name:<{width}}  {group['n']:>6}  {group[measure]:<11.3f}  {interval}".rstrip())
    return [*lines, *_rest(len(groups) - len(shown))]


def _confusions(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not pairs:
        return []
    named = [f"{pair['right']} → {pair['given']}" for pair in pairs[:SHOWN]]
    width = max(26, *map(len, named))
    lines = ["", f"{'right answer → given':<{width}}  {'n':>6}  of"]
    lines += [f"{name:<{width}}  {pair['n']:>6}  {pair['of']}" for name, pair in zip(named, pairs[:SHOWN], strict=True)]
    return [*lines, *_rest(len(pairs) - SHOWN)]


def _rest(count: int) -> list[str]:
    return [f"… and {count:,} more; --json lists them"] if count > 0 else []
