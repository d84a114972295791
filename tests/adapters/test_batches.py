"""The plan of an epoch: nothing lost, nothing twice, within its budgets, the same again."""

from __future__ import annotations

from collections import Counter

from adapters.data.batches import Picture, Question, plan_epoch, plan_validation
from adapters.data.images import ImageRef


def pictures(count: int = 20, questions: int = 7) -> list[Picture]:
    made = []
    for p in range(count):
        image = ImageRef(str(p), data=bytes([p]))
        asked = tuple(Question((p, q, *range(q)), ((p, 1),), "") for q in range(questions))
        made.append(Picture((image,), (3, -1, -1), asked))
    return made


def test_every_question_once_an_epoch_in_another_order() -> None:
    options = {"seed": 1, "batch_size": 16, "row_tokens": 40}
    first = plan_epoch(pictures(), epoch=0, **options)
    asked = Counter(branch.own for step in first for row in step.rows for branch in row.branches)
    assert set(asked.values()) == {1} and len(asked) == 140
    assert first == plan_epoch(pictures(), epoch=0, **options)
    assert first != plan_epoch(pictures(), epoch=1, **options)
    assert all(step.answers >= 16 for step in first)
    assert all(len(row) <= 40 for step in first for row in step.rows)


def test_zero_row_tokens_gives_each_question_its_own_row() -> None:
    steps = plan_epoch(pictures(), seed=0, epoch=0, batch_size=10, row_tokens=0)
    assert all(len(row.branches) == 1 for step in steps for row in step.rows)


def test_micro_batches_fit_their_budget_and_split_among_processes() -> None:
    step = plan_validation(pictures(), row_tokens=40)
    whole = step.micro_batches(120)
    assert all(len(batch) * max(map(len, batch)) <= 120 for batch in whole)
    assert sum(map(len, whole)) == len(step.rows)
    shares = [step.micro_batches(120, rank, 3) for rank in range(3)]
    rows = [row for share in shares for batch in share for row in batch]
    assert Counter(map(id, rows)) == Counter(map(id, step.rows))


def test_a_step_has_a_row_for_every_process() -> None:
    steps = plan_epoch(pictures(9, 1), seed=0, epoch=0, batch_size=1, row_tokens=40, world=4)
    assert [len(step.rows) for step in steps] == [4, 5]


def test_answers_are_drawn_by_their_share() -> None:
    image = ImageRef("x", data=b"x")
    many = [Picture((image,), (3,), (Question((5,), ((6,), (6,), (6,), (7,)), ""),))]
    drawn = Counter(
        plan_epoch(many, seed=0, epoch=epoch, batch_size=1, row_tokens=9)[0].rows[0].branches[0].answer
        for epoch in range(400)
    )
    assert 260 < drawn[(6,)] < 340  # three of four people said 6
