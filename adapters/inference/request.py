"""What is asked of a loaded model, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Prompt

LOW = 0.5
"""The confidence below which an answer is said to be unsure: with a fitted temperature it is more likely wrong."""


@dataclass(frozen=True)
class Request:
    """A prompt with its pictures.

    Attributes:
        prompt: tokenised.
        images: its pictures, in order.
    """

    prompt: Prompt
    images: tuple[ImageRef, ...]


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: in words.
        tokens: how many tokens were written, the end token included.
        ended: it came to its end; False if it was cut off.
        log_prob: mean log-probability of its tokens, so that long and short answers compare.
        token_log_probs: the id and the log-probability of each token, the end token included.
        temperature: of its confidence, as it was fitted for the adapter; 1 if it was not.
    """

    text: str
    tokens: int
    ended: bool
    log_prob: float
    token_log_probs: tuple[tuple[int, float], ...] = field(default=(), compare=False)
    temperature: float = field(default=1.0, compare=False)

    @property
    def confidence(self) -> float:
        """The geometric mean of its tokens' probabilities, with the adapter's temperature; between 0 and 1."""
        return math.exp(self.log_prob / self.temperature)


def ranked(choices: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    """Choices with their probabilities, the likeliest first."""
    return dict(sorted(zip(choices, shares, strict=True), key=lambda pair: -pair[1]))
