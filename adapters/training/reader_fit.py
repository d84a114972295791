"""Fitting the closed-form reader to a run's training data, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adapters.data.batches import TokenisedPicture
from adapters.data.image_ref import ImageRef
from adapters.loading.assembly import Assembly
from adapters.loading.reader import SPELLED, Reader, Scores, ngrams_of, question_numbers
from adapters.training.alignment import distinctive_names, is_word, names_in
from adapters.training.run_data import sample_evenly
from qformer.ridge_reader import NameRidge, PairRidge, PictureNumbers

MOST_PAIRS = 4000  # time grows by the cube: about a minute on one core
MOST_NAMES = 512
MOST_MAPPED = 512  # pictures that the map to numbers is fitted to
_CHUNK = 64  # pictures whose features are in memory at once
_FEWEST = 10


@dataclass(frozen=True)
class FittedReader:
    """A reader with what it says of its own training data.

    Attributes:
        reader: the reader.
        pairs: how many pairs of picture and question it was fitted to, of how many.
        hit_rate: how often the likeliest answer of a pair is right if its picture is left out.
        names: left-out scores of names by the picture's digest, each [W].
        answers: left-out scores of answers by the picture's digest and the question, each [K].
    """

    reader: Reader
    pairs: tuple[int, int]
    hit_rate: float
    names: Mapping[str, Tensor]
    answers: Mapping[tuple[str, str], Tensor]

    def left_out(self, images: Sequence[ImageRef], questions: Sequence[str]) -> Scores | None:
        """Scores of training pairs by all other pictures; None if one of them was not fitted to."""
        keys = [(image.digest(), question) for image, question in zip(images, questions, strict=True)]
        if not all(key in self.answers for key in keys):
            return None
        names = torch.stack([self.names[digest] for digest, _ in keys])
        return Scores(names, torch.stack([self.answers[key] for key in keys]))

    def __str__(self) -> str:
        fitted, all_pairs = self.pairs
        some = "" if fitted == all_pairs else f" (of {all_pairs})"
        return (
            f"closed-form reader: right on {self.hit_rate:.0%} of {fitted}{some} training questions, each with its"
            " picture left out"
        )


@torch.no_grad()
def fit_reader(assembly: Assembly, pictures: Sequence[TokenisedPicture]) -> FittedReader | None:
    """Fit a reader to tokenised questions; None if there are too few of them, or too many different answers.

    At most `MOST_PAIRS` pairs are fitted, of pictures evenly over the data; the others are scored as new ones are.
    """
    single = [picture for picture in pictures if len(picture.images) == 1]
    whole = sum(len(picture.questions) for picture in single)
    chosen = sample_evenly(single, max(1, len(single) * MOST_PAIRS // whole)) if whole > MOST_PAIRS else tuple(single)
    pairs = [(picture, question) for picture in chosen for question in picture.questions]
    answers = sorted({answer for _, question in pairs for answer in question.answers})
    if len(pairs) < _FEWEST or not 2 <= len(answers) <= max(_FEWEST, len(pairs) * 3 // 4):
        return None
    images = list({picture.images[0].digest(): picture.images[0] for picture in chosen}.values())
    row_of = {image.digest(): row for row, image in enumerate(images)}
    numbers_of = PictureNumbers.fit(assembly.features(sample_evenly(images, MOST_MAPPED)))
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    numbers = torch.cat([numbers_of([tower.cpu() for tower in assembly.features(chunk)]) for chunk in chunks])

    names, said = _names(assembly, chosen, row_of)
    name_ridge, left_names = NameRidge.fit(numbers, said)
    tokenizer = assembly.prompts.tokenizer
    questions = list(dict.fromkeys(question.instruction for _, question in pairs))
    place_of = {question: place for place, question in enumerate(questions)}
    ngrams, rarity = _ngrams([question.instruction for _, question in pairs], tokenizer)
    rows = torch.tensor([[row_of[picture.images[0].digest()], place_of[q.instruction]] for picture, q in pairs])
    wanted = torch.zeros(len(pairs), len(answers))
    column = {answer: index for index, answer in enumerate(answers)}
    for row, (_, question) in enumerate(pairs):
        for answer in question.answers:
            wanted[row, column[answer]] += 1 / len(question.answers)
    asked = question_numbers(questions, ngrams, rarity, tokenizer)
    pair_ridge, left_answers = PairRidge.fit(numbers, asked, rows, wanted)
    reader = Reader(
        numbers_of, name_ridge, pair_ridge, _name_vectors(assembly, names), _spelled(assembly, answers), ngrams, rarity
    )
    return FittedReader(
        reader,
        (len(pairs), whole),
        (left_answers.argmax(dim=1) == wanted.argmax(dim=1)).float().mean().item(),
        {digest: left_names[row] for digest, row in row_of.items()},
        {
            (picture.images[0].digest(), question.instruction): left_answers[row]
            for row, (picture, question) in enumerate(pairs)
        },
    )


def _names(
    assembly: Assembly, pictures: Sequence[TokenisedPicture], row_of: Mapping[str, int]
) -> tuple[list[tuple[int, ...]], Tensor]:
    """Names that tell pictures apart, and which of them each picture's answers say, [M, W]."""
    bags = [names_in(assembly, picture) for picture in pictures]
    names = distinctive_names(bags, partial(is_word, assembly.prompts.tokenizer))
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
    """The first tokens of each answer, [K, SPELLED, D_l]; what is longer joins the last one, what is shorter ends."""
    table, special = _table(assembly), set(assembly.prompts.tokenizer.all_special_ids)
    out = torch.zeros(len(answers), SPELLED, table.shape[1])
    for row, answer in enumerate(answers):
        tokens = [token for token in answer if token not in special] or list(answer)
        for place in range(min(SPELLED, len(tokens))):
            own = tokens[place:] if place == SPELLED - 1 else tokens[place : place + 1]
            out[row, place] = table[own].mean(dim=0)
    return out


def _ngrams(questions: Sequence[str], tokenizer: object) -> tuple[Tensor, Tensor]:
    """The n-grams of the questions, [V, 2], and how rare each is, [V]: one counts for each pair it is asked in."""
    counts: dict[tuple[int, int], int] = {}
    for question in questions:
        for ngram in set(ngrams_of(question, tokenizer)):
            counts[ngram] = counts.get(ngram, 0) + 1
    ngrams = sorted(counts)
    rarity = torch.log(len(questions) / torch.tensor([counts[ngram] for ngram in ngrams])) + 0.1
    return torch.tensor(ngrams), rarity
