"""Fitting the closed-form reader to a run's training data, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adapters.data.examples import sample_evenly
from adapters.data.image_ref import ImageRef
from adapters.data.tokenised import TokenisedPicture
from adapters.loading.assembly import Assembly
from adapters.loading.reader import AnswerReader, LeftOut, Reader, ngrams_of, question_numbers, spelled
from adapters.training.alignment import distinctive_names, is_word, names_in
from adapters.training.class_reader_fit import fit_class_reader
from adapters.training.fitted_reader import FittedReader, Look, apply_in_parts
from qformer.ridge_reader import NameRidge, PairRidge, PictureNumbers

MOST_PAIRS = 3000  # the time of a fit grows by the cube
FEWEST_PICTURES = 256  # that pairs are taken of, if there are so many: of fewer, some of their questions are taken
MOST_NAMES = 512
MOST_MAPPED = 512  # pictures that the map to numbers is fitted to
_FEWEST = 10


@dataclass(frozen=True)
class _Pairs:
    """Training questions about single pictures, as a regression takes them.

    Attributes:
        images: the M images of those that are fitted, each once, evenly over the data.
        questions: the U texts.
        keys: N pairs of an image's digest and a question's text.
        rows: [N, 2] long, a row of `images` and one of `questions`.
        answers: K answers, as token ids.
        wanted: [N, K], each row a distribution.
        whole: how many pairs the data have.
    """

    images: Sequence[ImageRef]
    questions: Sequence[str]
    keys: Sequence[tuple[str, str]]
    rows: Tensor
    answers: Sequence[tuple[int, ...]]
    wanted: Tensor
    whole: int


def _gather(pictures: Sequence[TokenisedPicture]) -> _Pairs | None:
    """About `MOST_PAIRS` pairs at most; None if there are too few of them, or too many different answers."""
    single = [picture for picture in pictures if len(picture.images) == 1]
    whole = sum(len(picture.questions) for picture in single)
    chosen = single
    if whole > MOST_PAIRS:
        chosen = list(sample_evenly(single, max(FEWEST_PICTURES, len(single) * MOST_PAIRS // whole)))
    each = None
    if sum(len(picture.questions) for picture in chosen) > MOST_PAIRS * 5 // 4:  # few pictures, very many questions
        each = max(1, MOST_PAIRS // len(chosen))
    pairs = [(picture.images[0], question) for picture in chosen for question in sample_evenly(picture.questions, each)]
    answers = sorted({answer for _, question in pairs for answer in question.answers})
    if len(pairs) < _FEWEST or not 2 <= len(answers) <= max(_FEWEST, len(pairs) * 3 // 4):
        return None
    images = list({image.digest(): image for image, _ in pairs}.values())
    questions = list(dict.fromkeys(question.instruction for _, question in pairs))
    keys = [(image.digest(), question.instruction) for image, question in pairs]
    row_of = {image.digest(): row for row, image in enumerate(images)}
    place_of = {question: place for place, question in enumerate(questions)}
    column = {answer: index for index, answer in enumerate(answers)}
    wanted = torch.zeros(len(pairs), len(answers))
    for row, (_, question) in enumerate(pairs):
        for answer in question.answers:
            wanted[row, column[answer]] += 1 / len(question.answers)
    rows = torch.tensor([[row_of[digest], place_of[question]] for digest, question in keys])
    return _Pairs(images, questions, keys, rows, answers, wanted, whole)


@torch.no_grad()
def fit_reader(
    assembly: Assembly, pictures: Sequence[TokenisedPicture], *, kind: str = "answers"
) -> FittedReader | None:
    """Fit a reader to tokenised questions; None if there are too few of them, or too many different answers.

    At most `MOST_PAIRS` pairs are fitted, of pictures evenly over the data; the others are scored as new ones are.

    Args:
        assembly: its towers and its LLM's embeddings are used.
        pictures: tokenised training data.
        kind: as `bridge.reader` has it: "names"; "classes", fitted to all pictures; or "answers", which reads the
            likely answer to each question too.

    Raises:
        UserError: the first tower has no classifier whose classes could be read.
    """
    if kind == "classes":
        return fit_class_reader(assembly, pictures)
    single = [picture for picture in pictures if len(picture.images) == 1]
    if (pairs := _gather(pictures)) is None:
        return None
    named = sample_evenly(single, MOST_PAIRS)
    images = list({picture.images[0].digest(): picture.images[0] for picture in named}.values())
    numbers_of, numbers = _numbers(assembly.features, images, places=True)
    names, said = _names(assembly, named, images)
    name_ridge, left_names = NameRidge.fit(numbers, said)
    reader = Reader(numbers_of, name_ridge, _name_vectors(assembly, names))
    by_digest = {image.digest(): scores for image, scores in zip(images, left_names, strict=True)}
    if kind != "answers":
        line = f"closed-form reader: {len(names)} names of {len(images)} pictures"
        return FittedReader(reader, line, LeftOut(by_digest, {}))
    known = {image.digest(): row for row, image in enumerate(images)}
    if all(image.digest() in known for image in pairs.images):
        numbers = numbers[[known[image.digest()] for image in pairs.images]]
    else:
        numbers = apply_in_parts(assembly.features, numbers_of, pairs.images)
    ngrams, rarity = _ngrams([question for _, question in pairs.keys], assembly.prompts.tokenizer)
    asked = question_numbers(pairs.questions, ngrams, rarity, assembly.prompts.tokenizer)
    ridge, left_answers = PairRidge.fit(numbers, asked, pairs.rows, pairs.wanted, numbers_of.widths)
    hits = (left_answers.argmax(dim=1) == pairs.wanted.argmax(dim=1)).float().mean().item()
    some = "" if len(pairs.keys) == pairs.whole else f" (of {pairs.whole})"
    return FittedReader(
        replace(reader, answers=AnswerReader(ridge, _spelled(assembly, pairs.answers), ngrams, rarity)),
        f"closed-form reader: right on {hits:.0%} of {len(pairs.keys)}{some} training questions, each with its picture"
        " left out",
        LeftOut(by_digest, dict(zip(pairs.keys, left_answers, strict=True))),
    )


@torch.no_grad()
def probe_answers(
    assembly: Assembly,
    pictures: Sequence[TokenisedPicture],
    asked: Sequence[tuple[ImageRef, str]],
    *,
    look: Look | None = None,
) -> list[str] | None:
    """Answers of a linear probe: ridge regression from a picture's mean and maximum, and the question's words.

    It has no bridge and no LLM, so it says what the frozen features alone are worth.

    Args:
        assembly: its towers, and its tokenizer for the questions.
        pictures: tokenised training data.
        asked: pictures with a question each.
        look: gives what is pooled of pictures; left out, the first tower's features.

    Returns:
        An answer to each; None if the training data do not suit a probe.
    """
    if (pairs := _gather(pictures)) is None:
        return None
    tokenizer = assembly.prompts.tokenizer
    look = look or (lambda images: assembly.features(images)[:1])
    numbers_of, numbers = _numbers(look, pairs.images, places=False)
    ngrams, rarity = _ngrams([question for _, question in pairs.keys], tokenizer)
    known = question_numbers(pairs.questions, ngrams, rarity, tokenizer)
    ridge, _ = PairRidge.fit(numbers, known, pairs.rows, pairs.wanted)
    new = apply_in_parts(look, numbers_of, [image for image, _ in asked])
    scores = ridge(new, question_numbers([question for _, question in asked], ngrams, rarity, tokenizer))
    texts = [assembly.prompts.decode(answer) for answer in pairs.answers]
    return [texts[index] for index in scores.argmax(dim=1).tolist()]


def _numbers(look: Look, images: Sequence[ImageRef], *, places: bool) -> tuple[PictureNumbers, Tensor]:
    """A map from features to numbers, fitted to some of the images, and all their numbers [M, r]."""
    fitted = PictureNumbers.fit(look(sample_evenly(images, MOST_MAPPED)), places=places)
    return fitted, apply_in_parts(look, fitted, images)


def _names(
    assembly: Assembly, pictures: Sequence[TokenisedPicture], images: Sequence[ImageRef]
) -> tuple[list[tuple[int, ...]], Tensor]:
    """Names that tell pictures apart, and which of them each picture's answers say, [M, W]."""
    bags = [names_in(assembly, picture) for picture in pictures]
    names = distinctive_names(bags, partial(is_word, assembly.prompts.tokenizer))
    row_of = {image.digest(): row for row, image in enumerate(images)}
    said = torch.zeros(len(row_of), len(names))
    column = {name: index for index, name in enumerate(names)}
    for picture, bag in zip(pictures, bags, strict=True):
        said[row_of[picture.images[0].digest()], [column[name] for name in bag if name in column]] = 1.0
    kept = said.sum(dim=0).argsort(descending=True, stable=True)[:MOST_NAMES]
    return [names[index] for index in kept.tolist()], said[:, kept]


def _table(assembly: Assembly) -> Tensor:
    """The LLM's embeddings, [V, D_l]."""
    return assembly.model.language.base.get_input_embeddings().weight.detach().float().cpu()


def _name_vectors(assembly: Assembly, names: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean embedding of each name's tokens, [W, D_l]."""
    table = _table(assembly)
    vectors = table.new_zeros(len(names), table.shape[1])
    for row, name in enumerate(names):
        vectors[row] = table[list(name)].mean(dim=0)
    return vectors


def _spelled(assembly: Assembly, answers: Sequence[tuple[int, ...]]) -> Tensor:
    """Each answer as `adapters.loading.reader.spelled` gives it, without special tokens: [K, SPELLED, D_l]."""
    table, special = _table(assembly), set(assembly.prompts.tokenizer.all_special_ids)
    plain = ([token for token in answer if token not in special] or answer for answer in answers)
    return torch.stack([spelled(table, tokens) for tokens in plain])


def _ngrams(questions: Sequence[str], tokenizer: object) -> tuple[Tensor, Tensor]:
    """The n-grams of the questions, [V, 2], and how rare each is, [V]: one counts for each pair it is asked in."""
    counts: dict[tuple[int, int], int] = {}
    for question in questions:
        for ngram in set(ngrams_of(question, tokenizer)):
            counts[ngram] = counts.get(ngram, 0) + 1
    ngrams = sorted(counts)
    rarity = torch.log(len(questions) / torch.tensor([counts[ngram] for ngram in ngrams])) + 0.1
    return torch.tensor(ngrams), rarity
