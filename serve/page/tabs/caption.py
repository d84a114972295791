"""The tab for captions: in one of two languages, found by beams, written greedily, or sampled several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.engine import Engine
from serve.engine.pending import PendingAnswer
from serve.page.context import ASKS_MODELS, PRIVATE, Asking, PageContext, read_along, submit_all, wait_for
from serve.page.inputs import Settings, show_user_errors, uploaded
from serve.page.notes import caption_note, shown_note

LANGUAGES = {"English": "en", "Chinese (中文)": "zh"}
STYLES = {"Best of several (beam search)": "beam", "Quick (greedy)": "greedy", "Varied (three, sampled)": "varied"}
VARIED = 3  # captions
_TEMPERATURE, _TOP_P = 0.8, 0.9  # of the varied ones, if no temperature is set


def caption_tab(context: PageContext) -> gr.HTML:
    """Build the tab and its endpoint `/caption`; returns the note that depends on the adapter."""
    with gr.Tab("Caption", id="caption"):
        note = gr.HTML(**shown_note(caption_note(context.engine.adapter())), elem_id="caption-note")
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = context.picture_slot()
            with gr.Column(scale=6, min_width=280):
                style = gr.Radio(
                    list(STYLES.items()), value="beam", label="Style", elem_id="style",
                    info="How the words are found; an adapter describes in the one manner it was taught.",
                )  # fmt: skip
                language = gr.Radio(
                    list(LANGUAGES.items()), value="en", label="Language", elem_id="language",
                    info="An adapter writes the languages it was taught.",
                )  # fmt: skip
                button = gr.Button("Describe", variant="primary", elem_id="caption-ask")
                said = gr.Textbox(
                    label="Caption", lines=3, max_lines=12, interactive=False, buttons=["copy"], elem_id="caption",
                    elem_classes="said", placeholder="The caption comes here.",
                )  # fmt: skip
        examples = gr.Column()

    def caption(
        picture: Any,
        style: str,
        language: str,
        adapter: str,
        longest: int,
        temperature: float,
        top_p: float,
        beams: int,
    ) -> Iterator[str]:
        """Describe a picture; style is "beam", "greedy" or "varied" (three, a line each), language "en" or "zh"."""
        with show_user_errors():
            settings = Settings.of([longest, temperature, top_p, beams])
            pending_answers = ask(
                context.engine, uploaded(picture, context.uploads), style, language, adapter, settings
            )
            if len(pending_answers) == 1:
                yield from read_along(pending_answers[0])
                return
            for answers in wait_for(pending_answers):
                yield "\n".join("…" if answer is None else answer.text for answer in answers)

    inputs = [picture, style, language, context.adapter, *context.settings]
    asking = button.click(caption, inputs, said, api_name="describe", show_progress="hidden", **ASKS_MODELS, **PRIVATE)
    with examples:
        context.offer_examples(picture, asking=Asking(asking, caption, inputs, {said: ""}))
    context.forget(picture, {said: ""}, asking)
    context.endpoint("caption", caption, inputs, _text)
    return note


def _text() -> gr.Textbox:
    return gr.Textbox(visible=False, label="caption")


def ask(
    engine: Engine, picture: ImageRef, style: str, language: str, adapter: str, settings: Settings
) -> list[PendingAnswer]:
    """Ask for a caption, or for several that differ.

    Raises:
        UserError: an unknown style or language.
        Busy: too many wait.
    """
    default_decoding = Decoding.preset("caption")
    if style == "beam":
        settings = replace(settings, temperature=0.0, beams=settings.beams or default_decoding.num_beams)
    elif style == "greedy":
        settings = replace(settings, temperature=0.0, beams=1)
    elif style == "varied":
        settings = settings.sampled(_TEMPERATURE, _TOP_P)
    else:
        raise UserError(f"style '{style}' is not known; take one of {', '.join(STYLES.values())}")
    count = VARIED if style == "varied" else 1
    one = partial(engine.caption, picture, language=language, adapter=adapter, decoding=settings.over(default_decoding))
    return submit_all([one] * count)
