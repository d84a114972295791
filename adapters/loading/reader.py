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
VECTORS = NAMED + SPELLED
_SHARPNESS = 10.0  # of the softmax over the answers' scores, which lie between 0 and 1
_NO_TOKEN = -1

NGram = tuple[int, int]
"""A token of the LLM and the next one, or `_NO_TOKEN` in its place for a token alone."""


@dataclass(frozen=True)
class Scores:
    """What the reader says of B pictures: scores of names [B, W] and of answers [B, K]."""

    names: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Reader:
    """What is read of a picture beside the queries. All tensors lie on the CPU in fp32.

    Attributes:
        numbers: features to numbers.
        names: scores of W names.
        answers: scores of K answers.
        name_vectors: [W, D_l], what the LLM sees of each name.
        answer_vectors: [K, SPELLED, D_l], what it sees of each answer.
        ngrams: [V, 2] of the training questions.
        rarity: [V] of each.
    """

    numbers: PictureNumbers
    names: NameRidge
    answers: PairRidge
    name_vectors: Tensor
    answer_vectors: Tensor
    ngrams: Tensor
    rarity: Tensor

    @torch.no_grad()
    def scores(self, features: Sequence[Tensor], questions: Sequence[str], tokenizer: Any) -> Scores:
        """Score B pictures, each with the question about it; `features` are [B, P_i, D_i] of each tower."""
        numbers = self.numbers([tower.cpu() for tower in features])  # [B, r]
        asked = question_numbers(questions, self.ngrams, self.rarity, tokenizer)
        return Scores(self.names(numbers), self.answers(numbers, asked))

    def vectors(self, scores: Scores) -> Tensor:
        """What the LLM sees, [B, VECTORS, D_l]."""
        best, place = scores.names.topk(min(NAMED, scores.names.shape[1]), dim=1)  # [B, NAMED]
        named = best.clamp(0, 1).unsqueeze(-1) * self.name_vectors[place]
        named = F.pad(named, (0, 0, 0, NAMED - named.shape[1]))
        shares = F.softmax(_SHARPNESS * scores.answers, dim=1)
        return torch.cat([named, torch.einsum("bk,ksd->bsd", shares, self.answer_vectors)], dim=1)

    def save(self, folder: Path) -> None:
        """Write it into an artefact's folder.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        state = {f"numbers.{name}": tensor for name, tensor in self.numbers.tensors.items()}
        state |= {f"names.{name}": tensor for name, tensor in vars(self.names).items()}
        state |= {f"answers.{name}": tensor for name, tensor in vars(self.answers).items()}
        state |= {name: getattr(self, name) for name in ("name_vectors", "answer_vectors", "ngrams", "rarity")}
        state["numbers.basis"] = state["numbers.basis"].half()  # by far the largest
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Reader | None:
        """The reader of an artefact; None if it has none."""
        if not (folder / FILE).is_file():
            return None
        with safe_open(folder / FILE, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

        def part(name: str) -> dict[str, Tensor]:
            inside = {
                key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")
            }
            return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in inside.items()}

        return cls(
            PictureNumbers(part("numbers")),
            NameRidge(**part("names")),
            PairRidge(**part("answers")),
            **{name: state[name] for name in ("name_vectors", "answer_vectors", "ngrams", "rarity")},
        )


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
