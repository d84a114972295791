"""A question reasoned about in two stages (`adapters.inference.reasoning`), for the command, the page and the API.

`reason` answers in the caller's thread. Who streams, or shares an `Engine` with others, submits the two prompts that
`asked_rationale` and `asked_answer` make, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapters.artefact.artefact import find_artefact, read_recipe
from adapters.data.batches import prompt_for
from adapters.data.examples import Example
from adapters.inference.reasoned_answer import ReasonedAnswer, ballots, elect
from adapters.inference.reasoning import reasoning_mode, trained_reasoning_mode
from adapters.inference.request import Request
from adapters.loading.vision_side import FrozenModels
from qformer.decoding import Decoding
from serve.adapter import ImageInput, LoadedAdapter, checked_choices, default_adapter, load_adapter, user_turn


def reason(
    adapter: LoadedAdapter,
    pictures: ImageInput | Sequence[ImageInput],
    question: str,
    *,
    context: str = "",
    choices: Sequence[str] = (),
    answer_adapter: LoadedAdapter | None = None,
    votes: int = 1,
    decoding: Decoding | None = None,
    rationale_tokens: int | None = None,
) -> ReasonedAnswer:
    """Reason about pictures, and answer from the reasons.

    Args:
        adapter: the one that reasons, and answers too if there is no other.
        pictures: one, or a list; `<image>` marks in the question say where each belongs, else they come first.
        question: in words.
        context: text that goes with the pictures.
        choices: what may be answered, the likeliest being the answer; none if anything may.
        answer_adapter: another adapter that answers.
        votes: reasons that are sampled, whose answers are voted on (`adapters.inference.reasoned_answer`).
        decoding: how tokens are chosen, and how long an answer may be that is none of choices; greedy and 32 tokens
            if left out.
        rationale_tokens: how long the reasons may be; as the adapter's recipe says if left out.

    Returns:
        The reasons and the answer; an adapter that was taught to answer directly gives no reasons.

    Raises:
        UserError: a picture cannot be read, the question is empty or longer than the language model reads, there is but
            one choice, an adapter was not taught its stage, or there is nothing to vote on.
    """
    example = question_example(pictures, question, context=context, choices=choices)
    second = answer_adapter or adapter
    way = trained_reasoning_mode(adapter.assembly, None if answer_adapter is None else answer_adapter.assembly)
    decoding = decoding or Decoding()
    worded = [second.assembly.prompts.choice(choice, example.choices) for choice in example.choices]
    answers = []
    for ballot in ballots(decoding, votes, thinks=way == "two-stage"):
        rationale = None
        if way == "two-stage":
            longest = rationale_tokens or adapter.assembly.rationale_tokens
            first = asked_rationale(adapter, example, longest=longest, answer_adapter=second)
            thinking = adapter.fit_decoding(first, replace(ballot, max_new_tokens=longest))
            rationale = adapter.generator([first], thinking)[0].text
        asked = asked_answer(second, example, rationale or "")
        if worded:
            (shares,) = second.generator.choose([asked], [worded])
            answers.append(ReasonedAnswer.chosen(rationale, example.choices, shares))
        else:
            (said,) = second.generator([asked], second.fit_decoding(asked, decoding))
            answers.append(ReasonedAnswer(rationale, said.text, said.confidence))
    return elect(answers)


def question_example(
    pictures: ImageInput | Sequence[ImageInput], question: str, *, context: str = "", choices: Sequence[str] = ()
) -> Example:
    """A question with what belongs to it, as the row that it would be; raises as `reason`."""
    turn = user_turn(pictures, question)
    listed = checked_choices(choices) if choices else ()
    return Example(turn.images, turn.text, (), where="question", id="1", context=context, choices=listed)


def asked_rationale(
    adapter: LoadedAdapter, example: Example, *, longest: int, answer_adapter: LoadedAdapter | None = None
) -> Request:
    """The prompt of the first stage, for `Engine.submit` with `Decoding(max_new_tokens=longest)`.

    Args:
        adapter: the one that reasons.
        example: what is asked.
        longest: tokens that the reasons may have.
        answer_adapter: the one that answers from them, if it is another.

    Raises:
        UserError: it, or that of the second stage with such reasons in it, is longer than the language model reads.
    """
    second = answer_adapter or adapter
    second.check_length(_asked(second, replace(example, rationale=""), "answer"), room=longest)
    return adapter.check_length(_asked(adapter, example, "rationale"))


def asked_answer(adapter: LoadedAdapter, example: Example, rationale: str) -> Request:
    """The prompt of the second stage, with the reasons given; "" asks directly.

    Raises:
        UserError: it is longer than the language model reads.
    """
    return adapter.check_length(_asked(adapter, replace(example, rationale=rationale), "answer"))


def _asked(adapter: LoadedAdapter, example: Example, stage: str) -> Request:
    return Request(prompt_for(example, stage, adapter.assembly.prompts), example.images)


def load_pair(
    adapter: str | Path | None,
    answer_adapter: str | Path | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
) -> tuple[LoadedAdapter, LoadedAdapter | None]:
    """Load the adapter that reasons and, if one is named, the one that answers; what they share is loaded once.

    Raises:
        UserError: as `serve.adapter.load_adapter`, or one was not taught its stage.
    """
    names = [
        adapter if adapter is not None else default_adapter(),
        *([] if answer_adapter is None else [answer_adapter]),
    ]
    # mistakes are reported before anything is loaded
    reasoning_mode(*(read_recipe(find_artefact(name)).reasoning_stages for name in names))
    frozen = FrozenModels() if len(names) > 1 else None
    loaded = [load_adapter(name, device=device, dtype=dtype, offline=offline, frozen=frozen) for name in names]
    return loaded[0], loaded[1] if len(loaded) > 1 else None
