"""What a batch job asks of whatever answers it, and what it gets; nothing here needs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapters.data.examples import Example

Fields = dict[str, Any]
"""What was found out about a row, as its line holds it: "answer", "confidence", …"""


@dataclass(frozen=True)
class Asking:
    """What is wanted of every row.

    Args:
        task: "vqa", "caption", "reason" or "embed".
        choices: what may be answered to every question; empty if anything may, or if rows have choices of their own.
        logprobs: with each answer, its tokens and their log-probabilities.
        rationale_tokens: how long reasons may be; as the adapter's recipe says if left out.
        votes: reasons that are sampled for a question, whose answers are voted on.
    """

    task: str = "vqa"
    choices: tuple[str, ...] = ()
    logprobs: bool = False
    rationale_tokens: int | None = None
    votes: int = 1


@dataclass(frozen=True)
class Facts:
    """What answers, as a job remembers it.

    Args:
        adapter: its name, for people.
        fingerprint: "sha256:…": another one means that the same question may get another answer.
        decoding: how tokens are chosen, by setting.
        dtype: of the computation: another one gives other confidences, and now and then another answer.
    """

    adapter: str
    fingerprint: str
    decoding: Mapping[str, Any]
    dtype: str = "float32"


class Predictor(Protocol):
    """What a batch job asks of its predictor.

    An answer may depend on what is asked together, not on what came before.
    """

    def facts(self, asking: Asking) -> Facts:
        """What answers; raises UserError if it cannot do what is asked."""
        ...

    def prepare(self, examples: Sequence[Example]) -> None:
        """Read, decode and encode pictures ahead; called from another thread than the rest. May do nothing."""
        ...

    def check(self, example: Example, asking: Asking) -> None:
        """Raise UserError, with the row, if this example cannot be answered."""
        ...

    def plan(self, examples: Sequence[Example], asking: Asking) -> list[list[int]]:
        """The places of examples that are answered together, in the order of the first of each; all of them, once."""
        ...

    def answer(self, examples: Sequence[Example], asking: Asking) -> list[Fields]:
        """What each of some examples of a plan's part gets."""
        ...
