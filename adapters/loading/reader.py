"""The closed-form reader of an adapter: what `qformer.ridge_reader` reads of a picture, as vectors for the LLM.

Beside the queries the LLM gets, of each picture, the words that a picture most likely names, and the likely answer to
the question, spelled: vector i is the mean embedding of the answers' i-th tokens, the likelier answers weighing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qformer.ridge_reader import NameRidge, PairRidge, PictureNumbers

FILE = "reader.safetensors"
NAMED = 4
"""Vectors of names."""
SPELLED = 3
"""Vectors of the likely answer."""
_SHARPNESS = 10.0  # of the softmax over the answers' scores, which lie between 0 and 1
_NO_TOKEN = -1

NGram = tuple[int, int]
"""A token of the LLM and the next one, or `_NO_TOKEN` in its place for a token alone."""


@dataclass(frozen=True)
class Scores:
    """What the reader says of B pictures: scores of names [B, W], and of answers [B, K] if it reads questions."""

    names: Tensor
    answers: Tensor | None


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


@dataclass(frozen=True)
class Reader:
    """What is read of a picture beside the queries. All tensors are on the CPU in fp32.

    Attributes:
        numbers: features to numbers.
        names: scores of W names.
        name_vectors: [W, D_l], what the LLM sees of each name.
        answers: what is read of each question; None leaves the reader to the picture alone.
    """

    numbers: PictureNumbers
    names: NameRidge
    name_vectors: Tensor
    answers: AnswerReader | None = None

    @torch.no_grad()
    def scores(self, features: Sequence[Tensor], questions: Sequence[str], tokenizer: Any) -> Scores:
        """Score B pictures, each with the question about it; `features` are [B, P_i, D_i] of each tower."""
        numbers = self.numbers([tower.cpu() for tower in features])  # [B, r]
        answers = None if self.answers is None else self.answers.scores(numbers, questions, tokenizer)
        return Scores(self.names(numbers), answers)

    def vectors(self, scores: Scores) -> Tensor:
        """What the LLM sees, [B, NAMED, D_l] or [B, NAMED + SPELLED, D_l]."""
        best, place = scores.names.topk(min(NAMED, scores.names.shape[1]), dim=1)  # [B, NAMED]
        named = best.clamp(0, 1).unsqueeze(-1) * self.name_vectors[place]
        named = F.pad(named, (0, 0, 0, NAMED - named.shape[1]))
        if self.answers is None or scores.answers is None:
            return named
        shares = F.softmax(_SHARPNESS * scores.answers, dim=1)
        return torch.cat([named, torch.einsum("bk,ksd->bsd", shares, self.answers.vectors)], dim=1)

    def state(self) -> dict[str, Tensor]:
        """All its tensors by name, as they are stored."""
        state = {f"numbers.{name}": tensor for name, tensor in self.numbers.tensors.items()}
        state |= {f"names.{name}": tensor for name, tensor in vars(self.names).items()}
        state["name_vectors"] = self.name_vectors
        if self.answers is not None:
            state |= {f"ridge.{name}": tensor for name, tensor in vars(self.answers.ridge).items()}
            state |= {f"answers.{name}": getattr(self.answers, name) for name in ("vectors", "ngrams", "rarity")}
        state["numbers.basis"] = state["numbers.basis"].half()  # by far the largest
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Write it into an artefact's folder.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        save_file(self.state(), folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Reader | None:
        """The reader of an artefact; None if it has none."""
        if not (folder / FILE).is_file():
            return None
        with safe_open(folder / FILE, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

        def part(name: str) -> dict[str, Tensor]:
            inside = {key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inside.items()}

        answers = AnswerReader(PairRidge(**part("ridge")), **part("answers")) if part("answers") else None
        return cls(PictureNumbers(part("numbers")), NameRidge(**part("names")), state["name_vectors"], answers)


def vectors_read(reader: str | None) -> int:
    """How many vectors of a picture a recipe's `bridge.reader` gives: none, "names" or "answers"."""
    return {None: 0, "names": NAMED, "answers": NAMED + SPELLED}[reader]


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
