"""The tab that shows where the bridge looks: attention over the picture, of one query or of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from serve.attention import CAVEAT, Attention, describe, draw, look
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, PageContext
from serve.page.inputs import show_user_errors, uploaded, whole
from serve.page.notes import look_note, shown_note

_SMALL = 168  # pixels, the side of a query's small map


@dataclass(frozen=True)
class AttentionShown:
    """What was seen in a picture, kept so that another query or layer is drawn without asking the model again."""

    picture: ImageRef
    attention: Attention


def attention_tab(context: PageContext) -> tuple[gr.HTML, gr.Textbox]:
    """Build the tab and its endpoint `/look`; returns the note and the field that depend on the adapter."""
    adapter = context.engine.adapter()
    with gr.Tab("Look", id="look"):
        note = gr.HTML(**shown_note(look_note(adapter)), elem_id="look-note")
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = context.picture_slot()
                question = gr.Textbox(
                    label="Question", lines=1, info="This adapter's bridge reads the question with the picture.",
                    visible=adapter.assembly.reads_instructions, elem_id="look-question",
                )  # fmt: skip
                button = gr.Button("Look", variant="primary", elem_id="look-ask")
                layer = gr.Dropdown(
                    [("All layers together", 0)], value=0, label="Layer", elem_id="look-layer", filterable=False
                )
                query = gr.Slider(
                    0, 1, 0, step=1, label="Query", info="0: all together", elem_id="look-query", interactive=False
                )
            with gr.Column(scale=6, min_width=280):
                seen = gr.Image(
                    label="Where it looks", height=420, interactive=False, buttons=["download", "fullscreen"],
                    elem_classes="picture", elem_id="seen",
                )  # fmt: skip
                caption = gr.HTML(f"<p>{CAVEAT}</p>", elem_classes="hint", elem_id="look-caption")
        every = gr.Gallery(
            label="Every query", show_label=False, columns=8, height="auto", object_fit="cover", allow_preview=False,
            buttons=[], interactive=False, visible=False, elem_id="queries",
        )  # fmt: skip
        looked = gr.State(None)
        context.offer_examples(picture)

    def run(picture: Any, question: str | None, adapter: str) -> AttentionShown:
        image = uploaded(picture, context.uploads)
        found = context.engine.run(
            lambda loaded: look(loaded.assembly.vision_side, image, question or ""), adapter=adapter
        )
        return AttentionShown(image, found.result())

    def show(picture: Any, question: str, adapter: str) -> tuple[Any, ...]:
        with show_user_errors():
            found = run(picture, question, adapter)
            attention = found.attention
            layers = [("All layers together", 0), *((f"Layer {number}", number) for number in attention.layers)]
            return (
                found,
                *_drawn(found, 0, 0),
                gr.Slider(maximum=attention.queries, value=0, interactive=True),
                gr.Dropdown(choices=layers, value=0),
                gr.Gallery(_small_maps(found, 0), visible=True),
            )

    def redraw(found: AttentionShown | None, query: Any, layer: Any) -> tuple[Any, Any]:
        if found is None:
            return gr.skip(), gr.skip()
        with show_user_errors():
            return _drawn(found, whole(query, "query"), whole(layer, "layer"))

    def redraw_all(found: AttentionShown | None, query: Any, layer: Any) -> tuple[Any, Any, Any]:
        if found is None:
            return gr.skip(), gr.skip(), gr.skip()
        with show_user_errors():
            chosen = whole(layer, "layer")
            return *_drawn(found, whole(query, "query"), chosen), _small_maps(found, chosen)

    def choose(event: gr.SelectData) -> int:
        return int(event.index) + 1

    def draw_attention(
        picture: Any, question: str | None = None, query: int = 0, layer: int = 0, adapter: str = ""
    ) -> tuple[Image.Image, str]:
        """Draw where the bridge looks; query and layer count from 1, and 0 takes all together."""
        with show_user_errors():
            chosen = whole(query, "query"), whole(layer, "layer")
            found = run(picture, question, adapter)
            return draw(open_image(found.picture), found.attention, *chosen), describe(found.attention, *chosen)

    drawn: dict[str, Any] = {"preprocess": False, "concurrency_id": "draw", "concurrency_limit": 2, **PRIVATE}
    asking = button.click(
        show,
        [picture, question, context.adapter],
        [looked, seen, caption, query, layer, every],
        **ASKS_MODELS,
        **PRIVATE,
    )
    query.input(
        redraw, [looked, query, layer], [seen, caption], show_progress="hidden", trigger_mode="always_last", **drawn
    )
    layer.input(redraw_all, [looked, query, layer], [seen, caption, every], **drawn)
    every.select(choose, None, query, **IMMEDIATE).then(
        redraw, [looked, query, layer], [seen, caption], show_progress="hidden", **drawn
    )
    nothing_seen = {
        looked: None,
        seen: None,
        caption: f"<p>{CAVEAT}</p>",
        query: gr.update(value=0, interactive=False),
        every: gr.update(value=[], visible=False),
    }
    context.forget(picture, nothing_seen, asking)
    context.endpoint("look", draw_attention, [picture, question, query, layer, context.adapter], _picture_and_words)
    return note, question


def _picture_and_words() -> list[Any]:
    return [gr.Image(visible=False, label="picture"), gr.Textbox(visible=False, label="caption")]


def _drawn(found: AttentionShown, query: int, layer: int) -> tuple[Image.Image, str]:
    drawn = draw(open_image(found.picture), found.attention, query, layer)
    return drawn, f"<p>{describe(found.attention, query, layer)}</p>"


def _small_maps(found: AttentionShown, layer: int) -> list[tuple[Image.Image, str]]:
    """One small picture a query."""
    picture = open_image(found.picture)
    picture.thumbnail((_SMALL * 2, _SMALL * 2))
    return [
        (_small(draw(picture, found.attention, query, layer)), f"{query}")
        for query in range(1, found.attention.queries + 1)
    ]


def _small(drawn: Image.Image) -> Image.Image:
    drawn.thumbnail((_SMALL * 2, _SMALL * 2))
    return drawn
