"""What is asked of the tokens of one answer beyond its decoding: penalties, a grammar, and the likeliest others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TokenFilter(Protocol):
    """Says which tokens may come next in one answer; one that was started belongs to that answer alone."""

    def mask(self, scores: Tensor) -> Tensor:
        """Scores [V] with those of forbidden tokens at minus infinity."""

    def accept(self, token: int) -> None:
        """Go on by a token that was written."""


class Grammar(Protocol):
    """What an answer must look like."""

    def start(self, longest: int) -> TokenFilter:
        """A filter for one answer of at most so many tokens."""


@dataclass(frozen=True)
class TokenRules:
    """Rules for the tokens of one answer.

    Attributes:
        frequency_penalty: taken from a token's logit for each time that it was written already.
        presence_penalty: taken from a token's logit once if it was written already.
        grammar: what the answer must look like; None leaves it free.
        top: how many of the likeliest tokens are kept beside each that is written; None if nobody asks for tokens.
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Grammar | None = None
    top: int | None = None

    @property
    def change_scores(self) -> bool:
        """Whether they change which token is written."""
        return bool(self.frequency_penalty or self.presence_penalty or self.grammar)

    def penalised(self, scores: Tensor, written: Sequence[int]) -> Tensor:
        """Scores [V] without what was written so far takes from them, as OpenAI's API defines both penalties."""
        if not written or not (self.frequency_penalty or self.presence_penalty):
            return scores
        counts = torch.bincount(torch.tensor(written), minlength=len(scores)).to(scores)
        return scores - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)
