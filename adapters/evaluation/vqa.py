"""Scores of short answers: exact match, the VQA accuracy of VQAv2, and what language alone scores."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from adapters.data.answers import answer_set, normalise

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # but for a decimal point
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word  # each apostrophe that may be missing
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it


def exact_match(prediction: str, answers: Sequence[str], *, sets: bool = False) -> bool:
    """Whether a prediction equals one of the answers, in the form of `adapters.data.answers.normalise`.

    Args:
        prediction: what was said.
        answers: the right ones.
        sets: an answer with commas is a list, in any order, and what is in it twice counts once. DAQUAR's answers
            are such lists (Malinowski and Fritz 2014, arXiv 1410.0210).
    """
    form = answer_set if sets else normalise
    said = form(prediction)
    return any(said == form(answer) for answer in answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy: the mean over leave-one-out sets of min(matching answers / 3, 1).

    Antol et al. 2015 (arXiv 1505.00468), section 5, as the official evaluation (github.com/GT-Vision-Lab/VQA) computes
    it. Answers are compared in the form of `vqa_form`; but if several people all gave the very same answer, the
    official evaluation leaves both sides as they are written, so that there "Yes" is not "yes". With a single answer,
    which VQAv2 never has, it is exact match in that form.
    """
    unanimous = len(answers) > 1 and len({_plain(answer) for answer in answers}) == 1
    form = _plain if unanimous else vqa_form
    said = form(prediction)
    given = [form(answer) for answer in answers]
    if len(given) == 1:
        return float(said == given[0])
    scores = []
    for left_out in range(len(given)):
        matching = sum(said == answer for index, answer in enumerate(given) if index != left_out)
        scores.append(min(matching / 3, 1.0))
    return sum(scores) / len(scores)


def as_written_only(prediction: str, answers: Sequence[str]) -> bool:
    """Whether `vqa_accuracy` calls an answer wrong that differs in form alone from the one that all people gave."""
    return vqa_accuracy(prediction, answers) == 0.0 and vqa_form(prediction) in map(vqa_form, answers)


def vqa_form(answer: str) -> str:
    """The form VQAv2 compares in: lower case, no punctuation and articles, digits for number words, apostrophes.

    A mark that is beside a space anywhere in the answer is left out everywhere, and so are all marks if there is a
    comma between digits; other marks become spaces. A full stop is left out unless a digit follows it. Characters are
    in Unicode's form NFKC first: a full-width digit is a digit.
    """
    said = _plain(answer)
    text, close = said, _COMMA_IN_NUMBER.search(said) is not None
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if close or f"{mark} " in said or f" {mark}" in said else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _plain(answer: str) -> str:
    return unicodedata.normalize("NFKC", answer).replace("\n", " ").replace("\t", " ").strip()


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]], *, sets: bool = False) -> dict[str, float]:
    """`exact_match` (with its `sets`) and `vqa_accuracy` as fractions, and `n`."""
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "n": len(pairs),
        "exact_match": sum(exact_match(said, given, sets=sets) for said, given in pairs) / max(len(pairs), 1),
        "vqa_accuracy": sum(vqa_accuracy(said, given) for said, given in pairs) / max(len(pairs), 1),
    }


def commonest_answers(
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    learned_from: Sequence[tuple[str, Sequence[str]]] = (),
) -> list[str]:
    """Each question answered as it is most often answered: what can be said without the picture.

    Args:
        questions: what is asked.
        answers: the right ones of each question.
        learned_from: questions with their answers, such as training's; a question that is not among them is answered
            by their commonest answer over all. If there are none, the very answers that are scored are counted, which
            flatters: a question that is asked once is then always right.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question, given in learned_from or zip(questions, answers, strict=True):
        counted = [normalise(answer) for answer in given]
        by_question[normalise(question)].update(counted)
        overall.update(counted)
    seen = (by_question.get(normalise(question)) or overall for question in questions)
    return [known.most_common(1)[0][0] for known in seen]


def commonest_answer_score(
    questions: Sequence[str],
    answers: Sequence[Sequence[str]],
    learned_from: Sequence[tuple[str, Sequence[str]]] = (),
    *,
    sets: bool = False,
) -> float:
    """Exact match of `commonest_answers`; `sets` as in `exact_match`."""
    guesses = commonest_answers(questions, answers, learned_from)
    return score(guesses, answers, sets=sets)["exact_match"]
