"""Where an adapter is right and where it is wrong: scores by group, and which answer it takes for which."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from adapters.data.answers import normalise
from adapters.data.examples import Example
from adapters.evaluation.intervals import with_interval
from adapters.evaluation.vqa import exact_match, vqa_accuracy

CONFUSIONS = 20  # pairs of answers that are named
OTHER = "…"  # stands for all answers that have no row or column of their own


def break_down(predictions: Sequence[str], examples: Sequence[Example], *, sets: bool = False) -> dict[str, Any]:
    """Scores of short answers by group.

    Args:
        predictions: one answer for each example.
        examples: the rows, each with one answer or several.
        sets: as in `adapters.evaluation.vqa.exact_match`.

    Returns:
        "by_kind", of the rows that say their kind; "by_form", closed questions apart from open ones (`form_of`);
        "by_question", by its words; "by_opening", by the question's first two words, as VQAv2's question types go;
        "by_answer", by the right answer, the commonest if a row has several.
        Each maps a group to what `score_groups` says of it, and is left out if no row belongs to one. "confusions" is
        what `confusions` returns.
    """
    pairs = list(zip(predictions, examples, strict=True))
    hits = [exact_match(said, example.answers, sets=sets) for said, example in pairs]
    scores: dict[str, Sequence[float]] = {
        "exact_match": hits,
        "vqa_accuracy": [vqa_accuracy(said, example.answers) for said, example in pairs],
    }
    pictures = [tuple(image.digest() for image in example.images) for example in examples]
    labels: dict[str, list[str | None]] = {
        "by_kind": [example.kind for example in examples],
        "by_form": [form_of(example) for example in examples],
        "by_question": [spoken(example.question) for example in examples],
        "by_opening": [" ".join(spoken(example.question).split()[:2]) for example in examples],
        "by_answer": [right_answer(example.answers) for example in examples],
    }
    groups = {name: score_groups(each, scores, pictures) for name, each in labels.items()}
    found = {name: group for name, group in groups.items() if group}
    return found | {"confusions": confusions(predictions, examples, sets=sets)}


def form_of(example: Example) -> str:
    """ "closed" if the question's answers are all yes or no or it has choices, else "open".

    A row whose own kind is closed or open is what it says, as in VQA-RAD.
    """
    if example.kind is not None and example.kind.lower() in ("closed", "open"):
        return example.kind.lower()
    closed = bool(example.choices) or {normalise(answer) for answer in example.answers} <= {"yes", "no"}
    return "closed" if closed else "open"


def score_groups(
    labels: Sequence[str | None], scores: Mapping[str, Sequence[float]], pictures: Sequence[Hashable]
) -> dict[str, dict[str, float]]:
    """Mean scores of each group, the largest group first.

    Args:
        labels: the group of each row; a row without one counts nowhere.
        scores: of each row, by their names.
        pictures: which picture each row is about.

    Returns:
        For each group "n", each score and, of a group with two pictures or more, the first score's 95 % interval by
        picture (`adapters.evaluation.intervals.interval_by_picture`), its name with "_low" and "_high" behind it.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        if label:
            members[label].append(row)
    first = next(iter(scores))
    found = {}
    for label, rows in sorted(members.items(), key=lambda item: -len(item[1])):
        means = {name: sum(values[row] for row in rows) / len(rows) for name, values in scores.items()}
        interval = with_interval(first, [scores[first][row] for row in rows], [pictures[row] for row in rows])
        found[label] = {"n": len(rows), **interval, **means}
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


def confusion_table(
    predictions: Sequence[str], examples: Sequence[Example], *, most: int = 10, sets: bool = False
) -> tuple[list[str], list[str], list[list[int]]]:
    """How often each right answer was answered by which.

    Args:
        predictions: one answer for each example.
        examples: the rows.
        most: right answers that have a row of their own, the commonest ones, and as many answers that were given.
        sets: as in `adapters.evaluation.vqa.exact_match`.

    Returns:
        The right answers, one a row; the given ones, one a column, the same ones first and in the same order; and the
        counts. What has no row or column of its own is counted under `OTHER`, which is last. An answer that is right
        counts as the row's right answer, in whatever words.
    """
    rights = [right_answer(example.answers) for example in examples]
    given = [
        right if exact_match(said, example.answers, sets=sets) else normalise(said)
        for right, said, example in zip(rights, predictions, examples, strict=True)
    ]
    rows = [answer for answer, _ in Counter(rights).most_common(most)]
    others = [answer for answer, _ in Counter(given).most_common() if answer not in rows]
    columns = [*rows, *others[: max(most - len(rows), 2)]]
    counts = Counter(
        (right if right in rows else OTHER, said if said in columns else OTHER)
        for right, said in zip(rights, given, strict=True)
    )
    rows += [OTHER] if any(right == OTHER for right, _ in counts) else []
    columns += [OTHER] if any(said == OTHER for _, said in counts) else []
    return rows, columns, [[counts[right, said] for said in columns] for right in rows]


def right_answer(answers: Sequence[str]) -> str:
    """The commonest of a row's answers, normalised; of equally common ones the first."""
    return Counter(normalise(answer) for answer in answers).most_common(1)[0][0]


def spoken(question: str) -> str:
    """A question in lower case with single spaces, without the mark at its end."""
    return normalise(question).rstrip("?\uff1f ")
