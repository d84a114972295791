"""What is chosen by the size of the data, and budgets of time."""

from __future__ import annotations

import pytest

from adapters.choice import choose_settings, minutes_of
from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from qformer.errors import UserError


def rows(pictures: int, each: int) -> list[Example]:
    images = [ImageRef(f"{number}.png", None, str(number).encode()) for number in range(pictures)]
    return [
        Example(
            images=(image,), question=f"question {number}?", answers=("yes",), where=f"row {number}", id=str(number)
        )
        for image in images
        for number in range(each)
    ]


@pytest.mark.parametrize(
    ("pictures", "each", "reader"),
    [(431, 1, "answers"), (300, 2, "answers"), (160, 4, "answers"), (1501, 1, "names"), (640, 10, "names")],
)
def test_the_reader_follows_the_data(pictures: int, each: int, reader: str) -> None:
    choice = choose_settings(rows(pictures, each))
    assert f"bridge.reader={reader}" in choice.settings
    assert f"{pictures * each} questions about {pictures} pictures" in choice.reasons[0]
    assert all(setting.partition("=")[0] in " ".join(choice.reasons) or "0.0" in setting for setting in choice.settings)


@pytest.mark.parametrize(
    ("questions", "settings"),
    [(60, ("train.epochs=11", "train.batch_size=8")), (100, ("train.epochs=7", "train.batch_size=8")),
     (249, ("train.epochs=4", "train.batch_size=8")), (250, ())],
)  # fmt: skip
def test_very_few_questions_are_seen_more_often(questions: int, settings: tuple[str, ...]) -> None:
    assert choose_settings(rows(questions, 1)).settings[2:] == settings


@pytest.mark.parametrize(("budget", "minutes"), [("10m", 10.0), ("90s", 1.5), ("1.5h", 90.0), (" 2m ", 2.0)])
def test_budgets_are_read(budget: str, minutes: float) -> None:
    assert minutes_of(budget) == pytest.approx(minutes)


@pytest.mark.parametrize("budget", ["10", "m", "0m", "-1m", "ten minutes", "10 m", "1d", ""])
def test_what_is_no_budget_is_refused(budget: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        minutes_of(budget)
