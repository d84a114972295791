"""Fitting the reader of classes: whole names that answers and captions say, beside those of the tower's classifier."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.tokenised import TokenisedPicture
from adapters.loading.assembly import Assembly
from adapters.loading.reader import LeftOut, Reader
from adapters.training.fitted_reader import FittedReader, apply_in_parts
from qformer.class_reader import ClassNames, ClassNumbers
from qformer.errors import UserError
from qformer.name_questions import NameQuestions, affirmed, either_or, is_open, kinds_of

MOST_NAMES = 768  # beside the classes; 2 280 numbers of each are kept in half precision, 3.5 MB
FEWEST = 2  # pictures that say a name
_NO_NAME = re.compile(r"(yes|no|none|true|false|maybe|left|right|indoors|outdoors|inside|outside)|[\d\W]+")


@torch.no_grad()
def fit_class_reader(assembly: Assembly, pictures: Sequence[TokenisedPicture]) -> FittedReader | None:
    """Fit a reader of classes to all pictures; None if their answers say too few names.

    A name is what questions answered with yes are about ("is there a harp?"), or an answer that a question gave the
    choice of. Pictures of which no such question is asked are left out of the fit, and scored as new ones are.

    Args:
        assembly: its first tower, its classifier, and its LLM's embeddings are used.
        pictures: tokenised training data.

    Raises:
        UserError: the tower has no classifier, or pictures are seen in views.
    """
    classifier = assembly.vision_side.encoders[0].classifier
    if classifier is None:
        raise UserError(
            "bridge.reader=classes: the image encoder was not trained as a classifier whose classes are known here; set"
            " it to names, or take pypi:efficientnet-lite2 with layer: -1"
        )
    if assembly.recipe.data.views > 1:
        raise UserError(
            f"data.views={assembly.recipe.data.views}: bridge.reader=classes leaves each training picture out as a"
            " whole picture, and would know its parts by heart: set data.views=1"
        )
    images: dict[str, ImageRef] = {}
    asked: dict[str, list[tuple[str, str]]] = {}
    for picture in pictures:
        for question in picture.questions if len(picture.images) == 1 else ():
            if question.caption is None:
                digest = picture.images[0].digest()
                images.setdefault(digest, picture.images[0])
                told = {assembly.prompts.decode(answer) for answer in question.answers}
                asked.setdefault(digest, []).extend((question.instruction, answer) for answer in told)
    names = _names(asked.values())
    if len(names) < 2:
        return None
    column = {name.lower(): index for index, name in enumerate(names)}
    known = NameQuestions(tuple(names))
    labels: dict[str, set[int]] = {}
    for digest, pairs in asked.items():
        things = [thing for question, answer in pairs if (thing := affirmed(question, answer))]
        things += [answer for question, answer in pairs if is_open(question) or either_or(question)]
        found = {column[thing.lower()] for thing in things if thing.lower() in column}
        if any(affirmed(question, answer) for question, answer in pairs) and found:
            labels[digest] = found
    said = torch.zeros(len(labels), len(names))
    for row, found in enumerate(labels.values()):
        said[row, list(found)] = 1.0
    words = list(names)
    for name in classifier.names:
        if name.lower() not in column:
            column[name.lower()] = len(words)
            words.append(name)
    columns = torch.tensor([column[name.lower()] for name in classifier.names])
    numbers_of = ClassNumbers(classifier)
    numbers = apply_in_parts(assembly.features, numbers_of, [images[digest] for digest in labels])
    regression, left_out = ClassNames.fit(numbers, said, columns)
    scores = dict(zip(labels, left_out, strict=True))
    open_ones = [
        (question, column[answer.lower()])
        for digest in labels
        for question, answer in asked[digest]
        if is_open(question) and answer.lower() in column
    ]
    kinds = dict(kinds_of(open_ones, len(names)))
    known = NameQuestions(tuple(words), kinds)
    known = replace(known, threshold=_threshold(known, asked, scores))
    vectors = assembly.word_vectors(words)
    reader = Reader(numbers_of, regression, vectors, questions=known, spell=assembly.spell)
    line = f"closed-form reader: {len(names)} names of {len(labels)} pictures, and {len(classifier.names)} classes"
    return FittedReader(reader, line, LeftOut(scores, {}))


def _names(asked: Iterable[Sequence[tuple[str, str]]]) -> list[str]:
    """Things that questions answered with yes are about, and answers of which a question gives the choice."""
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for pairs in asked:
        things = {thing for question, answer in pairs if (thing := affirmed(question, answer))}
        things |= {
            answer.lower() for question, answer in pairs if either_or(question) and not _NO_NAME.fullmatch(answer)
        }
        counts.update(things)
        for _, answer in pairs:
            written[answer.lower()] = answer  # as answers write it: "French horn"
    return sorted(written.get(name, name) for name, count in counts.most_common(MOST_NAMES) if count >= FEWEST)


def _threshold(
    known: NameQuestions, asked: Mapping[str, Sequence[tuple[str, str]]], scores: Mapping[str, Tensor]
) -> float:
    """The score from which on most questions about one name are rightly answered with yes, of left-out scores."""
    seen: list[tuple[float, bool]] = []
    for digest, left_out in scores.items():
        for question, answer in asked[digest]:
            if answer in ("yes", "no") and len(named := known.mentioned(question)) == 1:
                seen.append((left_out[named[0]].item(), answer == "yes"))
    if not seen:
        return 0.2
    seen.sort(reverse=True)
    right = best = sum(not there for _, there in seen)
    threshold = seen[0][0] + 1e-3
    for score, there in seen:
        right += 1 if there else -1
        if right > best:
            best, threshold = right, score
    return threshold
