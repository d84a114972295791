"""Scores of short answers from what was said: of the adapter, and of the same questions with something taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.data.examples import Example
from adapters.evaluation.anls import anls
from adapters.evaluation.calibration import expected_calibration_error
from adapters.evaluation.comparison import paired_difference
from adapters.evaluation.intervals import with_interval
from adapters.evaluation.report import Answered
from adapters.evaluation.vqa import commonest_answers, exact_match, vqa_accuracy
from adapters.evaluation.wordnet import WordNet
from adapters.evaluation.wups import THRESHOLDS, wups


def score_short_answers(
    examples: Sequence[Example],
    texts: Sequence[str],
    confidences: Sequence[float],
    *,
    known: Sequence[tuple[str, Sequence[str]]] = (),
    guesses: Sequence[str] | None = None,
    sets: bool = False,
    wordnet: WordNet | None = None,
    controls: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, Any], list[Answered]]:
    """Score answers and their controls; what is returned is described at `serve.evaluation.run.evaluate`.

    Args:
        examples: the rows.
        texts: what was answered to each.
        confidences: of the answers, from 0 to 1.
        known: questions and answers of the training.
        guesses: the commonest answers in training to these questions, if they are known already.
        sets: as in `adapters.evaluation.vqa.exact_match`.
        wordnet: where WUPS takes meanings from; None leaves it out.
        controls: answers by the name of what was taken away, such as "blank".

    Returns:
        The scores of all rows, groups apart, and each row with its answer.
    """
    answers, pictures = [example.answers for example in examples], pictures_of(examples)

    def hits_of(said: Sequence[str]) -> list[bool]:
        return [exact_match(text, given, sets=sets) for text, given in zip(said, answers, strict=True)]

    hits = hits_of(texts)
    pairs = list(zip(texts, answers, strict=True))
    scores: dict[str, Any] = {"n": len(examples), "pictures": len(set(pictures))}
    scores |= with_interval("exact_match", hits, pictures)
    scores |= with_interval("vqa_accuracy", [vqa_accuracy(*pair) for pair in pairs], pictures)
    scores["anls"] = mean([anls(*pair) for pair in pairs])
    if wordnet is not None:
        for level in THRESHOLDS:
            scores[f"wups_{level}"] = mean([wups(*pair, wordnet, threshold=level) for pair in pairs])
    scores["confidence"] = mean(confidences)
    scores["expected_calibration_error"] = expected_calibration_error(confidences, hits)
    from_training = bool(known) or guesses is not None
    guesses = commonest_answers([row.question for row in examples], answers, known) if guesses is None else guesses
    scores["commonest_answer"] = mean(hits_of(guesses))
    scores["commonest_answer_from"] = "training" if from_training else "test"
    if from_training:
        scores |= over("commonest", hits_of(guesses), hits, pictures)
    for name, said in (controls or {}).items():
        theirs = hits_of(said)
        scores |= {f"{name}_exact_match": mean(theirs), **over(name, theirs, hits, pictures)}
    return scores, [Answered(*row) for row in zip(examples, texts, confidences, map(float, hits), strict=True)]


def pictures_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """What distinguishes each row's picture, or pictures, from another's."""
    return [tuple(image.digest() for image in example.images) for example in examples]


def over(
    name: str, control: Sequence[float], scores: Sequence[float], pictures: Sequence[tuple[str, ...]]
) -> dict[str, float]:
    """How much higher the adapter scores than a control, with its interval."""
    value, low, high = paired_difference(control, scores, pictures)
    found = {f"over_{name}": value}
    return found if low is None or high is None else found | {f"over_{name}_low": low, f"over_{name}_high": high}


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / max(len(values), 1)
