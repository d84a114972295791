"""`querybridge reason`: a question answered in two stages, the reasons shown."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qformer.errors import UserError
from serve.cli.common import (
    AdapterOption,
    AnswerAdapterOption,
    BeamsOption,
    ChoicesOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxTokensOption,
    OfflineOption,
    PresetOption,
    RationaleTokensOption,
    VotesOption,
    check_pictures,
    decoding_over,
    report,
    split_list,
)


def reason(
    pictures: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then one question.")],
    choices: ChoicesOption = None,
    context: Annotated[str, typer.Option("--context", help="Text that goes with the picture.")] = "",
    adapter: AdapterOption = None,
    answer_adapter: AnswerAdapterOption = None,
    votes: VotesOption = 1,
    decoding: PresetOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxTokensOption = None,
    rationale_tokens: RationaleTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reason about one or several pictures, and answer from the reasons."""
    from qformer.decoding import Decoding
    from serve.adapter import checked_choices, user_turn
    from serve.reasoning import load_pair
    from serve.reasoning import reason as run

    *images, question = pictures
    if not images:
        raise UserError(f'reason: only "{question}" was given; write querybridge reason IMAGE "QUESTION"')
    listed = () if choices is None else checked_choices(split_list(choices, "--choices"), where="--choices")
    check_pictures(images)
    user_turn(images, question)  # a mistake is reported before the models are loaded
    if listed and max_new_tokens is not None:
        raise UserError("--max-new-tokens: with --choices the answer is one of them, and not written; leave it out")
    settings = decoding_over(decoding, beams, max_new_tokens)(Decoding())
    first, second = load_pair(adapter, answer_adapter, device=device, dtype=dtype, offline=offline)
    thought = run(
        first, images, question, context=context, choices=listed, answer_adapter=second, votes=votes,
        decoding=settings, rationale_tokens=rationale_tokens,
    )  # fmt: skip
    if thought.rationale is None:
        print("this adapter was taught to answer directly: it gives no reasons", file=sys.stderr)
    found = {"images": images, "question": question, "context": context, **vars(thought)}
    lines = [] if thought.rationale is None else [f"Thought: {thought.rationale}"]
    lines += [
        f"Answer: {thought.answer}",
        *(f"{share:6.1%}  {choice}" for choice, share in (thought.choices or {}).items()),
    ]
    report(found, as_json, "\n".join(lines))
