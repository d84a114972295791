"""ScienceQA's accuracy, in the columns of its leaderboard.

The categories are those of the authors' evaluation script (lupantech/ScienceQA, tools/evaluate_acc.py): TXT has a hint,
with or without a picture, IMG a picture, with or without a hint, and NO neither. One thing differs: what names no
choice is wrong here, where the authors, and those of multimodal chain of thought after them, draw a choice at random,
which is worth some right answers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from adapters.data.answers import LETTERS
from adapters.data.scienceqa import GRADES, SUBJECTS, ScienceProblem

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
_SUBJECT_COLUMN = dict(zip(SUBJECTS, COLUMNS, strict=False))
_BRACKETED = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(r"(?:the answer is\s+)?([A-Z])[.):]?", re.IGNORECASE)


def score_scienceqa(answers: Sequence[str], problems: Sequence[ScienceProblem]) -> dict[str, float]:
    """Score answers that are letters.

    Args:
        answers: one for each problem, such as "(A)" or "The answer is (A)."
        problems: what was asked; the leaderboard takes the 4 241 of the test split.

    Returns:
        "n", problems; "no_choice", answers that name none of their choices, which are wrong; and those of `COLUMNS`
        that have a problem, in per cent with two decimals. "Avg" is over all problems.

    Raises:
        ValueError: there are not as many answers as problems.
    """
    counted: defaultdict[str, list[bool]] = defaultdict(list)
    no_choice = 0
    for said, problem in zip(answers, problems, strict=True):
        chosen = choice_of(said, len(problem.choices))
        no_choice += chosen is None
        for column in _columns(problem):
            counted[column].append(chosen == problem.answer_index)
    scores = {
        column: round(100 * sum(counted[column]) / len(counted[column]), 2) for column in COLUMNS if counted[column]
    }
    return {"n": len(problems), "no_choice": no_choice, **scores}


def choice_of(answer: str, choices: int) -> int | None:
    """The place of the choice that an answer names by its letter; None if it names none, or several.

    Args:
        answer: a text with one letter in brackets, "(A)", or a letter alone, "A" or "The answer is A."
        choices: how many there are.
    """
    letters = set(_BRACKETED.findall(answer))
    if not letters and (alone := _ALONE.fullmatch(answer.strip())):
        letters = {alone[1].upper()}
    if len(letters) != 1:
        return None
    place = LETTERS.index(letters.pop())
    return place if place < choices else None


def _columns(problem: ScienceProblem) -> Iterator[str]:
    yield _SUBJECT_COLUMN[problem.subject]
    if problem.context:
        yield "TXT"
    if problem.image is not None:
        yield "IMG"
    if not problem.context and problem.image is None:
        yield "NO"
    yield "G1-6" if GRADES.index(problem.grade) < 6 else "G7-12"
    yield "Avg"
