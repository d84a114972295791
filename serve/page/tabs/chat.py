"""The tab for conversations: several turns, several pictures in each, written as it is read, stopped or tried again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import IMAGE_MARK, Turn
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.pending import Answer
from serve.limits import MAX_TURN_PICTURES
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, SOON, PageContext
from serve.page.conversation import Conversation, KeptConversations, Said
from serve.page.inputs import Settings, check_kept, file_data, show_user_errors, uploaded, words
from serve.page.notes import footnote, waiting_note
from serve.page.transcript import as_json, as_markdown

USUAL = Decoding(max_new_tokens=128)
AGAIN = 0.7  # temperature of another try, if none is set: the same settings would give the same words
_PLACEHOLDER = (
    "Put in one or several pictures, or drop them here, and ask. They stay with the turn they came in, so you can ask"
    " on about them."
)
_TYPING = "<span class='typing'><i></i><i></i><i></i></span>"
_TOKEN = "(...rest) => [window.querybridge.token(), ...rest.slice(1)]"  # of the browser's tab
_SAVE = "file => { window.querybridge.save(file); return null; }"


def chat_tab(context: PageContext, page: gr.Blocks) -> None:
    """Build the tab and its endpoints `/chat`, `/retry`, `/undo`, `/clear` and `/stop`."""
    kept = KeptConversations()
    with gr.Tab("Chat", id="chat"):
        downloads = [gr.Button("Markdown", size="sm", render=False), gr.Button("JSON", size="sm", render=False)]
        window = gr.Chatbot(
            show_label=False, height="max(15rem, calc(100dvh - 16.5rem))", min_height=200, elem_id="chat",
            placeholder=_PLACEHOLDER, examples=_examples(context, context.engine.adapter().name),
            buttons=["copy", *downloads], allow_tags=False, latex_delimiters=[], feedback_options=None,
        )  # fmt: skip
        box = gr.MultimodalTextbox(
            show_label=False, label="Your turn", file_count="multiple", file_types=["image"], lines=1, max_lines=8,
            placeholder="Ask about a picture", elem_id="chat-box", max_plain_text_length=20_000,
        )  # fmt: skip
        status = gr.HTML(elem_id="chat-status", elem_classes="status", padding=False)
        with gr.Accordion("Take a picture", open=False, elem_id="chat-camera"):
            camera = gr.Image(
                type="filepath", image_mode=None, show_label=False, label="Camera", sources=["webcam"], buttons=[],
                height=260,
            )  # fmt: skip
        conversation = gr.State(Conversation())
        token, file = gr.Textbox(visible=False), gr.JSON(visible=False)

    def answer(
        conversation: Conversation, turn: Turn | None, adapter: str, settings: Settings
    ) -> Iterator[tuple[list[Turn], Answer | None]]:
        chosen = settings if turn is not None else settings.sampled(AGAIN, 1.0)
        yield from conversation.answer(context.engine, turn, adapter, chosen.over(USUAL))

    def begin(conversation: Conversation, turn: Turn | None) -> tuple[Any, Any, str]:
        shown = conversation.begin(turn)
        box_now: Any = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        return as_messages(shown, conversation.said), box_now, waiting_note(0, 0)

    def send(token: Any, message: Any, conversation: Conversation) -> tuple[Any, ...]:
        mine = kept.open(token, conversation)  # the page may not have opened it yet
        with show_user_errors():
            return mine, *begin(mine, read_turn(message, context.uploads))

    def again(conversation: Conversation) -> tuple[Any, Any, str]:
        with show_user_errors():
            return begin(conversation, None)

    def send_example(token: Any, conversation: Conversation, adapter: str, event: gr.SelectData) -> tuple[Any, ...]:
        mine = kept.open(token, conversation)
        offered = _with_questions(context, adapter)
        example = offered[int(event.index) % len(offered)]  # our own: what an event says of itself is anybody's
        picture = ImageRef(example.path.name, path=example.path)
        with show_user_errors():
            return mine, *begin(mine, Turn("user", example.questions[0], (picture,)))

    def write(conversation: Conversation, adapter: str, *settings: Any) -> Iterator[tuple[Any, Any, str]]:
        draft = conversation.take_draft()
        if draft is None:  # it was stopped, or forgotten, before it was put to the engine
            yield as_messages(conversation.turns, conversation.said), gr.skip(), ""
            return
        turn = None if draft.again else draft.turn
        try:
            with show_user_errors():
                for turns, said in answer(conversation, turn, adapter, Settings.of(settings)):
                    pending, seconds = conversation.pending, time.monotonic() - draft.began
                    ahead = 0 if pending is None or turns[-1].role != "user" else context.engine.ahead_of(pending)
                    told = conversation.said if said or turn is not None else conversation.said[:-1]
                    yield as_messages(turns, told), gr.skip(), "" if said else waiting_note(ahead, seconds)
        except gr.Error:
            back: Any = gr.skip() if draft.again else gr.MultimodalTextbox(value=_as_message(draft.turn))
            yield as_messages(conversation.turns, conversation.said), back, ""
            raise

    def add_picture(taken: Any, message: Any) -> tuple[Any, Any]:
        if not taken:
            return gr.skip(), gr.skip()
        given = message if isinstance(message, Mapping) else {}
        with show_user_errors():
            files = [uploaded(file, context.uploads) for file in [*(given.get("files") or []), taken]]
        value = {"text": given.get("text") or "", "files": list(map(file_data, files))}
        return gr.MultimodalTextbox(value=value), None

    def undo_shown(conversation: Conversation) -> tuple[Any, Any, str]:
        with show_user_errors():
            turn = conversation.take_back()
        box_now = gr.MultimodalTextbox(value=_as_message(turn))
        return as_messages(conversation.turns, conversation.said), box_now, ""

    def open_kept(token: Any, conversation: Conversation) -> tuple[Conversation, Any, Any]:
        found = kept.open(token, conversation)
        if found is conversation:  # a new one, or its visitor was quicker than the page
            return found, gr.skip(), gr.skip()
        draft = found.take_draft()  # of a page that is gone
        back = gr.skip() if draft is None or draft.again else gr.MultimodalTextbox(value=_as_message(draft.turn))
        return found, as_messages(found.turns, found.said), back

    def forget(conversation: Conversation) -> tuple[Any, Any, str]:
        conversation.clear()
        return [], ready(), ""

    def download_markdown(conversation: Conversation) -> dict[str, str]:
        with show_user_errors():
            return {"name": "conversation.md", "type": "text/markdown", "text": as_markdown(conversation)}

    def download_json(conversation: Conversation) -> dict[str, str]:
        with show_user_errors():
            text = json.dumps(as_json(conversation), ensure_ascii=False, indent=2)
            return {"name": "conversation.json", "type": "application/json", "text": text}

    def chat(
        message: Any,
        conversation: Conversation,
        adapter: str,
        longest: int,
        temperature: float,
        top_p: float,
        beams: int,
    ) -> Iterator[str]:
        """Say {"text": …, "files": […]}, with pictures or about earlier ones; a client is one conversation."""
        with show_user_errors():
            settings = Settings.of([longest, temperature, top_p, beams])
            yield from _replies(answer(conversation, read_turn(message, context.uploads), adapter, settings))

    def retry(
        conversation: Conversation, adapter: str, longest: int, temperature: float, top_p: float, beams: int
    ) -> Iterator[str]:
        """Answer the last question again, sampled."""
        with show_user_errors():
            settings = Settings.of([longest, temperature, top_p, beams])
            yield from _replies(answer(conversation, None, adapter, settings))

    def undo(conversation: Conversation) -> str:
        """Take the last question and its answer back; gives the question."""
        with show_user_errors():
            return conversation.take_back().text

    def ready() -> Any:
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

    shown = [window, box, status]
    asked = [conversation, context.adapter, *context.settings]
    at_once: dict[str, Any] = {**SOON, "preprocess": False}
    writing = []
    for event in (
        box.submit(send, [token, box, conversation], [conversation, *shown], js=_TOKEN, **at_once),
        window.retry(again, conversation, shown, **at_once),
        window.example_select(
            send_example, [token, conversation, context.adapter], [conversation, *shown], js=_TOKEN, **at_once
        ),
    ):
        writing.append(event.success(write, asked, shown, show_progress="hidden", **ASKS_MODELS, **PRIVATE))
        writing[-1].then(ready, None, box, **IMMEDIATE)  # after a failure too
    box.stop(_stop, conversation, None, **IMMEDIATE)
    camera.change(add_picture, [camera, box], [box, camera], **at_once)  # taking a picture has no event but this
    window.undo(undo_shown, conversation, shown, **SOON)
    # what is still on its way from the server would come after the end
    window.clear(None, None, cancels=writing, **IMMEDIATE)
    window.clear(forget, conversation, shown, **IMMEDIATE)
    for button, make in zip(downloads, (download_markdown, download_json), strict=True):
        button.click(make, conversation, file, **SOON).success(None, file, file, js=_SAVE, **PRIVATE)
    opened = page.load(open_kept, [token, conversation], [conversation, window, box], js=_TOKEN, **IMMEDIATE)
    opened.then(None, None, None, js="() => { document.body.dataset.ready = 'yes'; }", **PRIVATE)
    context.with_adapter(lambda adapter: [gr.Chatbot(examples=_examples(context, adapter))], [window])

    context.endpoint("chat", chat, [box, *asked], _reply)
    context.endpoint("retry", retry, asked, _reply)
    context.endpoint("undo", undo, [conversation], _reply)
    context.endpoint("clear", _clear, [conversation], list)
    context.endpoint("stop", _stop, [conversation], list)


def read_turn(message: Any, uploads: Path) -> Turn:
    """A user's turn out of what the page's box, or a program, sent.

    Raises:
        UserError: there are no words, too many pictures, or a file that is no uploaded picture.
    """
    if not isinstance(message, Mapping):
        raise UserError('The message is of the form {"text": "…", "files": […]}')
    text = words(message.get("text"), "There is no question yet: write one beside the picture")
    files = message.get("files") or []
    if not isinstance(files, list):
        raise UserError('The message is of the form {"text": "…", "files": […]}: files is a list')
    if len(files) > MAX_TURN_PICTURES:
        raise UserError(f"{len(files)} pictures in one turn are too many: send at most {MAX_TURN_PICTURES}")
    images = tuple(uploaded(file, uploads) for file in files)
    if text.count(IMAGE_MARK) not in (0, len(images)):
        raise UserError(f"{text.count(IMAGE_MARK)} {IMAGE_MARK} marks but {len(images)} pictures: make them as many")
    return Turn("user", text, images)


def as_messages(turns: list[Turn], said: list[Said]) -> list[dict[str, Any]]:
    """A conversation as the page shows it; words are shown as they are, whatever marks they hold.

    Args:
        turns: by turns; a user's at the end waits for its answer.
        said: what came of the answers; one that is still being written has none.
    """
    shown: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        text = escape(turn.text, quote=False) or "<i>no words</i>"
        if turn.role == "assistant" and number // 2 < len(said):
            one = said[number // 2]
            text += f"\n\n{footnote(one.answer, one.seconds)}"
        shown.append({"role": turn.role, "content": [*map(_shown_picture, turn.images), text]})
    if turns and turns[-1].role == "user":
        shown.append({"role": "assistant", "content": _TYPING})
    return shown


def _shown_picture(image: ImageRef) -> Any:
    try:
        check_kept(image)
    except UserError:
        return f"<i>{escape(image.label)}, deleted since</i>"
    return {"file": file_data(image), "alt_text": image.label}


def _as_message(turn: Turn) -> dict[str, Any]:
    """A turn as it stood in the box; pictures that were deleted since are left out."""
    kept = [image for image in turn.images if image.path is not None and image.path.exists()]
    return {"text": turn.text, "files": [file_data(image) for image in kept]}


def _clear(conversation: Conversation) -> None:
    """Begin a new conversation."""
    conversation.clear()


def _stop(conversation: Conversation) -> None:
    """End the answer that is being written; what is there of it stays."""
    conversation.stop()


def _reply() -> gr.Textbox:
    return gr.Textbox(visible=False, label="reply")


def _replies(answers: Iterator[tuple[list[Turn], Answer | None]]) -> Iterator[str]:
    for turns, _ in answers:
        yield turns[-1].text if turns[-1].role == "assistant" else ""  # nothing yet


def _with_questions(context: PageContext, adapter: str) -> list[Any]:
    shown = context.examples[context.engine.adapter(adapter).name][1]
    return [example for example in shown if example.questions]


def _examples(context: PageContext, adapter: str) -> list[Any] | None:
    offered = _with_questions(context, adapter)
    return [{"text": example.questions[0], "files": [str(example.path)]} for example in offered] or None
