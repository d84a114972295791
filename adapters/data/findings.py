"""What is worth knowing of rows that are read well: repetitions, contradictions, scripts, what answers there are."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapters.data.answers import normalise
from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.question_alone import QuestionAlone, question_alone

COMMONEST = 10  # answers that are listed
NAMED = 20  # repetitions, contradictions and pictures that are listed; all are counted
HARDLY_NEEDED = 0.8  # share of the answers that the question alone gives


@dataclass(frozen=True)
class Findings:
    """What good rows hold.

    Attributes:
        distinct_answers: as they are compared.
        commonest_answers: the answer and how often it is given, the commonest first.
        scripts: rows by the script that most letters of their texts are in, such as "LATIN" or "CJK".
        longest_answer: in characters; 0 if there is none.
        longest_answer_row: the row that holds it; 0 if there is none.
        repeated: how many rows ask the same of the same pictures as an earlier row, with the same answers.
        repeated_rows: the first of them: the earlier row and the later.
        contradicting: how many rows ask the same of the same pictures as an earlier row, with other answers.
        contradicting_rows: the first of them, as `repeated_rows`.
        same_pictures: pictures of the same bytes under several names, the first of them.
        question_alone: how far the question alone gets; None if it cannot be told.
        notes: what to look at, a sentence each.
    """

    distinct_answers: int
    commonest_answers: tuple[tuple[str, int], ...]
    scripts: Mapping[str, int]
    longest_answer: int
    longest_answer_row: int
    repeated: int
    repeated_rows: tuple[tuple[int, int], ...]
    contradicting: int
    contradicting_rows: tuple[tuple[int, int], ...]
    same_pictures: tuple[tuple[str, ...], ...]
    question_alone: QuestionAlone | None
    notes: tuple[str, ...]


def find_out(
    examples: Sequence[Example], digests: Mapping[ImageRef, str], unread: Mapping[str, int], *, rows: int
) -> Findings:
    """Look through rows.

    Args:
        examples: the good rows.
        digests: of their pictures' bytes.
        unread: fields that nothing reads, with how many rows have them.
        rows: of the file, good and bad.
    """
    answers = Counter(normalise(answer) for example in examples for answer in example.answers)
    longest = max(examples, key=lambda example: max(map(len, example.answers), default=0), default=None)
    scripts = Counter(filter(None, (_script(example) for example in examples)))
    repeated, contradicting = _again(examples, digests)
    alone = question_alone(examples)
    names: dict[str, dict[str, None]] = {}
    for image, digest in digests.items():
        names.setdefault(digest, {})[image.label] = None
    same = [tuple(labels) for labels in names.values() if len(labels) > 1]
    return Findings(
        distinct_answers=len(answers),
        commonest_answers=tuple(sorted(answers.items(), key=lambda pair: (-pair[1], pair[0]))[:COMMONEST]),
        scripts=dict(scripts.most_common()),
        longest_answer=max(map(len, longest.answers), default=0) if longest is not None else 0,
        longest_answer_row=longest.row if longest is not None and longest.answers else 0,
        repeated=len(repeated),
        repeated_rows=tuple(repeated[:NAMED]),
        contradicting=len(contradicting),
        contradicting_rows=tuple(contradicting[:NAMED]),
        same_pictures=tuple(same[:NAMED]),
        question_alone=alone,
        notes=tuple(_notes(examples, answers, unread, repeated, contradicting, len(same), alone, rows)),
    )


def _again(
    examples: Sequence[Example], digests: Mapping[ImageRef, str]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows that ask what an earlier one asks of the same pictures: with the same answers, and with others."""
    first: dict[object, tuple[int, frozenset[str]]] = {}
    repeated: list[tuple[int, int]] = []
    contradicting: list[tuple[int, int]] = []
    for example in examples:
        said = tuple((turn.role, turn.text) for turn in example.history)
        pictures = tuple(digests.get(image, image.label) for image in example.images)
        given = frozenset(normalise(answer) for answer in example.answers)
        asked = normalise(example.question)
        key: tuple[object, ...] = (pictures, said, asked, example.context, example.choices, example.language)
        key = (*key, given) if not asked else key  # a picture may have many captions
        row, before = first.setdefault(key, (example.row, given))
        if row == example.row:
            continue
        (repeated if given & before or given == before else contradicting).append((row, example.row))
    return repeated, contradicting


def _script(example: Example) -> str | None:
    counted: Counter[str] = Counter()
    for character in "".join((example.question, *example.answers))[:400]:
        if character.isalpha():
            counted["LATIN" if character.isascii() else unicodedata.name(character, "OTHER").split()[0]] += 1
    return min(counted, key=lambda name: (-counted[name], name)) if counted else None


def _notes(
    examples: Sequence[Example],
    answers: Counter[str],
    unread: Mapping[str, int],
    repeated: Sequence[object],
    contradicting: Sequence[object],
    same: int,
    alone: QuestionAlone | None,
    rows: int,
) -> list[str]:
    notes = []
    if unread:
        fields = ", ".join(f"'{name}'" + f" ({count:,} rows)" * (count < rows) for name, count in unread.items())
        notes.append(f"fields that nothing reads: {fields}; --columns gives a field another name")
    if repeated:
        notes.append(f"{len(repeated):,} rows repeat an earlier one: they count twice")
    if contradicting:
        notes.append(f"{len(contradicting):,} rows ask what an earlier one asks, and answer otherwise: correct one")
    if same:
        notes.append(f"{same:,} pictures are there under several names")
    foreign = sum(1 for one in examples if one.language == "en" and _script(one) not in (None, "LATIN"))
    if foreign:
        notes.append(f'{foreign:,} rows are not in Latin letters and say no language: write "language", such as "zh"')
    if len(answers) == 1 and len(examples) > 1:
        notes.append("all rows have the same answer: nothing but it is learned")
    if alone is not None:
        best = max(alone.by_question, alone.bag_of_words)
        if best >= HARDLY_NEEDED:
            notes.append(
                f"the question alone gives {best:.0%} of the answers, so the pictures are hardly needed: score with"
                " evaluate --blank-images too"
            )
    return notes
