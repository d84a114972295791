"""The closed-form reader of an adapter: what `qformer.ridge_reader` reads of a picture, as vectors for the LLM.

Beside the queries the LLM gets, of each picture, the words that a picture most likely names. Before each question it
gets the likely answer, spelled: vector i is the mean embedding of the answers' i-th tokens, the likelier answers
weighing more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qformer.class_reader import Classifier, ClassNames, ClassNumbers
from qformer.errors import UserError
from qformer.name_questions import NameQuestions
from qformer.ridge_reader import NameRidge, PairRidge, PictureNumbers

FILE = "reader.safetensors"
NAMED = 4
"""Vectors of names."""
SPELLED = 3
"""Vectors of the likely answer."""
_SHARPNESS = 10.0  # of the softmax over the answers' scores, which lie between 0 and 1
_NO_TOKEN = -1
_QUESTIONS = "questions"  # in the file's metadata

NGram = tuple[int, int]
"""A token of the LLM and the next one, or `_NO_TOKEN` in its place for a token alone."""

WordVectors = Callable[[Sequence[str]], Tensor]
"""Texts to what the LLM sees of them: the mean embedding of their tokens."""

Spell = Callable[[str], Tensor]
"""An answer to what the LLM sees of its first tokens."""


@dataclass(frozen=True)
class LeftOut:
    """What a reader says of its own training data, each picture scored by all others.

    A reader knows the pictures it was fitted to by heart; these scores are as unsure as those of new pictures.

    Attributes:
        names: scores of names by the picture's digest, each [W].
        answers: scores of answers by the picture's digest and the question, each [K]; empty if no question is read.
    """

    names: Mapping[str, Tensor]
    answers: Mapping[tuple[str, str], Tensor]


@dataclass(frozen=True)
class AnswerReader:
    """What is read of a picture and a question.

    Attributes:
        ridge: scores of K answers.
        vectors: [K, SPELLED, D_l], what the LLM sees of each answer.
        ngrams: [V, 2] of the training questions.
        rarity: [V] of each.
    """

    ridge: PairRidge
    vectors: Tensor
    ngrams: Tensor
    rarity: Tensor

    def scores(self, numbers: Tensor, questions: Sequence[str], tokenizer: Any) -> Tensor:
        """[B, K] of pictures' numbers [B, r] and B questions."""
        return self.ridge(numbers, question_numbers(questions, self.ngrams, self.rarity, tokenizer))

    def spelled(self, scores: Tensor) -> Tensor:
        """What the LLM sees of scores [B, K]: [B, SPELLED, D_l]."""
        return torch.einsum("bk,ksd->bsd", F.softmax(_SHARPNESS * scores, dim=1), self.vectors)


@dataclass(frozen=True)
class Reader:
    """What is read of a picture beside the queries. All tensors are on the CPU in fp32.

    Attributes:
        numbers: features to numbers.
        names: scores of W names.
        name_vectors: [W, D_l], what the LLM sees of each name.
        answers: what is read of each question; None leaves the reader to the picture alone.
        questions: what the scores of a reader of classes say to questions.
        spell: what the LLM sees of an answer, [SPELLED, D_l]; beside `questions`.
    """

    numbers: PictureNumbers | ClassNumbers
    names: NameRidge | ClassNames
    name_vectors: Tensor
    answers: AnswerReader | None = None
    questions: NameQuestions | None = None
    spell: Spell | None = None

    @torch.no_grad()
    def look(self, features: Sequence[Tensor]) -> Tensor:
        """All that is read of B pictures, [B, r] on the CPU; `features` are [B, P_i, D_i] of each tower."""
        return self.numbers([tower.cpu() for tower in features])

    @torch.no_grad()
    def name(self, numbers: Tensor, digests: Sequence[str], left_out: LeftOut | None = None) -> Tensor:
        """The names of B pictures as the LLM sees them, [B, NAMED, D_l].

        Args:
            numbers: [B, r].
            digests: of the B pictures.
            left_out: scores to take in place of the reader's own, of the pictures that it holds.
        """
        scores = self.names(numbers)
        if left_out is not None:
            scores = _replaced(scores, digests, left_out.names)
        return self.named(scores)

    def named(self, scores: Tensor) -> Tensor:
        """What the LLM sees of names' scores [B, W]: [B, NAMED, D_l]."""
        best, place = scores.topk(min(NAMED, scores.shape[1]), dim=1)  # [B, NAMED]
        named = best.clamp(0, 1).unsqueeze(-1) * self.name_vectors[place]
        return F.pad(named, (0, 0, 0, NAMED - named.shape[1]))

    @torch.no_grad()
    def answer(
        self, numbers: Tensor, asked: Sequence[tuple[str, str]], tokenizer: Any, left_out: LeftOut | None = None
    ) -> Tensor:
        """The likely answers to B questions as the LLM sees them, [B, SPELLED, D_l].

        Args:
            numbers: [B, r] of the pictures that are asked about.
            asked: the digest of each of them, and the question.
            tokenizer: the LLM's.
            left_out: scores to take in place of the reader's own, of the pairs that it holds.

        Raises:
            ValueError: the reader reads no questions.
        """
        if self.questions is not None:
            return self._suggest(numbers, asked, left_out)
        if self.answers is None:
            raise ValueError("this reader reads no questions")
        scores = self.answers.scores(numbers, [question for _, question in asked], tokenizer)
        if left_out is not None:
            scores = _replaced(scores, asked, left_out.answers)
        return self.answers.spelled(scores)

    def _suggest(self, numbers: Tensor, asked: Sequence[tuple[str, str]], left_out: LeftOut | None) -> Tensor:
        """What the names' scores suggest as answers, spelled, [B, SPELLED, D_l]."""
        assert self.questions is not None and self.spell is not None
        scores = self.names(numbers)
        if left_out is not None:
            scores = _replaced(scores, [digest for digest, _ in asked], left_out.names)
        out = torch.zeros(len(asked), SPELLED, self.name_vectors.shape[1])
        for row, (_, question) in enumerate(asked):
            for answer, weight in self.questions.answer(question, scores[row]):
                out[row] += weight * self.spell(answer)
        return out

    @property
    def reads_questions(self) -> bool:
        """Whether it has vectors for each question too."""
        return self.answers is not None or self.questions is not None

    def state(self) -> dict[str, Tensor]:
        """All its tensors by name, as they are stored."""
        state: dict[str, Tensor] = {}
        if isinstance(self.numbers, PictureNumbers):
            state |= {f"numbers.{name}": tensor for name, tensor in self.numbers.tensors.items()}
        state |= {f"names.{name}": tensor for name, tensor in vars(self.names).items()}
        if isinstance(self.names, ClassNames):  # its vectors are those of its words, and its numbers the tower's
            return state | {"names.weight": self.names.weight.half().contiguous()}
        state["name_vectors"] = self.name_vectors
        if self.answers is not None:
            state |= {f"ridge.{name}": tensor for name, tensor in vars(self.answers.ridge).items()}
            state |= {f"answers.{name}": getattr(self.answers, name) for name in ("vectors", "ngrams", "rarity")}
        largest = [name for name in state if name.startswith("numbers.") and name.endswith(".basis")]
        state |= {name: state[name].half() for name in largest}
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Write it into an artefact's folder.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        save_file(self.state(), folder / FILE, metadata=_described(self.questions))

    @classmethod
    def load(
        cls,
        folder: Path,
        classifier: Classifier | None = None,
        word_vectors: WordVectors | None = None,
        spell: Spell | None = None,
    ) -> Reader | None:
        """The reader of an artefact; None if it has none.

        Args:
            folder: of the artefact.
            classifier: of its first tower.
            word_vectors: what the LLM sees of names, [W, D_l].
            spell: what it sees of an answer; all three are needed for a reader of classes.

        Raises:
            UserError: it is of an earlier version.
        """
        if not (folder / FILE).is_file():
            return None
        with safe_open(folder / FILE, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            described = json.loads((file.metadata() or {}).get(_QUESTIONS, "null"))
        if "numbers.basis" in state:
            raise UserError(f"{folder / FILE} is of an earlier version, which read all layers as one: train it again")

        def part(name: str) -> dict[str, Tensor]:
            inside = {key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inside.items()}

        if described is not None:
            if classifier is None or word_vectors is None:
                raise UserError(
                    f"{folder / FILE} reads the classes of its image encoder, which has none; train it again"
                )
            kinds = {word: tuple(places) for word, places in described["kinds"].items()}
            questions = NameQuestions(tuple(described["names"]), kinds, described["threshold"])
            names = ClassNames(**part("names"))
            vectors = word_vectors(questions.names)
            return cls(ClassNumbers(classifier), names, vectors, questions=questions, spell=spell)
        answers = AnswerReader(PairRidge(**part("ridge")), **part("answers")) if part("answers") else None
        return cls(PictureNumbers(part("numbers")), NameRidge(**part("names")), state["name_vectors"], answers)


def spelled(table: Tensor, tokens: Sequence[int]) -> Tensor:
    """An answer as a reader gives it: its first tokens' embeddings, [SPELLED, D_l].

    What is longer joins the last one, what is shorter ends in zeros.

    Args:
        table: the LLM's embeddings, [V, D_l].
        tokens: of the answer.
    """
    out = torch.zeros(SPELLED, table.shape[1])
    for place in range(min(SPELLED, len(tokens))):
        own = list(tokens[place:] if place == SPELLED - 1 else tokens[place : place + 1])
        out[place] = table[own].float().mean(dim=0).cpu()
    return out


def _described(questions: NameQuestions | None) -> dict[str, str] | None:
    """A file's metadata for a reader of classes."""
    return None if questions is None else {_QUESTIONS: json.dumps(asdict(questions))}


Key = TypeVar("Key")


def _replaced(scores: Tensor, keys: Sequence[Key], known: Mapping[Key, Tensor]) -> Tensor:
    """Scores [B, K] with those that are known in place of the computed ones."""
    rows = [known.get(key, row) for key, row in zip(keys, scores, strict=True)]
    return torch.stack(rows) if rows else scores


def names_read(reader: str | None) -> int:
    """How many vectors of names a picture has, by a recipe's `bridge.reader`: none, "names" or "answers"."""
    return 0 if reader is None else NAMED


def answers_read(reader: str | None) -> int:
    """How many vectors of an answer a question about a picture has, by a recipe's `bridge.reader`."""
    return SPELLED if reader in ("answers", "classes") else 0


def ngrams_of(question: str, tokenizer: Any) -> list[NGram]:
    """A question's tokens in lower case, and each two in a row."""
    tokens = tokenizer(question.lower(), add_special_tokens=False)["input_ids"]
    return [*((token, _NO_TOKEN) for token in tokens), *pairwise(tokens)]


def question_numbers(questions: Sequence[str], ngrams: Tensor, rarity: Tensor, tokenizer: Any) -> Tensor:
    """Questions as bags of n-grams, [B, V], the rarer ones weighing more, each of length 1 (0 if it knows none)."""
    column = {(first, second): index for index, (first, second) in enumerate(ngrams.tolist())}
    bags = torch.zeros(len(questions), len(column))
    for row, question in enumerate(questions):
        for ngram in ngrams_of(question, tokenizer):
            if ngram in column:
                bags[row, column[ngram]] = 1.0
    return F.normalize(bags * rarity, dim=1)
