"""The tab that shows where things are: a phrase that is looked for, or all that the bridge looks at."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter
from serve.looking.attention import CAVEAT, Attention, describe_plainly, draw, look
from serve.looking.grounding import Grounder, Grounding, describe_found, draw_found
from serve.looking.named_things import things_named
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, PageContext
from serve.page.inputs import show_user_errors, uploaded, whole
from serve.page.notes import look_note, shown_note

_SMALL = 168  # pixels, the side of a query's small map
_MOST_WORDS = 200  # letters of a phrase
_HINT = "Leave it empty to see all that the adapter looks at."


@dataclass(frozen=True)
class AttentionShown:
    """What was seen in a picture, kept so that another query or layer is drawn without asking the model again."""

    picture: ImageRef
    attention: Attention


def attention_tab(context: PageContext) -> tuple[gr.HTML, gr.Textbox]:
    """Build the tab and its endpoints `/look` and `/ground`; returns the note and the field of the adapter's own."""
    adapter = context.engine.adapter()
    with gr.Tab("Look", id="look"):
        note = gr.HTML(**shown_note(look_note(adapter)), elem_id="look-note")
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                picture = context.picture_slot()
                phrase = gr.Textbox(
                    label="Look for", lines=1, placeholder="the man in red", info=_HINT, elem_id="look-phrase",
                    max_length=_MOST_WORDS,
                )  # fmt: skip
                named = gr.Radio([], label="Words of the caption", visible=False, elem_id="look-named")
                question = gr.Textbox(
                    label="Question", lines=1, info="This adapter reads the question together with the picture.",
                    visible=adapter.assembly.reads_instructions, elem_id="look-question",
                )  # fmt: skip
                with gr.Row():
                    button = gr.Button("Look", variant="primary", elem_id="look-ask")
                    name = gr.Button("Name things to look for", elem_id="look-name")
            with gr.Column(scale=6, min_width=280):
                seen = gr.Image(
                    label="Where it looks", height=420, interactive=False, buttons=["download", "fullscreen"],
                    elem_classes="picture", elem_id="seen",
                )  # fmt: skip
                caption = gr.HTML(f"<p>{CAVEAT}</p>", elem_classes="hint", elem_id="look-caption")
                layer = gr.Dropdown(
                    [("All looks together", 0)], value=0, label="Look", elem_id="look-layer", filterable=False,
                    info="It looks several times, each time with what it has seen before.", visible=False,
                )  # fmt: skip
                query = gr.Slider(
                    0, 1, 0, step=1, label="Glance", info="Each looks for something of its own; 0: all together.",
                    elem_id="look-query", interactive=False, visible=False,
                )  # fmt: skip
        every = gr.Gallery(
            label="Every glance", show_label=False, columns=8, height="auto", object_fit="cover", allow_preview=False,
            buttons=[], interactive=False, visible=False, elem_id="queries",
        )  # fmt: skip
        looked = gr.State(None)
        context.offer_examples(picture)

    grounders: dict[str, Grounder] = {}

    def run(picture: Any, question: str | None, adapter: str) -> AttentionShown:
        image = uploaded(picture, context.uploads)
        found = context.engine.run(
            lambda loaded: look(loaded.assembly.vision_side, image, question or ""), adapter=adapter
        )
        return AttentionShown(image, found.result())

    def find(picture: Any, phrase: object, adapter: str) -> tuple[ImageRef, Grounding]:
        image, sought = uploaded(picture, context.uploads), _phrase(phrase)
        found = context.engine.run(lambda loaded: grounder_of(loaded).find(image, [sought])[0], adapter=adapter)
        return image, found.result()

    def grounder_of(loaded: LoadedAdapter) -> Grounder:
        if loaded.name not in grounders:  # in the engine's thread, so each is made once
            grounders[loaded.name] = Grounder(loaded.assembly.vision_side)
        return grounders[loaded.name]

    def show(picture: Any, phrase: object, question: str, adapter: str) -> tuple[Any, ...]:
        with show_user_errors():
            if isinstance(phrase, str) and phrase.strip():
                image, place = find(picture, phrase, adapter)
                words = f"<p>{escape(describe_found(place))}</p>"
                hidden = gr.update(visible=False)
                return None, draw_found(open_image(image), [place]), words, hidden, hidden, hidden
            found = run(picture, question, adapter)
            attention = found.attention
            looks = [(f"Look {place}", number) for place, number in enumerate(attention.layers, start=1)]
            return (
                found,
                *_drawn(found, 0, 0),
                gr.Slider(maximum=attention.queries, value=0, interactive=True, visible=True),
                gr.Dropdown(choices=[("All looks together", 0), *looks], value=0, visible=len(looks) > 1),
                gr.Gallery(_small_maps(found, 0), visible=True),
            )

    def redraw(found: AttentionShown | None, query: Any, layer: Any) -> tuple[Any, Any]:
        if found is None:
            return gr.skip(), gr.skip()
        with show_user_errors():
            return _drawn(found, whole(query, "Glance"), whole(layer, "Look"))

    def redraw_all(found: AttentionShown | None, query: Any, layer: Any) -> tuple[Any, Any, Any]:
        if found is None:
            return gr.skip(), gr.skip(), gr.skip()
        with show_user_errors():
            chosen = whole(layer, "Look")
            return *_drawn(found, whole(query, "Glance"), chosen), _small_maps(found, chosen)

    def choose(event: gr.SelectData) -> int:
        return int(event.index) + 1

    def name_things(picture: Any, adapter: str) -> Any:
        """What a caption of the picture names, to choose from."""
        with show_user_errors():
            image = uploaded(picture, context.uploads)
            pending = context.engine.caption(image, adapter=adapter, decoding=Decoding.preset("caption"))
            names = things_named(pending.result().text)
            if not names:
                raise UserError("The caption of this picture names nothing to look for: write what you look for")
            return gr.Radio(names, value=None, visible=True)

    def draw_attention(
        picture: Any, question: str | None = None, query: int = 0, layer: int = 0, adapter: str = ""
    ) -> tuple[Image.Image, str]:
        """Draw where the bridge looks; query and layer count from 1, and 0 takes all together."""
        with show_user_errors():
            chosen = whole(query, "query"), whole(layer, "layer")
            found = run(picture, question, adapter)
            return _drawn_as_asked(found, *chosen)

    def ground(picture: Any, phrase: str, adapter: str = "") -> dict[str, Any]:
        """Find a phrase: its box and point as fractions of the picture; the box is null without a grounding head."""
        with show_user_errors():
            _, found = find(picture, phrase, adapter)
            box = list(found.box) if found.box is not None else None
            return {"phrase": found.phrase, "box": box, "point": list(found.point)}

    drawn: dict[str, Any] = {"preprocess": False, "concurrency_id": "draw", "concurrency_limit": 2, **PRIVATE}
    inputs, outputs = [picture, phrase, question, context.adapter], [looked, seen, caption, query, layer, every]
    asking = gr.on([button.click, phrase.submit], show, inputs, outputs, **ASKS_MODELS, **PRIVATE)
    naming = name.click(name_things, [picture, context.adapter], named, **ASKS_MODELS, **PRIVATE)
    picked = named.input(lambda name: name, named, phrase, preprocess=False, **IMMEDIATE).then(
        show, inputs, outputs, **ASKS_MODELS, **PRIVATE
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
        query: gr.update(value=0, interactive=False, visible=False),
        layer: gr.update(value=0, visible=False),
        every: gr.update(value=[], visible=False),
        named: gr.update(choices=[], value=None, visible=False),
    }
    picture.change(None, None, cancels=[naming, picked], **IMMEDIATE)
    context.forget(picture, nothing_seen, asking)
    context.endpoint("look", draw_attention, [picture, question, query, layer, context.adapter], _picture_and_words)
    context.endpoint("ground", ground, [picture, phrase, context.adapter])
    return note, question


def _phrase(value: object) -> str:
    """What is looked for, without blanks around it.

    Raises:
        UserError: it is no text, empty or very long.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError("Look for: it is empty; write what to look for, such as the man in red")
    if len(value) > _MOST_WORDS:
        raise UserError(f"Look for: {len(value)} letters are too many; write {_MOST_WORDS} at most")
    return value.strip()


def _picture_and_words() -> list[Any]:
    return [gr.Image(visible=False, label="picture"), gr.Textbox(visible=False, label="caption")]


def _drawn(found: AttentionShown, query: int, layer: int) -> tuple[Image.Image, str]:
    drawn, words = _drawn_as_asked(found, query, layer, names=("Glance", "Look"))
    return drawn, f"<p>{words}</p>"


def _drawn_as_asked(
    found: AttentionShown, query: int, layer: int, names: tuple[str, str] = ("query", "layer")
) -> tuple[Image.Image, str]:
    """The drawing, and in words what it shows.

    Raises:
        UserError: there is no such query or layer; `names` is what the asker calls them.
    """
    if not 0 <= query <= found.attention.queries:
        raise UserError(f"{names[0]} {query}: take 1 to {found.attention.queries}, or 0 for all together")
    if layer not in (0, *found.attention.layers):
        known = ", ".join(map(str, found.attention.layers))
        raise UserError(f"{names[1]} {layer}: take one of {known}, or 0 for all together")
    drawn = draw(open_image(found.picture), found.attention, query, layer)
    return drawn, describe_plainly(found.attention, query, layer)


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
