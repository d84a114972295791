"""Scores of answers that were reasoned to: accuracy over choices, ROUGE-L of the reasons, and what language alone does.

As in multimodal chain of thought (Zhang et al. 2023, arXiv 2302.00923, section 5): the answer's accuracy, and ROUGE-L
of the rationale with the given one. A fluent rationale can be false: its ROUGE-L is never reported alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

from adapters.data.answers import normalise
from adapters.evaluation.caption_tokens import caption_tokens
from adapters.evaluation.captions import rouge_l
from qformer.errors import UserError


class Reasoned(Protocol):
    """A row with a rationale, such as `adapters.data.scenes.questions.SceneQuestion`."""

    @property
    def question(self) -> str:
        """What is asked."""

    @property
    def answer(self) -> str:
        """The right answer; one of the choices if there are any."""

    @property
    def rationale(self) -> str:
        """The given reasons; "" if there are none."""

    @property
    def choices(self) -> Sequence[str]:
        """What may be answered; empty if anything may."""

    @property
    def kind(self) -> str | None:
        """What kind of question it is; None if the row does not say."""

    @property
    def steps(self) -> int | None:
        """Steps of the reasoning; None if the row does not say."""


def score_reasons(
    answers: Sequence[str],
    rationales: Sequence[str] | None,
    examples: Sequence[Reasoned],
    *,
    language: str = "en",
) -> dict[str, float]:
    """Score what a model answered and why.

    An answer is right if it equals the given one, both normalised (`adapters.data.answers.normalise`). One that
    equals none of its choices is wrong and counted: the nearest choice is not guessed.

    Args:
        answers: the model's answer to each example.
        rationales: the model's rationale for each; None if it was not asked for any.
        examples: the rows.
        language: of the rationales, "en" or "zh".

    Returns:
        "n", rows; "no_choice", answers that equal none of their choices; "accuracy", "accuracy_single_step",
        "accuracy_multi_step" and "accuracy_<kind>", fractions; and for rationales "rationale_ROUGE-L" with the same
        endings, means over the rows that have one. A group without rows has no entry.

    Raises:
        UserError: the right answer of a row is none of its choices.
        ValueError: there are not as many answers or rationales as examples.
    """
    right, no_choice = [], 0
    for row, (said, example) in enumerate(zip(answers, examples, strict=True), start=1):
        choices = {normalise(choice) for choice in example.choices}
        if choices and normalise(example.answer) not in choices:
            listed = ", ".join(example.choices)
            raise UserError(f"row {row}: the answer '{example.answer}' is none of its choices ({listed}): correct one")
        no_choice += bool(choices) and normalise(said) not in choices
        right.append(float(normalise(said) == normalise(example.answer)))
    scores = {"n": len(right), "no_choice": no_choice, **_means("accuracy", right, examples)}
    if rationales is None:
        return scores
    pairs = [pair for pair in zip(rationales, examples, strict=True) if pair[1].rationale.strip()]
    said_tokens = [caption_tokens(said, language) for said, _ in pairs]
    given_tokens = [[caption_tokens(example.rationale, language)] for _, example in pairs]
    values = rouge_l(said_tokens, given_tokens)
    return scores | _means("rationale_ROUGE-L", values, [example for _, example in pairs])


def language_control(examples: Sequence[Reasoned], learned_from: Sequence[Reasoned] | None = None) -> dict[str, float]:
    """What can be scored without the picture: each question is answered as it is most often answered.

    Args:
        examples: the rows to answer.
        learned_from: the rows to know answers from, such as those of training. A question whose words are not among
            them gets the choice that is the commonest answer to its kind. None learns from the very rows it answers,
            which is more than any model could know, and says little if most questions occur once.

    Returns:
        As `score_reasons` without rationales.

    Raises:
        UserError: there is nothing to learn from.
    """
    known = examples if learned_from is None else learned_from
    if not known:
        raise UserError("the control has no rows to learn answers from: give at least one")
    by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_kind: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    for example in known:
        by_question[normalise(example.question)][example.answer] += 1
        by_kind[example.kind][example.answer] += 1

    def guess(example: Reasoned) -> str:
        seen = by_question.get(normalise(example.question)) or by_kind[example.kind]
        return max(example.choices or seen or [""], key=lambda answer: seen[answer])

    return score_reasons([guess(example) for example in examples], None, examples)


def _means(name: str, values: Sequence[float], examples: Sequence[Reasoned]) -> dict[str, float]:
    """The mean of all values and of each group's."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for value, example in zip(values, examples, strict=True):
        for group in _groups(name, example):
            groups[group].append(value)
    return {group: sum(found) / len(found) for group, found in sorted(groups.items())}


def _groups(name: str, example: Reasoned) -> Iterator[str]:
    yield name
    if example.steps is not None:
        yield f"{name}_{'single' if example.steps <= 1 else 'multi'}_step"
    if example.kind is not None:
        yield f"{name}_{example.kind}"
