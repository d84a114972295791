"""The tab for one picture and several questions at once, each answer with its confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Turn
from qformer.errors import UserError
from serve.engine.engine import Engine
from serve.engine.pending import Answer, PendingAnswer
from serve.page.context import ASKS_MODELS, PRIVATE, Asking, PageContext, last, submit_all, wait_for
from serve.page.examples import ANY_QUESTION
from serve.page.inputs import Settings, show_user_errors, uploaded, words

MAX_QUESTIONS = 24
_HINT = (
    "Confidence is the model's own probability for its words, or for a choice among yours. It is no promise that an"
    " answer is right."
)


def vqa_tab(context: PageContext) -> None:
    """Build the tab and its endpoint `/vqa`."""
    with gr.Tab("VQA", id="vqa"):
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = context.picture_slot()
            with gr.Column(scale=6, min_width=280):
                questions = gr.Textbox(
                    label="Questions, one a line", lines=4, max_lines=12, elem_id="questions",
                    placeholder="what is in the picture?\nwhat colour is it? | red, green, blue",
                    info="Choices behind a bar make it a closed question. Shift+Enter asks.",
                )  # fmt: skip
                button = gr.Button("Ask", variant="primary", elem_id="vqa-ask")
                table = gr.HTML(elem_id="answers", padding=False)
                gr.HTML(f"<p>{_HINT}</p>", elem_classes="hint")
        examples = gr.Column()  # what is in them is given once it is known what asks

    def run(picture: Any, questions: str, adapter: str, *settings: Any) -> Iterator[list[dict[str, Any]]]:
        with show_user_errors():
            asked = [
                parse_line(line) for line in words(questions, "There is no question yet").splitlines() if line.strip()
            ]
            pending_answers = ask(
                context.engine, uploaded(picture, context.uploads), asked, adapter, Settings.of(settings)
            )
            for answers in wait_for(pending_answers):
                yield [row(question, answer) for (question, _), answer in zip(asked, answers, strict=True)]

    def show(picture: Any, questions: str, adapter: str, *settings: Any) -> Iterator[str]:
        for rows in run(picture, questions, adapter, *settings):
            yield as_table(rows)

    def vqa(
        picture: Any, questions: str, adapter: str, longest: int, temperature: float, top_p: float, beams: int
    ) -> list[dict[str, Any]]:
        """Answer questions about a picture, one a line; "question | a, b" chooses among a and b."""
        return last(run(picture, questions, adapter, longest, temperature, top_p, beams))

    inputs = [picture, questions, context.adapter, *context.settings]
    asking = gr.on([button.click, questions.submit], show, inputs, table, **ASKS_MODELS, **PRIVATE)
    with examples:
        context.offer_examples(
            picture, questions, fill=lambda example: ["\n".join(example.questions or (ANY_QUESTION,))],
            asking=Asking(asking, show, inputs, {table: ""}),
        )  # fmt: skip
    context.forget(picture, {table: ""}, asking)
    context.endpoint("vqa", vqa, inputs)


def parse_line(line: str) -> tuple[str, tuple[str, ...]]:
    """A line as a question and its choices, which come after a bar with commas between them."""
    question, bar, choices = line.partition("|")
    return question.strip(), tuple(filter(None, map(str.strip, choices.split(",")))) if bar else ()


def ask(
    engine: Engine,
    picture: ImageRef,
    asked: Sequence[tuple[str, tuple[str, ...]]],
    adapter: str,
    settings: Settings,
) -> list[PendingAnswer]:
    """Put questions about one picture to an adapter, all at once.

    Raises:
        UserError: there are too many, or one cannot be asked.
        Busy: too many wait.
    """
    if len(asked) > MAX_QUESTIONS:
        raise UserError(f"{len(asked)} questions at once are too many: ask at most {MAX_QUESTIONS}")
    decoding = settings.over(engine.adapter(adapter).default_decoding("vqa"))

    def one(question: str, choices: Sequence[str]) -> PendingAnswer:
        turns = [Turn("user", words(question, "A line has choices but no question before the bar"), (picture,))]
        if choices:
            return engine.choose(turns, choices, adapter=adapter)
        return engine.chat(turns, adapter=adapter, decoding=decoding)

    return submit_all(partial(one, *line) for line in asked)


def row(question: str, answer: Answer | None) -> dict[str, Any]:
    """A question and its answer for programs; no answer yet is None."""
    if answer is None:
        return {"question": question, "answer": None, "confidence": None}
    found: dict[str, Any] = {"question": question, "answer": answer.text, "confidence": answer.confidence}
    return found | ({"choices": answer.choices} if answer.choices else {})


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Questions, answers and confidence for people."""
    lines = "".join(
        f"<tr><td>{escape(one['question'])}</td><td class='answer'>{_answer(one)}</td>"
        f"<td class='sure'>{_confidence(one)}</td></tr>"
        for one in rows
    )
    return (
        "<table class='answers'><thead><tr><th>Question</th><th>Answer</th><th class='sure'>Confidence</th></tr>"
        f"</thead><tbody>{lines}</tbody></table>"
    )


def _answer(one: dict[str, Any]) -> str:
    if one["answer"] is None:
        return "…"
    others = " · ".join(f"{name} {share:.0%}" for name, share in list(one.get("choices", {}).items())[1:])
    said = escape(one["answer"]) or "<i>no words</i>"
    return said + (f"<br><span class='others'>{escape(others)}</span>" if others else "")


def _confidence(one: dict[str, Any]) -> str:
    if one["confidence"] is None:
        return ""
    return f"{one['confidence']:.0%}<span class='bar'><i style='width:{one['confidence']:.0%}'></i></span>"
