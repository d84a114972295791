"""The tab for conversations: several turns, several pictures in each, written as it is read, stopped or tried again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.data.prompts import IMAGE_MARK, Turn
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine import Engine
from serve.limits import MAX_TURN_PICTURES
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, PageContext, read_along
from serve.page.inputs import Settings, check_kept, file_data, show_user_errors, uploaded, words
from serve.page.notes import how_it_went
from serve.pending import Answer, PendingAnswer

USUAL = Decoding(max_new_tokens=128)
AGAIN = 0.7  # temperature of another try, if none is set: the same settings would give the same words
# Of any conversation: two requests of one session may come at once. If what is left over is collected meanwhile, its
# end comes in the same thread.
_CHANGING = threading.RLock()
_PLACEHOLDER = (
    "Put in one or several pictures, and ask. They stay with the turn they came in, so you can ask on about them."
)


@dataclass
class Conversation:
    """What was said in one session; a turn is added once it is answered.

    Attributes:
        turns: the user's and the adapter's, by turns.
        request: the answer that is being written; None once its turn is kept.
    """

    turns: list[Turn] = field(default_factory=list)
    pending: PendingAnswer | None = None

    def answer(
        self, engine: Engine, turn: Turn | None, adapter: str, decoding: Decoding
    ) -> Iterator[tuple[list[Turn], Answer | None]]:
        """All turns as the answer to the last grows, and at the end what came of it; until then nothing is kept.

        They come again now and then while nothing is written yet, so that it is noticed when nobody waits any more.

        Args:
            engine: what answers.
            turn: the user's; None has the last one answered again.
            adapter: its name.
            decoding: how the answer is made.

        Raises:
            UserError: an answer is being written, the conversation is too long, or there is no turn to answer again.
            Busy: too many wait.
        """
        with _CHANGING:
            self._check_idle()
            asked = [*self.turns, turn] if turn is not None else [*self.turns[:-2], self.last()]
            for image in (image for said in asked for image in said.images):
                check_kept(image)
            self.pending = pending = engine.chat(asked, adapter=adapter, decoding=decoding)
        try:
            yield asked, None
            for text in read_along(pending):
                if self.pending is pending:
                    yield [*asked, Turn("assistant", text)] if text else asked, None
            said = pending.result()
            answered = [*asked, Turn("assistant", said.text)]
            if self._end(pending, answered):  # else all was forgotten meanwhile
                yield answered, said
        finally:
            pending.stop()  # if nobody reads on
            self._end(pending, None)

    def stop(self) -> None:
        """End the answer that is being written, if there is one."""
        pending = self.pending  # it may end meanwhile
        if pending is not None:
            pending.stop()

    def last(self) -> Turn:
        """The user's last turn.

        Raises:
            UserError: there is none.
        """
        if not self.turns:
            raise UserError("There is no question yet: write one first")
        return self.turns[-2]

    def take_back(self) -> Turn:
        """Forget the user's last turn and its answer; gives the turn. Raises as `last`, and if one is being written."""
        with _CHANGING:
            self._check_idle()
            turn = self.last()
            self.turns = self.turns[:-2]
            return turn

    def clear(self) -> None:
        """Forget all that was said."""
        with _CHANGING:
            self.stop()
            self.turns, self.pending = [], None

    def _end(self, pending: PendingAnswer, turns: list[Turn] | None) -> bool:
        """Have a request be done with, and keep what came of it; False if it was done with before."""
        with _CHANGING:
            if self.pending is not pending:
                return False
            self.turns, self.pending = self.turns if turns is None else turns, None
            return True

    def _check_idle(self) -> None:
        if self.pending is not None:
            raise UserError("The answer before is still being written: wait for its end, or stop it")


def chat_tab(context: PageContext) -> None:
    """Build the tab and its endpoints `/chat`, `/retry`, `/undo`, `/clear` and `/stop`."""
    with gr.Tab("Chat", id="chat"):
        window = gr.Chatbot(
            show_label=False, height="min(56vh, 480px)", min_height=260, elem_id="chat", placeholder=_PLACEHOLDER,
            examples=_examples(context), buttons=["copy"], allow_tags=False, latex_delimiters=[], feedback_options=None,
        )  # fmt: skip
        box = gr.MultimodalTextbox(
            show_label=False, label="Your turn", file_count="multiple", file_types=["image"], lines=1, max_lines=8,
            placeholder="Ask about a picture", elem_id="chat-box", max_plain_text_length=20_000,
        )  # fmt: skip
        status = gr.HTML(elem_id="chat-status", elem_classes="status", padding=False)
        conversation = gr.State(Conversation())

    def answer(
        conversation: Conversation, turn: Turn | None, adapter: str, settings: Settings
    ) -> Iterator[tuple[list[Turn], Answer | None]]:
        chosen = settings if turn is not None else settings.sampled(AGAIN, 1.0)
        yield from conversation.answer(context.engine, turn, adapter, chosen.over(USUAL))

    def show(
        conversation: Conversation, turn: Turn | None, adapter: str, settings: Settings
    ) -> Iterator[tuple[Any, Any, str]]:
        box_now: Any = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        for turns, said in answer(conversation, turn, adapter, settings):
            yield as_messages(turns), box_now, how_it_went(said) if said else ""
            box_now = gr.skip()

    def send(message: Any, conversation: Conversation, adapter: str, *settings: Any) -> Iterator[tuple[Any, Any, str]]:
        with show_user_errors():
            yield from show(conversation, read_turn(message, context.uploads), adapter, Settings.of(settings))

    def again(conversation: Conversation, adapter: str, *settings: Any) -> Iterator[tuple[Any, Any, str]]:
        with show_user_errors():
            yield from show(conversation, None, adapter, Settings.of(settings))

    def undo_shown(conversation: Conversation) -> tuple[Any, Any, str]:
        with show_user_errors():
            turn = conversation.take_back()
        back: dict[str, Any] = {"text": turn.text, "files": [file_data(image) for image in turn.images]}
        return as_messages(conversation.turns), gr.MultimodalTextbox(value=back), ""

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

    def offer(event: gr.SelectData) -> dict[str, Any]:
        offered: Any = window.examples
        chosen = offered[int(event.index)]  # our own: what an event says of itself is anybody's
        return {"text": chosen["text"], "files": list(chosen["files"])}

    shown = [window, box, status]
    asked = [conversation, context.adapter, *context.settings]
    for event in (
        box.submit(send, [box, *asked], shown, show_progress="hidden", **ASKS_MODELS, **PRIVATE),
        window.retry(again, asked, shown, show_progress="hidden", **ASKS_MODELS, **PRIVATE),
    ):
        event.then(ready, None, box, **IMMEDIATE)  # after a failure too
    box.stop(_stop, conversation, None, **IMMEDIATE)
    window.undo(undo_shown, conversation, shown, **IMMEDIATE)
    window.clear(_clear, conversation, None, **IMMEDIATE).then(lambda: "", None, status, **IMMEDIATE)
    window.example_select(offer, None, box, **IMMEDIATE)

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
    if len(files) > MAX_TURN_PICTURES:
        raise UserError(f"{len(files)} pictures in one turn are too many: send at most {MAX_TURN_PICTURES}")
    images = tuple(uploaded(file, uploads) for file in files)
    if text.count(IMAGE_MARK) not in (0, len(images)):
        raise UserError(f"{text.count(IMAGE_MARK)} {IMAGE_MARK} marks but {len(images)} pictures: make them as many")
    return Turn("user", text, images)


def as_messages(turns: list[Turn]) -> list[dict[str, Any]]:
    """A conversation as the page shows it; words are shown as they are, whatever marks they hold."""
    shown = []
    for turn in turns:
        pictures = [{"file": file_data(image), "alt_text": image.label} for image in turn.images]
        text = escape(turn.text, quote=False) or "<i>no words</i>"
        shown.append({"role": turn.role, "content": [*pictures, text]})
    return shown


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


def _examples(context: PageContext) -> list[Any] | None:
    return [
        {"text": example.questions[0], "files": [str(example.path)]}
        for example in context.examples
        if example.questions
    ] or None
