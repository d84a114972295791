"""An evaluation as one HTML page that stands by itself: scores, controls, mistakes and pictures; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.data.examples import Example
from adapters.evaluation.breakdown import OTHER, confusion_table
from adapters.evaluation.calibration import calibration_bins
from adapters.evaluation.report_parts import MARK, card, figure, page, sentences, table, tile, words
from adapters.evaluation.report_plots import Scored, plot_calibration, plot_scores
from adapters.evaluation.verdicts import amount, compared, verdicts
from qformer.atomic import whole_file
from qformer.errors import UserError

SHOWN = 12  # answers in each list with pictures
_GROUPS = 15  # in each table of groups
_TILES = (
    ("exact_match", "exact answers"), ("accuracy", "accuracy"), ("F1", "F1 of yes"), ("precision", "precision of yes"),
    ("recall", "recall of yes"), ("yes_rate", "answered with yes"), ("vqa_accuracy", "VQA accuracy"), ("anls", "ANLS"),
    ("wups_0.9", "WUPS at 0.9"), ("wups_0.0", "WUPS at 0.0"), ("CIDEr", "CIDEr"), ("BLEU-4", "BLEU-4"),
    ("ROUGE-L", "ROUGE-L"), ("METEOR", "METEOR"), ("SPICE", "SPICE"),
    ("expected_calibration_error", "expected calibration error"),
)  # fmt: skip
_TABLES = (
    ("by_kind", "By kind"), ("by_form", "Closed and open questions"), ("by_question", "By question"),
    ("by_opening", "By the question's first words"), ("by_answer", "By right answer"),
)  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """A row with what was answered.

    Attributes:
        example: the row.
        said: the answer.
        confidence: from 0 to 1.
        score: 1 for a right answer and 0 for a wrong one; of a caption its CIDEr.
        rationale: the reasons that were written for it, if any were.
    """

    example: Example
    said: str
    confidence: float
    score: float
    rationale: str | None = None


@dataclass(frozen=True)
class Report:
    """What a page is made of.

    Attributes:
        title: of the page.
        facts: names and values that say what was scored and how, in their order.
        measure: the score that the controls are about: "exact_match", "accuracy" or "CIDEr".
        scores: as `serve.evaluation.run.evaluate` returns them.
        answered: the rows.
        sets: as in `adapters.evaluation.vqa.exact_match`.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    measure: str
    scores: Mapping[str, Any]
    answered: Sequence[Answered]
    sets: bool = False


def evaluation_page(report: Report) -> str:
    """The page as HTML; pictures are opened and drawn small into it."""
    scores, measure = report.scores, report.measure
    tiles = [
        tile(title, amount(scores[name], name), _interval(scores, name)) for name, title in _TILES if name in scores
    ]
    told = verdicts(scores, measure)
    if "over_blank" not in scores:
        told.append("How much of it comes from the pictures is not known here: --controls asks without them.")
    parts = [
        f'<div class="tiles">{"".join(tiles)}</div>',
        "<h2>What the controls say</h2>",
        figure(plot_scores(_bars(report), fractions=measure != "CIDEr"), "the score beside its controls"),
        sentences(told),
    ]
    if "against" in scores:
        parts += ["<h2>Compared with another adapter</h2>", sentences(compared(scores["against"]))]
    if measure != "CIDEr":
        parts += _calibration(report) + _confusions(report)
    parts += [part for key, title in _TABLES for part in _groups(scores.get(key, {}), title, measure)]
    parts += _shown(report)
    parts += [
        "<h2>What was scored</h2>",
        table(("", ""), [(words(name), words(value)) for name, value in report.facts]),
    ]
    return page(report.title, "\n".join(part for part in parts if part))


def save_report(report: Report, path: str | Path) -> None:
    """Write the page; an earlier page is replaced.

    Raises:
        UserError: it cannot be written (`check_report` says why before anything slow is done).
    """
    text = evaluation_page(report)
    try:
        with whole_file(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {path}: cannot be written ({error.strerror or error}); name another file") from error


def check_report(path: str | Path) -> None:
    """Say what is wrong with a page's name.

    Raises:
        UserError: it does not end in .html, its folder is not there, or another file stands there.
    """
    out = Path(path)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {path}: name a file that ends in .html, such as report.html")
    if out.is_dir() or not out.parent.is_dir():
        kind = "this is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(f"--report {path}: {kind}; name a file such as report.html")
    if out.exists() and MARK.encode() not in out.read_bytes()[:200]:
        raise UserError(f"--report {path}: another file stands there; name a new one, or delete it")


def _interval(scores: Mapping[str, Any], name: str) -> str:
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return "" if low is None or high is None else f"{amount(low, name)} to {amount(high, name)}"


def _bars(report: Report) -> list[Scored]:
    scores, measure = report.scores, report.measure
    bars: list[Scored] = [
        ("this adapter", scores[measure], scores.get(f"{measure}_low"), scores.get(f"{measure}_high"))
    ]
    for name, label in (
        (f"blank_{measure}", "grey pictures"), (f"shuffled_{measure}", "other rows' pictures"),
        ("commonest_answer", "commonest answer"),
    ):  # fmt: skip
        if name in scores and not (name == "commonest_answer" and scores.get("commonest_answer_from") == "test"):
            bars.append((label, scores[name], None, None))
    if "against" in scores:
        bars.append(("the other adapter", scores["against"]["second"], None, None))
    return bars


def _calibration(report: Report) -> list[str]:
    bins = calibration_bins([row.confidence for row in report.answered], [row.score for row in report.answered])
    return [
        "<h2>Calibration</h2>",
        figure(plot_calibration(bins), "share of right answers over confidence"),
        "<p>An answer's confidence is the geometric mean of its tokens' probabilities or, of choices, the choice's."
        " Below the dashed line the adapter is surer than it is right.</p>",
    ]


def _confusions(report: Report) -> list[str]:
    examples, said = [row.example for row in report.answered], [row.said for row in report.answered]
    rows, columns, counts = confusion_table(said, examples, sets=report.sets)
    if len(columns) < 2:
        return []
    lines = []
    for right, row in zip(rows, counts, strict=True):
        whole = max(sum(row), 1)
        cells = [
            f'<td class="{"hit" if name == right != OTHER else "miss"}" style="--share:{count / whole:.2f}">'
            f"{count or ''}</td>"
            for name, count in zip(columns, row, strict=True)
        ]
        lines.append(f"<tr>{_heading(right)}{''.join(cells)}</tr>")
    head = "".join(map(_heading, columns))
    return [
        "<h2>Which answer was taken for which</h2>",
        f'<div class="wide"><table class="confusion"><tr><th>right ↓ given →</th>{head}</tr>{"".join(lines)}</table>'
        f"</div><p>A line for each of the commonest right answers; “{OTHER}” stands for all others.</p>",
    ]


def _heading(answer: str) -> str:
    return f'<th title="{words(answer)}">{words(answer, most=16)}</th>'


def _groups(groups: Mapping[str, Mapping[str, float]], title: str, measure: str) -> list[str]:
    """The largest groups; nothing if there are not two of two rows or more."""
    large = [(name, group) for name, group in groups.items() if group["n"] > 1]
    if len(large) < 2:
        return []
    lines = [
        (
            words(name),
            f"{group['n']:.0f}",
            f'<span class="bar" style="--share:{group[measure]:.3f}"></span>{amount(group[measure], measure)}',
            _interval(group, measure),
        )
        for name, group in large[:_GROUPS]
    ]
    more = len(groups) - len(lines)
    rest = f"<p>… and {more:,} more groups.</p>" if more else ""
    head = ("", "rows", words(dict(_TILES).get(measure, measure)), "95 % interval")
    return [f"<h2>{words(title)}</h2>", table(head, lines), rest]


def _shown(report: Report) -> list[str]:
    captions = report.measure == "CIDEr"
    wrong = [row for row in report.answered if captions or row.score < 1]
    worst = sorted(wrong, key=lambda row: (row.score, -row.confidence))[:SHOWN]
    unsure = sorted(report.answered, key=lambda row: row.confidence)[:SHOWN]
    first = "The worst captions" if captions else "Wrong, and the surest of it"
    found = []
    for title, rows in ((first, worst), ("The least certain", unsure)):
        cells = "".join(
            card(row.example, row.said, row.confidence, row.score, captions=captions, rationale=row.rationale)
            for row in rows
        )
        found += [f"<h2>{title}</h2>", f'<div class="cards">{cells}</div>' if rows else "<p>None.</p>"]
    return found
