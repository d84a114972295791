"""Chain of thought in two stages, over many questions: first the reasons, then the answers with the reasons given.

As multimodal chain of thought (Zhang et al. 2023, arXiv 2302.00923, section 4): both stages see the picture, and what
the first has written goes into the second's question. One adapter may do both, or two one each. If a question has
choices, the likeliest of them is the answer; else it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from adapters.data.examples import Example
from adapters.evaluation.rationales import score_reasons
from adapters.inference.answering import answer_examples, choose_for_examples, reply_to_examples
from adapters.inference.reasoned_answer import ReasonedAnswer, ballots, elect
from adapters.loading.assembly import Assembly
from qformer.decoding import Decoding
from qformer.errors import UserError

ReasoningMode = Literal["two-stage", "direct"]
Progress = Callable[[int, int], None]


def reason_examples(
    assembly: Assembly,
    examples: Sequence[Example],
    *,
    answer_adapter: Assembly | None = None,
    rationales: Sequence[str] | None = None,
    votes: int = 1,
    decoding: Decoding | None = None,
    rationale_tokens: int | None = None,
    batch_size: int = 64,
    on_progress: Progress | None = None,
) -> list[ReasonedAnswer]:
    """Reason about questions, and answer them from the reasons; directly if that is what the adapter was taught.

    Args:
        assembly: the adapter that reasons, and answers too if there is no other.
        examples: what is asked, each with its context and choices; answers and reasons they hold are not looked at.
        answer_adapter: another adapter that answers, as the paper trains one for each stage.
        rationales: reasons to answer from in place of the adapter's own, one an example; "" asks directly.
        votes: reasons that are sampled for each question, whose answers are voted on (`adapters.inference.voting`); 1
            writes the reasons once, as `decoding` says.
        decoding: how tokens are chosen, and how long an answer may be; greedy and 32 tokens if left out.
        rationale_tokens: how long the reasons may be; the recipe's `reason.rationale_tokens` if left out.
        batch_size: prompts generated together; what is written does not depend on it.
        on_progress: called with (done, total) over both stages.

    Returns:
        One thought an example, in their order.

    Raises:
        UserError: an adapter was not taught its stage, or there is nothing to vote on.
    """
    decoding = decoding or Decoding()
    thinks = rationales is None and trained_reasoning_mode(assembly, answer_adapter) == "two-stage"
    rounds = ballots(decoding, votes, thinks=thinks)
    passes = Passes(on_progress, len(examples), (1 + thinks) * votes)
    said: list[list[ReasonedAnswer]] = []
    for ballot in rounds:
        texts = [""] * len(examples) if rationales is None else rationales
        if thinks:
            thinking = replace(ballot, max_new_tokens=rationale_tokens or assembly.rationale_tokens)
            texts = give_reasons(
                assembly, examples, decoding=thinking, batch_size=batch_size, on_progress=passes.next()
            )  # fmt: skip
        answers = _give_answers(
            answer_adapter or assembly, examples, texts, decoding=decoding, batch_size=batch_size,
            on_progress=passes.next(),
        )  # fmt: skip
        said.append(answers if thinks else [replace(one, rationale=one.rationale or None) for one in answers])
    return [elect(votes) for votes in zip(*said, strict=True)]


def reasoning_mode(stages: Sequence[str], answering: Sequence[str] | None = None) -> ReasoningMode:
    """How questions are answered by what an adapter, or two, were taught.

    Args:
        stages: `Recipe.reasoning_stages` of the adapter that reasons, and answers too if there is no other.
        answering: those of the adapter that answers.

    Raises:
        UserError: a stage is missing.
    """
    taught = _taught(stages)
    if answering is not None:
        if "rationale" not in taught:
            raise UserError(f"--adapter: {_lesson(stages)}, so it gives no reasons; name one that was taught to")
        if "answer" not in _taught(answering):
            raise UserError(
                f"--answer-adapter: {_lesson(answering)}, so it can't answer from reasons; name one that was taught to"
            )
        return "two-stage"
    if {"rationale", "answer"} <= taught:
        return "two-stage"
    if "direct" in taught:
        return "direct"
    if "rationale" in taught:
        raise UserError(f"--adapter: {_lesson(stages)}; name the one that answers too, with --answer-adapter RUN")
    raise UserError(
        f"--adapter: {_lesson(stages)}; name it with --answer-adapter RUN, and one that gives reasons with --adapter"
    )


def trained_reasoning_mode(assembly: Assembly, answer_adapter: Assembly | None = None) -> ReasoningMode:
    """`reasoning_mode` of loaded adapters; raises as it does."""
    answering = None if answer_adapter is None else answer_adapter.reasoning_stages
    return reasoning_mode(assembly.reasoning_stages, answering)


def _taught(stages: Sequence[str]) -> set[str]:
    """The stages that an adapter was taught; without rows of reasons, to answer directly."""
    return set(stages) or {"direct"}


def _lesson(stages: Sequence[str]) -> str:
    return f"it was taught {' and '.join(sorted(_taught(stages)))} alone (reason.stages)"


def give_reasons(
    assembly: Assembly,
    examples: Sequence[Example],
    *,
    decoding: Decoding,
    batch_size: int = 64,
    on_progress: Progress | None = None,
) -> list[str]:
    """The first stage alone: one text an example."""
    asked = [replace(example, task=None) for example in examples]
    return answer_examples(
        assembly, asked, "rationale", decoding=decoding, batch_size=batch_size, on_progress=on_progress
    )


def validate_reasons(assembly: Assembly, examples: Sequence[Example], *, batch_size: int = 64) -> dict[str, float]:
    """Score rows as far as the stages go that an adapter is taught.

    Returns:
        "accuracy", and "accuracy_single_step" and "accuracy_multi_step" if the rows say their steps: of answers from
        its own reasons; of direct answers, or those from given reasons, if that is all it is taught. For reasons
        "rationale_ROUGE-L" with the same endings.
    """
    taught = set(assembly.recipe.reason.stages)
    if taught == {"rationale"}:
        longest = Decoding(max_new_tokens=assembly.rationale_tokens)
        texts = give_reasons(assembly, examples, decoding=longest, batch_size=batch_size)
        scores = score_thoughts([ReasonedAnswer(text, "") for text in texts], examples)
        scores = {name: value for name, value in scores.items() if name.startswith("rationale_")}
    else:
        given = [example.rationale for example in examples] if taught == {"answer"} else None
        thoughts = reason_examples(assembly, examples, rationales=given, batch_size=batch_size)
        if given is not None:
            thoughts = [replace(thought, rationale=None) for thought in thoughts]  # they are not its own
        scores = score_thoughts(thoughts, examples)
    return main_scores(scores)


def main_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Of `score_thoughts` the accuracy and the ROUGE-L, over all and by steps, without those by kind."""
    ends = ("", "_single_step", "_multi_step")
    wanted = [f"{name}{end}" for name in ("accuracy", "rationale_ROUGE-L") for end in ends]
    return {name: scores[name] for name in wanted if name in scores}


def score_thoughts(thoughts: Sequence[ReasonedAnswer], examples: Sequence[Example]) -> dict[str, float]:
    """Score as `adapters.evaluation.rationales.score_reasons`; reasons only if they were asked for."""
    directly = all(thought.rationale is None for thought in thoughts)
    rationales = None if directly else [thought.rationale or "" for thought in thoughts]
    language = "zh" if {example.language for example in examples} == {"zh"} else "en"
    return score_reasons([thought.answer for thought in thoughts], rationales, examples, language=language)


def _give_answers(
    assembly: Assembly,
    examples: Sequence[Example],
    rationales: Sequence[str],
    *,
    decoding: Decoding,
    batch_size: int,
    on_progress: Progress | None,
) -> list[ReasonedAnswer]:
    """The second stage: one answer an example, the likeliest of its choices if it has any."""
    asked = [replace(one, task=None, rationale=text) for one, text in zip(examples, rationales, strict=True)]
    chosen = [place for place, one in enumerate(asked) if one.choices]
    written = [place for place, one in enumerate(asked) if not one.choices]
    found: dict[int, ReasonedAnswer] = {}
    if chosen:
        shares = choose_for_examples(
            assembly, [asked[place] for place in chosen], "answer", batch_size=batch_size,
            on_progress=_part(on_progress, 0, len(chosen), len(asked)),
        )  # fmt: skip
        for place, share in zip(chosen, shares, strict=True):
            found[place] = ReasonedAnswer.chosen(rationales[place], asked[place].choices, share)
    if written:
        said = reply_to_examples(
            assembly, [asked[place] for place in written], "answer", decoding=decoding, batch_size=batch_size,
            on_progress=_part(on_progress, len(chosen), len(written), len(asked)),
        )  # fmt: skip
        for place, one in zip(written, said, strict=True):
            found[place] = ReasonedAnswer(rationales[place], one.text, one.confidence)
    return [found[place] for place in range(len(asked))]


def _part(tell: Progress | None, before: int, rows: int, total: int) -> Progress | None:
    """The callback of a part of a pass's rows, of which `before` are done already."""
    return None if tell is None else lambda done, of: tell(before + round(done / of * rows), total)


class Passes:
    """One count of work done over several passes through the rows.

    Args:
        on_progress: called with (done, total); None counts nothing.
        rows: of a pass; the number that pass counts in may be another, since what is alike is asked once.
        passes: in all.
    """

    def __init__(self, on_progress: Progress | None, rows: int, passes: int) -> None:
        self._tell, self._rows, self._passes, self._begun = on_progress, rows, passes, 0

    def next(self, passes: int = 1) -> Progress | None:
        """The callback of the next pass, or of the next few that count as one."""
        if self._tell is None:
            return None
        tell, before = self._tell, self._begun * self._rows
        self._begun += passes
        return lambda done, total: tell(before + round(done / total * self._rows * passes), self._passes * self._rows)
