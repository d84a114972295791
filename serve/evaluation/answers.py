"""Scores of what an adapter says, with those of its controls: short answers, yes-or-no probes and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adapters.data.examples import Example
from adapters.evaluation.breakdown import break_down, right_answer, score_groups, spoken
from adapters.evaluation.calibration import expected_calibration_error
from adapters.evaluation.captions import cider_of_each, score_captions
from adapters.evaluation.comparison import compare_hits
from adapters.evaluation.intervals import with_interval
from adapters.evaluation.java_scores import java_scores
from adapters.evaluation.probes import plain, says_yes, score_probes
from adapters.evaluation.report import Answered
from adapters.evaluation.short_answers import mean, over, pictures_of, score_short_answers
from adapters.evaluation.vqa import as_written_only, commonest_answers, exact_match
from adapters.evaluation.wordnet import WordNet
from adapters.inference.reasoning_controls import blanked, shuffled
from adapters.inference.request import Completion
from qformer.errors import UserError

Ask = Callable[[Sequence[Example]], Sequence[Completion]]
Tell = Callable[[str], None]
Known = Sequence[tuple[str, Sequence[str]]]


def score_answers(
    examples: Sequence[Example],
    ask: Ask,
    *,
    known: Known,
    sets: bool,
    wordnet: WordNet | None,
    controls: bool,
    against: tuple[str, Ask] | None,
    tell: Tell,
) -> tuple[dict[str, Any], list[Answered]]:
    """Score short answers; what is returned is described at `serve.evaluation.run.evaluate`.

    Args:
        examples: the rows.
        ask: what answers them.
        known: questions and answers of the training.
        sets: as in `adapters.evaluation.vqa.exact_match`.
        wordnet: where WUPS takes meanings from; None leaves it out.
        controls: also ask about grey pictures and about other rows' pictures.
        against: the name of another adapter, and what asks it.
        tell: called with a line for whatever a reader of the scores must know.
    """
    swapped = shuffled(examples) if controls else []  # first, since it may find that there is nothing to shuffle
    said = ask(examples)
    texts = [one.text for one in said]
    asked = {"blank": [blanked(row) for row in examples], "shuffled": swapped} if controls else {}
    scores, answered = score_short_answers(
        examples,
        texts,
        [one.confidence for one in said],
        known=known,
        sets=sets,
        wordnet=wordnet,
        controls={name: [one.text for one in ask(rows)] for name, rows in asked.items()},
    )
    hits = [one.score == 1 for one in answered]
    if against is not None:
        other = [one.text for one in against[1](examples)]
        theirs = [exact_match(text, row.answers, sets=sets) for text, row in zip(other, examples, strict=True)]
        scores["against"] = {"name": against[0], **compare_hits(hits, theirs, pictures_of(examples))}
    pairs = [(text, row.answers) for text, row in zip(texts, examples, strict=True)]
    _tell_of_forms(pairs, hits, sets=sets, wordnet=wordnet, tell=tell)
    return scores | break_down(texts, examples, sets=sets), answered


def score_probe_answers(
    examples: Sequence[Example],
    ask: Ask,
    *,
    known: Known,
    controls: bool,
    against: tuple[str, Ask] | None,
    tell: Tell,
) -> tuple[dict[str, Any], list[Answered]]:
    """Score yes-or-no probes as POPE does; arguments as for `score_answers`.

    Raises:
        UserError: a right answer is neither yes nor no.
    """
    swapped = shuffled(examples) if controls else []
    answers, pictures = [right_answer(example.answers) for example in examples], pictures_of(examples)
    for example, answer in zip(examples, answers, strict=True):
        if answer not in ("yes", "no"):
            raise UserError(f"{example.where}: the answer is '{answer}', and probes take yes or no: use --task vqa")
    right = [answer == "yes" for answer in answers]

    def hits_of(texts: Sequence[str]) -> list[bool]:
        return [says_yes(text) == yes for text, yes in zip(texts, right, strict=True)]

    said = ask(examples)
    texts = [one.text for one in said]
    hits, yes = hits_of(texts), [says_yes(text) for text in texts]
    scores: dict[str, Any] = {"n": len(examples), "pictures": len(set(pictures))}
    scores |= score_probes(yes, right, pictures)
    unclear = [text for text in texts if not plain(text)]
    scores["unclear"] = len(unclear)
    if unclear:
        tell(f"{len(unclear)} answers say neither yes nor no, such as '{unclear[0]}'; as in POPE, they count as yes")
    confidences = [one.confidence for one in said]
    scores["confidence"] = mean(confidences)
    scores["expected_calibration_error"] = expected_calibration_error(confidences, hits)
    guesses = hits_of(commonest_answers([row.question for row in examples], [[one] for one in answers], known))
    scores |= {"commonest_answer": mean(guesses), "commonest_answer_from": "training" if known else "test"}
    if known:
        scores |= over("commonest", guesses, hits, pictures)
    if controls:
        for name, asked in (("blank", [blanked(row) for row in examples]), ("shuffled", swapped)):
            blind = [one.text for one in ask(asked)]
            alone = score_probes([says_yes(text) for text in blind], right, pictures)
            scores |= {f"{name}_{score}": alone[score] for score in ("accuracy", "F1", "yes_rate")}
            scores |= over(name, hits_of(blind), hits, pictures)
    if against is not None:
        theirs = hits_of([one.text for one in against[1](examples)])
        scores["against"] = {"name": against[0], **compare_hits(hits, theirs, pictures)}
    kinds: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        kinds.setdefault(example.kind or "", []).append(row)
    by_kind = {
        kind: score_probes([yes[row] for row in rows], [right[row] for row in rows], [pictures[row] for row in rows])
        for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1]))
        if kind
    }
    questions = [spoken(example.question) for example in examples]
    groups = {"by_kind": by_kind, "by_question": score_groups(questions, {"accuracy": hits}, pictures)}
    answered = [Answered(*row) for row in zip(examples, texts, confidences, map(float, hits), strict=True)]
    return scores | {name: group for name, group in groups.items() if group}, answered


def score_caption_answers(
    examples: Sequence[Example], ask: Ask, *, language: str, controls: bool, tell: Tell
) -> tuple[dict[str, Any], list[Answered]]:
    """Score captions; arguments as for `score_answers`, but that each example is a picture with all its captions."""
    swapped = shuffled(examples) if controls else []
    answers, pictures = [example.answers for example in examples], pictures_of(examples)
    said = ask(examples)
    texts = [one.text for one in said]
    each = cider_of_each(texts, answers, language=language)
    by_java, left_out = java_scores(texts, answers, language=language)
    for reason in left_out.values():
        tell(reason)
    scores: dict[str, Any] = {**score_captions(texts, answers, language=language), **by_java}
    scores |= with_interval("CIDEr", each, pictures)
    scores["confidence"] = mean([one.confidence for one in said])
    if controls:
        for name, asked in (("blank", [blanked(row) for row in examples]), ("shuffled", swapped)):
            theirs = cider_of_each([one.text for one in ask(asked)], answers, language=language)
            scores |= {f"{name}_CIDEr": mean(theirs), **over(name, theirs, each, pictures)}
    confidences = [one.confidence for one in said]
    return scores, [Answered(*row) for row in zip(examples, texts, confidences, each, strict=True)]


def _tell_of_forms(
    pairs: Sequence[tuple[str, Sequence[str]]],
    hits: Sequence[bool],
    *,
    sets: bool,
    wordnet: WordNet | None,
    tell: Tell,
) -> None:
    """Say where another way of comparing answers would score otherwise."""
    in_any_order = sum(exact_match(*pair, sets=True) for pair in pairs) - sum(hits)
    if in_any_order > 0:
        tell(f"{in_any_order} more answers would be right as lists in any order, which --match set is for")
    strict = sum(as_written_only(*pair) for pair in pairs)
    if strict:
        tell(
            f"vqa_accuracy counts {strict} answers as wrong that differ in form alone from one that all people gave:"
            " there the official evaluation compares as it is written"
        )
    if sets and wordnet is None:
        tell("WUPS, DAQUAR's other score, is left out: it needs --wordnet with a folder of WordNet")
