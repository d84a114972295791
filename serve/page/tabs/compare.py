"""The tab that asks the same of two: adapters, decodings, or one adapter with and without the picture; and a vote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Turn
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.engine import Engine
from serve.engine.pending import Answer, PendingAnswer
from serve.page.context import ASKS_MODELS, PRIVATE, SOON, PageContext, last, submit_all, wait_for
from serve.page.inputs import show_user_errors, uploaded, words
from serve.page.notes import how_it_went
from serve.page.votes import VERDICTS, VoteFile

DECODINGS = {
    "As usual": "usual",
    "Greedy": "greedy",
    "Beam search (5)": "beams",
    "Sampled (temperature 0.7)": "sampled",
}
_BEAMS, _TEMPERATURE = 5, 0.7


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        adapter: its name.
        decoding: one of `DECODINGS`.
        sees: whether it is shown the picture.
    """

    adapter: str
    decoding: str
    sees: bool


@dataclass(frozen=True)
class Compared:
    """What was asked, of whom, and what they answered; an answer that has not come is None.

    Attributes:
        question: in words.
        picture: what it was asked about.
        sides: left and right.
        answers: of each.
        seconds: each took.
    """

    question: str
    picture: ImageRef
    sides: tuple[Side, Side]
    answers: tuple[Answer | None, Answer | None]
    seconds: tuple[float, float]


def compare_tab(context: PageContext, votes: VoteFile) -> None:
    """Build the tab and its endpoint `/compare`."""
    engine = context.engine
    names, first = engine.names, engine.adapter().name
    second = names[1] if len(names) > 1 else first
    with gr.Tab("Compare", id="compare"):
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = context.picture_slot()
            with gr.Column(scale=6, min_width=280):
                question = gr.Textbox(
                    label="Question to both", lines=1, max_lines=4, elem_id="compare-question",
                    placeholder="what is in the picture?",
                )  # fmt: skip
                with gr.Row(elem_id="sides"):
                    left = _side("Left", names, first, sees=True)
                    right = _side("Right", names, second, sees=len(names) > 1)
                button = gr.Button("Ask both", variant="primary", elem_id="compare-ask")
        table = gr.HTML(elem_id="compared", padding=False)
        with gr.Row(elem_id="votes"):
            buttons = [gr.Button(said, size="sm", interactive=False) for said in VERDICTS.values()]
        kept = gr.HTML(f"<p>{_where(votes)}</p>", elem_id="votes-kept", elem_classes="hint")
        compared = gr.State(None)
        context.offer_examples(picture, question, fill=lambda example: [next(iter(example.questions), "")])

    def run(picture: Any, question: str, *sides: Any) -> Iterator[Compared]:
        with show_user_errors():
            asked = words(question, "There is no question yet: write one first")
            chosen = Side(*sides[:3]), Side(*sides[3:])
            yield from compare(engine, uploaded(picture, context.uploads), asked, chosen)

    def show(picture: Any, question: str, *sides: Any) -> Iterator[Any]:
        yield {table: "", compared: None, **{button: gr.Button(interactive=False) for button in buttons}}
        for found in run(picture, question, *sides):
            yield {table: as_table(found), compared: found}
        yield {button: gr.Button(interactive=True) for button in buttons}

    def vote(found: Compared | None, verdict: str) -> list[Any]:
        with show_user_errors():
            if found is None or None in found.answers:
                raise UserError("There is nothing to vote on yet: ask both first")
            votes.add(verdict, as_values(found))
            counted = " · ".join(
                f"{VERDICTS[name]}: {count}" for name, count in votes.count().items() if name in VERDICTS
            )
            told = f"<p>Kept. {escape(counted)}. {_where(votes)}</p>"
            return [told, None, *[gr.Button(interactive=False) for _ in buttons]]

    def compare_two(
        picture: Any, question: str, adapter: str = first, decoding: str = "usual", sees: bool = True,
        other_adapter: str = second, other_decoding: str = "usual", other_sees: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Ask two adapters the same; decoding is "usual", "greedy", "beams" or "sampled"."""
        return as_values(
            last(run(picture, question, adapter, decoding, sees, other_adapter, other_decoding, other_sees))
        )

    inputs = [picture, question, *left, *right]
    shown = [table, compared, *buttons]
    asking = gr.on(
        [button.click, question.submit], show, inputs, shown, show_progress="hidden", **ASKS_MODELS, **PRIVATE
    )
    for one, verdict in zip(buttons, VERDICTS, strict=True):
        one.click(partial(vote, verdict=verdict), compared, [kept, compared, *buttons], **SOON)
    nothing: dict[Any, Any] = {
        table: "",
        compared: None,
        **{button: gr.update(interactive=False) for button in buttons},
    }
    context.forget(picture, nothing, asking, follows_adapter=False)
    context.endpoint("compare", compare_two, inputs)


def compare(engine: Engine, picture: ImageRef, question: str, sides: tuple[Side, Side]) -> Iterator[Compared]:
    """Ask both at once; what has come so far, after each answer and at short intervals.

    Raises:
        UserError: both are the same, a decoding is not known, or the question cannot be put.
        Busy: too many wait.
    """
    for side in sides:
        if side.decoding not in DECODINGS.values():
            raise UserError(f"decoding '{side.decoding}' is not known; take one of {', '.join(DECODINGS.values())}")
        if not isinstance(side.sees, bool):
            raise UserError(f"sees: '{side.sees}' is neither true nor false")
    if sides[0] == sides[1]:
        raise UserError("Left and right are the same: choose another adapter or decoding, or hide the picture from one")

    def ask(side: Side) -> PendingAnswer:
        turn = Turn("user", question, (picture,) if side.sees else ())
        usual = engine.adapter(side.adapter).default_decoding("vqa")
        return engine.chat([turn], adapter=side.adapter, decoding=_decoding(side.decoding, usual))

    began = time.monotonic()
    took = [0.0, 0.0]
    for answers in wait_for(submit_all(partial(ask, side) for side in sides)):
        for place, answer in enumerate(answers):
            if answer is not None and not took[place]:
                took[place] = time.monotonic() - began
        yield Compared(question, picture, sides, (answers[0], answers[1]), (took[0], took[1]))


def as_values(compared: Compared) -> dict[str, Any]:
    """What was compared, for programs and the file of votes: the picture by its name and hash alone."""
    found: dict[str, Any] = {
        "question": compared.question,
        "picture": {"name": compared.picture.label, "sha256": compared.picture.digest()},
    }
    for name, side, answer, seconds in zip(
        ("left", "right"), compared.sides, compared.answers, compared.seconds, strict=True
    ):
        found[name] = {
            "adapter": side.adapter,
            "decoding": side.decoding,
            "sees": side.sees,
            "answer": answer.text if answer else None,
            "confidence": answer.confidence if answer else None,
            "seconds": round(seconds, 2),
        }
    return found


def as_table(compared: Compared) -> str:
    """Both answers side by side, for people."""
    names = {value: name for name, value in DECODINGS.items()}
    cells = []
    for side, answer, seconds in zip(compared.sides, compared.answers, compared.seconds, strict=True):
        said = "…" if answer is None else escape(answer.text) or "<i>no words</i>"
        told = "" if answer is None else escape(how_it_went(answer, seconds))
        how = names[side.decoding] + ("" if side.sees else " · without the picture")
        cells.append(
            f"<section><h3>{escape(side.adapter)}</h3><p class='how'>{escape(how)}</p><p class='answer'>{said}</p>"
            f"<p class='went'>{told}</p></section>"
        )
    return f"<div class='compared'>{''.join(cells)}</div>"


def _side(label: str, names: list[str], adapter: str, *, sees: bool) -> list[Any]:
    key = label.lower()
    with gr.Column(min_width=130):
        return [
            gr.Dropdown(names, value=adapter, label=label, filterable=False, elem_id=f"{key}-adapter"),
            gr.Dropdown(
                list(DECODINGS.items()), value="usual", label=f"{label}: how", filterable=False,
                elem_id=f"{key}-decoding",
            ),
            gr.Checkbox(value=sees, label="Sees the picture", elem_id=f"{key}-sees", container=False),
        ]  # fmt: skip


def _decoding(name: str, usual: Decoding) -> Decoding:
    if name == "usual":
        return usual
    plain = replace(usual, num_beams=1, temperature=0.0)
    return {
        "greedy": plain,
        "beams": replace(plain, num_beams=_BEAMS),
        "sampled": replace(plain, temperature=_TEMPERATURE),
    }[name]


def _where(votes: VoteFile) -> str:
    return f"A vote is kept in {escape(str(votes.path))}, with the question and both answers, without the picture."
