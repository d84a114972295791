"""What `querybridge finetune DATA` sets by the size of the data, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.data.examples import Example
from qformer.errors import UserError

FEW_QUESTIONS = 1500  # the time of a reader of questions grows by their cube
VERY_FEW_QUESTIONS = 250  # of these four epochs are too few steps
_ANSWERS_TRAINED = 640  # at least, so that there are at least sixty steps
WITHOUT_READER = ("bridge.reader=null", "bridge.hide_queries=0.0")
"""For captions, which are too many different answers to score one by one."""
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0}


@dataclass(frozen=True)
class Choice:
    """Settings as `--set` takes them, and a line for each reason."""

    settings: tuple[str, ...]
    reasons: tuple[str, ...]


def choose_settings(examples: Sequence[Example]) -> Choice:
    """Settings for questions with short answers.

    Args:
        examples: all rows of the data, before any is held out.
    """
    pictures = len({tuple(image.digest() for image in example.images) for example in examples})
    questions = len(examples)
    size = f"{questions} questions about {pictures} pictures"
    if questions <= FEW_QUESTIONS:
        small: tuple[str, ...] = ()
        if questions < VERY_FEW_QUESTIONS:
            small = (f"train.epochs={max(4, -(-_ANSWERS_TRAINED // questions))}", "train.batch_size=8")
        return Choice(
            ("bridge.reader=answers", "bridge.hide_queries=0.5", *small),
            (
                f"{size}: so few teach a Q-Former little, so a closed-form reader of pictures and questions is fitted"
                " beside it (bridge.reader=answers)",
                "its queries are hidden in half of the training, so that the LLM learns to use the reader"
                " (bridge.hide_queries=0.5)",
                *([f"so few need more passes in smaller steps ({', '.join(small)})"] if small else []),
            ),
        )
    return Choice(
        ("bridge.reader=names", "bridge.hide_queries=0.0"),
        (f"{size}: a closed-form reader names what pictures show, beside the Q-Former (bridge.reader=names)",),
    )


def minutes_of(budget: str) -> float:
    """A budget of time, such as "90s", "10m" or "1.5h", in minutes.

    Raises:
        UserError: it is none, or nothing.
    """
    found = _BUDGET.fullmatch(budget.strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--budget {budget}: write a number and s, m or h, such as 10m")
    return float(found[1]) * _MINUTES[found[2]]
