"""What the commands share: their common flags, and how they report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qformer.decoding import Decoding

AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="A run's folder, an artefact's folder, or a shipped adapter's name.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; a GPU if there is one.")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16 for the computation; left out, the adapter's own or the faster."),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Take frozen weights from the cache only.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print no progress.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
ChoicesOption = Annotated[
    str | None,
    typer.Option(
        "--choices",
        help='Answers to choose from, with commas between, or a JSON list such as ["red, blue", "green"]; each gets '
        "its probability.",
    ),
]
BeamsOption = Annotated[int | None, typer.Option("--beams", min=1, help="Beams of the search; 1 is greedy.")]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--decoding",
        help="A preset: greedy, paper-vqa, likeliest or caption; the last three search with beams. Left out, questions "
        "are answered as the adapter's recipe says, captions written by the preset, reasons greedily.",
    ),
]
MaxTokensOption = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
MaxPromptOption = Annotated[
    int, typer.Option("--max-prompt", min=1, help="Tokens of a conversation that a model is asked to read.")
]
AnswerAdapterOption = Annotated[
    str | None,
    typer.Option("--answer-adapter", help="Another adapter that answers, from the reasons that --adapter gives."),
]
RationaleTokensOption = Annotated[
    int | None,
    typer.Option("--rationale-tokens", min=1, help="The longest thought, in tokens; left out, the recipe's."),
]
VotesOption = Annotated[
    int,
    typer.Option("--votes", min=1, help="Reasons that are sampled, whose answers are voted on (self-consistency)."),
]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave bad rows out, count and report them, instead of stopping.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns", metavar="FIELD=COLUMN,…", help="Names of the data's columns, such as image=photo,question=prompt."
    ),
]
OutsideOption = Annotated[
    bool,
    typer.Option(
        "--allow-outside", help="Read pictures that the data names outside its own folder: by .., absolute, by a link."
    ),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many rows.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of weights and order; the recipe's if left out.")]


def progress(verb: str) -> Callable[[int, int], None]:
    """A callback that tells (done, total) on standard error, such as "answered 3/9"."""

    def show(done: int, total: int) -> None:
        print(f"{verb} {done}/{total}", file=sys.stderr, flush=True)

    return show


def split_list(text: str, flag: str) -> list[str]:
    """The entries of a flag: a JSON list's, or what stands between commas.

    Raises:
        UserError: it begins as a JSON list of texts and is none, or an entry is neither text nor a number.
    """
    from qformer.errors import UserError

    try:
        listed = json.loads(text, parse_int=str, parse_float=str)
    except ValueError as error:
        if text.lstrip().startswith('["'):
            example = '["red, blue", "green"]'
            raise UserError(f"{flag} {text}: this is no JSON list ({error}); write it as '{example}'") from error
        return text.split(",")
    if not isinstance(listed, list):
        return text.split(",")
    if not all(isinstance(entry, str) for entry in listed):
        raise UserError(f"{flag} {text}: put each entry of the list into double quotes")
    return listed


def columns_of(text: str | None) -> dict[str, str] | None:
    """The columns that `--columns` names; None if it was not given.

    Raises:
        UserError: it is not of the form field=column,…
    """
    if text is None:
        return None
    from adapters.data.columns import parse_columns

    return parse_columns(text)


def report(values: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result: one JSON object for programs, or the text for people."""
    print(json.dumps(values, ensure_ascii=False, default=str) if as_json else text)


def decoding_over(preset: str | None, beams: int | None, max_new_tokens: int | None) -> Callable[[Decoding], Decoding]:
    """How tokens are chosen, from the flags that say so: given what is usual, what was asked for.

    Raises:
        UserError: there is no such preset.
    """
    from qformer.decoding import Decoding

    named = Decoding.preset(preset) if preset is not None else None
    flags = {"num_beams": beams, "max_new_tokens": max_new_tokens}
    changes: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}

    def over(default_decoding: Decoding) -> Decoding:
        chosen = replace(named or default_decoding, **changes)
        # one beam has no lengths to weigh: however it was named, it is the same
        return chosen if chosen.num_beams > 1 else replace(chosen, length_penalty=Decoding.length_penalty)

    return over


def check_pictures(names: Sequence[str]) -> None:
    """Open every picture before the models are loaded: a mistake is reported at once."""
    from adapters.data.image_ref import image_ref
    from adapters.data.images import open_image

    for name in names:
        open_image(image_ref(name))
