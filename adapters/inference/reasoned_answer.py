"""What came of a question that was reasoned about, and the vote on several such answers (self-consistency).

Wang et al. 2022, arXiv 2203.11171, section 2: reasons are sampled, and what follows from each is a vote. Written
answers are counted; choices are weighed by their probabilities, the weighted sum of the paper's table 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapters.data.answers import normalise
from adapters.inference.request import ranked
from qformer.decoding import Decoding
from qformer.errors import UserError

TEMPERATURE = 0.7
"""That the reasons of several votes are sampled at, as in the paper (section 3.1), unless the decoding says another."""


@dataclass(frozen=True)
class ReasonedAnswer:
    """What came of a question.

    Attributes:
        rationale: the reasons, as written or as given; None if the answer was asked for directly. Of several votes
            those that speak most clearly for the answer.
        answer: in words.
        confidence: the geometric mean of the answer's token probabilities or, of a choice, its probability; of several
            votes the share that is for the answer, or the choice's mean probability.
        choices: each choice's probability as the answer, the likeliest first; None if the answer was written.
    """

    rationale: str | None
    answer: str
    confidence: float | None = None
    choices: Mapping[str, float] | None = None

    @classmethod
    def chosen(cls, rationale: str | None, choices: Sequence[str], shares: Sequence[float]) -> ReasonedAnswer:
        """The likeliest of some choices, given the probability of each."""
        by_share = ranked(choices, shares)
        best = next(iter(by_share))
        return cls(rationale, best, by_share[best], by_share)


def ballots(decoding: Decoding, votes: int, *, thinks: bool) -> list[Decoding]:
    """How the reasons of each vote are chosen: of one as asked for, of several by sampling, each with its own seed.

    Args:
        decoding: as asked for.
        votes: how many.
        thinks: whether reasons are written at all.

    Raises:
        UserError: there would be no votes, or all would be alike.
    """
    if votes == 1:
        return [decoding]
    if votes < 1:
        raise UserError(f"--votes {votes}: give a number from 1")
    if not thinks:
        raise UserError(f"--votes {votes}: the adapter answers directly, so no reasons are voted on; leave it out")
    if decoding.num_beams > 1:
        raise UserError(f"--votes {votes} samples reasons, and beams do not sample: leave --beams or --votes out")
    first = decoding.seed or 0
    sampled = replace(decoding, temperature=decoding.temperature or TEMPERATURE)
    return [replace(sampled, seed=first + number) for number in range(votes)]


def elect(votes: Sequence[ReasonedAnswer]) -> ReasonedAnswer:
    """What several answers to one question come to.

    Of choices the one with the highest mean probability; of words those that most votes have, compared as scores
    compare them, and among equals those that came first.

    Args:
        votes: at least one; all with the same choices, or all without.
    """
    if len(votes) == 1:
        return votes[0]
    if (choices := votes[0].choices) is not None:
        listed = [vote.choices or {} for vote in votes]
        means = [sum(shares[choice] for shares in listed) / len(votes) for choice in choices]
        elected = ReasonedAnswer.chosen(None, list(choices), means)
        clearest = max(votes, key=lambda vote: (vote.choices or {})[elected.answer])
        return replace(elected, rationale=clearest.rationale)
    counted: dict[str, list[ReasonedAnswer]] = {}
    for vote in votes:
        counted.setdefault(normalise(vote.answer), []).append(vote)
    winners = max(counted.values(), key=len)
    clearest = max(winners, key=lambda vote: vote.confidence or 0.0)
    return replace(clearest, confidence=len(winners) / len(votes))
