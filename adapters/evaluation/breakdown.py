"""Where an adapter is right and where it is wrong: scores by group, and which answer it takes for which."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from adapters.data.answers import normalise
from adapters.data.examples import Example
from adapters.evaluation.vqa import exact_match, interval_by_picture

CONFUSIONS = 20  # pairs of answers that are named


def break_down(predictions: Sequence[str], examples: Sequence[Example], *, sets: bool = False) -> dict[str, Any]:
    """Scores of short answers by group.

    Args:
        predictions: one answer for each example.
        examples: the rows, each with one answer or several.
        sets: as in `adapters.evaluation.vqa.exact_match`.

    Returns:
        "by_kind", of the rows that say their kind; "by_question", by its words; "by_opening", by the question's first
        two words, as VQAv2's question types go; "by_answer", by the right answer, the commonest if a row has several.
        Each maps a group to what `score_groups` says of it, and is left out if no row belongs to one. "confusions" is
        what `confusions` returns.
    """
    pairs = list(zip(predictions, examples, strict=True))
    hits = [exact_match(said, example.answers, sets=sets) for said, example in pairs]
    pictures = [tuple(image.digest() for image in example.images) for example in examples]
    labels: dict[str, list[str | None]] = {
        "by_kind": [example.kind for example in examples],
        "by_question": [_spoken(example.question) for example in examples],
        "by_opening": [" ".join(_spoken(example.question).split()[:2]) for example in examples],
        "by_answer": [right_answer(example.answers) for example in examples],
    }
    groups = {name: score_groups(each, hits, pictures) for name, each in labels.items()}
    found = {name: group for name, group in groups.items() if group}
    return found | {"confusions": confusions(predictions, examples, sets=sets)}


def score_groups(
    labels: Sequence[str | None], hits: Sequence[bool], pictures: Sequence[Hashable]
) -> dict[str, dict[str, float]]:
    """Exact match of each group, the largest group first.

    Args:
        labels: the group of each row; a row without one counts nowhere.
        hits: whether each row was answered right.
        pictures: which picture each row is about.

    Returns:
        For each group "n", "exact_match" and, of a group with two pictures or more, "exact_match_low" and
        "exact_match_high", the 95 % interval of `adapters.evaluation.vqa.interval_by_picture`.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        if label:
            members[label].append(row)
    found = {}
    for label, rows in sorted(members.items(), key=lambda item: -len(item[1])):
        theirs, shown = [hits[row] for row in rows], [pictures[row] for row in rows]
        scores = {"n": len(rows), "exact_match": sum(theirs) / len(rows)}
        if len(set(shown)) > 1:
            scores["exact_match_low"], scores["exact_match_high"] = interval_by_picture(theirs, shown)
        found[label] = scores
    return found


def confusions(
    predictions: Sequence[str], examples: Sequence[Example], *, most: int = CONFUSIONS, sets: bool = False
) -> list[dict[str, str | int]]:
    """The most frequent mistakes: which right answer was taken for which other.

    Returns:
        {"right", "given", "n", "of"} for each pair of answers, normalised, the most frequent first: so many of the
        rows with that right answer were answered so.
    """
    rights = [right_answer(example.answers) for example in examples]
    totals = Counter(rights)
    wrong = Counter(
        (right, normalise(said))
        for right, said, example in zip(rights, predictions, examples, strict=True)
        if not exact_match(said, example.answers, sets=sets)
    )
    return [
        {"right": right, "given": given, "n": count, "of": totals[right]}
        for (right, given), count in wrong.most_common(most)
    ]


def right_answer(answers: Sequence[str]) -> str:
    """The commonest of a row's answers, normalised; of equally common ones the first."""
    return Counter(normalise(answer) for answer in answers).most_common(1)[0][0]


def _spoken(question: str) -> str:
    """A question in lower case with single spaces, without the mark at its end."""
    return normalise(question).rstrip("?\uff1f ")
