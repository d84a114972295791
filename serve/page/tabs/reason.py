"""The tab for chain of thought: the thought in a message that folds away, then the answer that is made from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from qformer.decoding import Decoding
from serve.adapter import checked_choices
from serve.engine.engine import Engine
from serve.engine.pending import Answer
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, Asking, PageContext, last, read_along
from serve.page.examples import ANY_QUESTION
from serve.page.inputs import Settings, as_visitor, show_user_errors, uploaded, words
from serve.page.notes import footnote, reason_note, shown_note, waiting_note
from serve.reasoning import asked_answer, asked_rationale, question_example


@dataclass(frozen=True)
class ReasoningInProgress:
    """How far a chain of thought has come.

    Attributes:
        rationale: what is written of the thought.
        answer: what is written of the answer; None while it is not begun.
        seconds: spent on the thought.
        finished: the whole answer, at the end.
        total: seconds spent on both, at the end.
    """

    rationale: str
    answer: str | None = None
    seconds: float = 0.0
    finished: Answer | None = None
    total: float = 0.0


def reason_tab(context: PageContext) -> gr.HTML:
    """Build the tab and its endpoint `/reason`; returns the note that depends on the adapter."""
    with gr.Tab("Reason", id="reason"):
        note = gr.HTML(**shown_note(reason_note(context.engine.adapter())), elem_id="reason-note")
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = context.picture_slot()
            with gr.Column(scale=6, min_width=280):
                question = gr.Textbox(
                    label="Question", lines=1, max_lines=4, elem_id="reason-question",
                    placeholder="why is the street wet?",
                )  # fmt: skip
                choices = gr.Textbox(
                    label="Choices (optional)", lines=1, max_lines=2, elem_id="reason-choices",
                    placeholder="rain, snow, spilt milk",
                )  # fmt: skip
                button = gr.Button("Think, then answer", variant="primary", elem_id="reason-ask")
                window = gr.Chatbot(
                    show_label=False, height=260, elem_id="thoughts", buttons=["copy"], allow_tags=False,
                    latex_delimiters=[], feedback_options=None, placeholder="The thought comes here, then the answer.",
                )  # fmt: skip
                status = gr.HTML(elem_id="reason-status", elem_classes="status", padding=False)
        examples = gr.Column()

    def run(
        picture: Any, question: str, choices: str | None, adapter: str, *settings: Any
    ) -> Iterator[ReasoningInProgress]:
        with show_user_errors():
            asked = words(question, "There is no question yet: write one first")
            named = checked_choices(choices.split(",")) if choices and choices.strip() else ()
            image = uploaded(picture, context.uploads)
            yield from think(context.engine, image, asked, named, adapter, Settings.of(settings))

    def show(
        picture: Any, question: str, choices: str, adapter: str, *settings: Any
    ) -> Iterator[tuple[list[dict[str, Any]], str]]:
        began = time.monotonic()
        for thought in run(picture, question, choices, adapter, *settings):
            waits = not thought.finished and not thought.answer
            yield as_messages(thought), waiting_note(0, time.monotonic() - began) if waits else ""

    def reason(
        picture: Any, question: str, choices: str | None = None, adapter: str = "",
        longest: int = 0, temperature: float = 0.0, top_p: float = 1.0, beams: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Think about a question, then answer it; choices may be given with commas between them."""
        whole = last(run(picture, question, choices, adapter, longest, temperature, top_p, beams))
        assert whole.finished is not None
        found = {"rationale": whole.rationale, "answer": whole.answer, "confidence": whole.finished.confidence}
        return found if whole.finished.choices is None else found | {"choices": whole.finished.choices}

    inputs = [picture, question, choices, context.adapter, *context.settings]
    asks = [button.click, question.submit, choices.submit]
    asking = gr.on(asks, show, inputs, [window, status], show_progress="hidden", **ASKS_MODELS, **PRIVATE)
    nothing: dict[Any, Any] = {window: [], status: ""}
    with examples:
        context.offer_examples(
            picture, question, fill=lambda example: [next(iter(example.questions), ANY_QUESTION)],
            asking=Asking(asking, show, inputs, nothing),
        )  # fmt: skip
    under_way = context.forget(picture, nothing, asking)
    window.clear(None, None, cancels=under_way, **IMMEDIATE)
    window.clear(lambda: ([], ""), None, [window, status], **IMMEDIATE)
    context.endpoint("reason", reason, inputs)
    return note


def think(
    engine: Engine, picture: ImageRef, question: str, choices: tuple[str, ...], adapter: str, settings: Settings
) -> Iterator[ReasoningInProgress]:
    """The two stages of a chain of thought (arXiv 2302.00923), each as it is written.

    Args:
        engine: what answers.
        picture: seen by both stages.
        question: in words.
        choices: that may be answered, the likeliest being the answer; none leaves the answer open.
        adapter: its name.
        settings: the longest thought is the recipe's, or what is set; the answer is as long as a question's.

    Raises:
        UserError: the question cannot be put.
        Busy: too many wait.
    """
    loaded = engine.adapter(adapter)
    example = question_example(picture, question, choices=choices)
    thinking = settings.over(Decoding(max_new_tokens=loaded.assembly.rationale_tokens))
    first = asked_rationale(loaded, example, longest=thinking.max_new_tokens)
    yield ReasoningInProgress("")
    began = time.monotonic()
    as_visitor()
    pending = engine.submit(first, adapter=adapter, decoding=thinking)
    for text in read_along(pending):
        yield ReasoningInProgress(text)
    rationale, seconds = pending.result().text, time.monotonic() - began
    yield ReasoningInProgress(rationale, "", seconds)
    second = asked_answer(loaded, example, rationale)
    short = replace(settings, longest=0).over(Decoding())
    as_visitor()
    pending = engine.submit(second, adapter=adapter, decoding=short, choices=choices, admitted=True)
    for text in read_along(pending):
        yield ReasoningInProgress(rationale, text, seconds)
    said = pending.result()
    yield ReasoningInProgress(rationale, said.text, seconds, said, time.monotonic() - began)


def as_messages(thought: ReasoningInProgress) -> list[dict[str, Any]]:
    """A thought as the page shows it, then its answer; the thought stays open until it is folded by hand."""
    metadata: dict[str, Any] = {"title": "Thinking", "status": "pending"}
    if thought.answer is not None:
        metadata = {"title": "Thought", "duration": round(thought.seconds, 1)}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": _plain(thought.rationale) or "…", "metadata": metadata}
    ]
    if thought.answer or thought.finished:
        text = _plain(thought.answer or "") or "<i>no words</i>"
        if thought.finished:
            text += f"\n\n{footnote(thought.finished, thought.total)}"
        messages.append({"role": "assistant", "content": text})
    return messages


def _plain(text: str) -> str:
    return escape(text, quote=False)
