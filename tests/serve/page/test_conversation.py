"""Conversations and chains of thought without a page around them: what two requests that come at once do to them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from page_server import draw_data

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Prompt, Turn
from adapters.inference.request import Request
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.pending import Busy, PendingAnswer
from serve.page.conversation import Conversation, KeptConversations
from serve.page.inputs import Settings
from serve.page.tabs.reason import think
from serve.page.transcript import as_json, as_markdown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_data(tmp_path)


@pytest.fixture
def engine(folder: Path) -> FakeEngine:
    return FakeEngine(FakeAdapter(make_recipe(folder), "quickstart"))


def test_of_two_turns_at_once_one_is_answered(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, conversation = engine.chat, Conversation()

    def slow_chat(*asked: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return chat(*asked, **options)

    monkeypatch.setattr(engine, "chat", slow_chat)
    monkeypatch.setattr(engine, "pause", 0.1)
    answers = [conversation.answer(engine, Turn("user", "one"), "quickstart", Decoding()) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(next, answer) for answer in answers]
    errors = [job.exception() for job in begun]

    assert errors.count(None) == 1
    assert all("still being written" in str(error) for error in errors if error is not None)


def test_a_thought_that_was_admitted_is_answered(
    engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = ImageRef("a.png", path=next(folder.glob("*.png")))
    thinking = think(engine, picture, "why?", (), "quickstart", Settings())  # type: ignore[arg-type]
    next(thinking), next(thinking)
    monkeypatch.setattr(engine, "busy", True)  # for who comes now
    assert [*thinking][-1].finished is not None
    with pytest.raises(Busy):
        list(think(engine, picture, "why?", (), "quickstart", Settings()))  # type: ignore[arg-type]


def test_a_turn_is_not_over_before_it_is_kept(engine: FakeEngine) -> None:
    conversation = Conversation()
    first = conversation.answer(engine, Turn("user", "one"), "quickstart", Decoding())
    next(first)
    assert conversation.pending is not None
    conversation.pending.result(10)  # written, and not read yet
    with pytest.raises(UserError, match="still being written"):
        next(conversation.answer(engine, Turn("user", "two"), "quickstart", Decoding()))
    with pytest.raises(UserError, match="still being written"):
        conversation.take_back()
    list(first)

    assert conversation.turns[0].text == "one" and len(conversation.turns) == 2
    left = conversation.answer(engine, Turn("user", "two"), "quickstart", Decoding())
    next(left)
    left.close()  # who asked has gone
    assert conversation.take_back().text == "one"


def test_who_leaves_before_a_word_is_written_ends_the_answer(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    beams: Any = engine.adapter()  # a beam search tells nothing on its way
    silent = PendingAnswer(beams, Request(Prompt((), (), 0), ()), Decoding(num_beams=5))
    monkeypatch.setattr(engine, "chat", lambda *_, **__: silent)
    conversation = Conversation()
    answer = conversation.answer(engine, Turn("user", "one"), "quickstart", Decoding())
    for _ in range(3):  # control comes back, without an end and without a word
        turns, said = next(answer)
        assert [turn.role for turn in turns] == ["user"] and said is None
    answer.close()
    assert silent.stopped and conversation.pending is None


def test_what_is_cleared_while_it_is_handed_on_stays_away(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, conversation, begun = engine.chat, Conversation(), threading.Event()

    def slow_chat(*asked: Any, **options: Any) -> Any:
        begun.set()
        time.sleep(0.2)
        return chat(*asked, **options)

    monkeypatch.setattr(engine, "chat", slow_chat)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: list(conversation.answer(engine, Turn("user", "one"), "quickstart", Decoding())))
        begun.wait(10)
        conversation.clear()
        job.result()

    assert conversation.turns == []


def test_an_empty_conversation_has_no_last_turn() -> None:
    with pytest.raises(Exception, match="no question yet"):
        Conversation().last()


def said(conversation: Conversation, engine: FakeEngine, text: str, *pictures: ImageRef) -> None:
    turn = Turn("user", text, pictures)
    list(conversation.answer(engine, turn, "quickstart", Decoding()))  # type: ignore[arg-type]


def test_a_turn_that_was_begun_is_shown_and_goes_back_if_it_is_stopped(engine: FakeEngine) -> None:
    conversation = Conversation()
    assert [turn.text for turn in conversation.begin(Turn("user", "one"))] == ["one"]
    with pytest.raises(UserError, match="still being written"):
        conversation.begin(Turn("user", "two"))
    conversation.stop()
    assert conversation.take_draft() is None and conversation.turns == []
    said(conversation, engine, "one")
    shown = conversation.begin(None)  # again: without the answer before
    assert [turn.text for turn in shown] == ["one"] and len(conversation.turns) == 2
    draft = conversation.take_draft()
    assert draft is not None and draft.again


def test_what_came_of_answers_stays_beside_them(engine: FakeEngine) -> None:
    conversation = Conversation()
    said(conversation, engine, "one")
    said(conversation, engine, "two")
    list(conversation.answer(engine, None, "quickstart", Decoding()))  # type: ignore[arg-type]
    assert len(conversation.turns) == 4 and len(conversation.said) == 2
    conversation.take_back()
    assert len(conversation.turns) == 2 and len(conversation.said) == 1
    assert conversation.said[0].answer.adapter == "quickstart" and conversation.said[0].seconds >= 0


def test_a_conversation_is_opened_by_its_secret_alone() -> None:
    kept, secret = KeptConversations(most=2), "0123456789abcdef" * 2
    mine = kept.open(secret)
    mine.turns.append(Turn("user", "one"))
    assert kept.open(secret) is mine
    for other in (secret[::-1], secret[:-1], "", None, 3, secret + "\n"):
        assert kept.open(other).turns == []
    early = Conversation()
    assert kept.open(secret, early) is mine  # what was said before goes on
    assert kept.open("c" * 32, early) is early and kept.open("c" * 32) is early
    assert kept.open("no secret", early) is early and kept.open("no secret") is not early
    kept.open(secret)
    kept.open("a" * 32)
    kept.open("b" * 32)
    assert kept.open(secret) is not mine  # two are kept
    fleeting = KeptConversations(seconds=-1.0)
    assert fleeting.open(secret) is not fleeting.open(secret)


def test_a_conversation_is_taken_away_with_its_pictures(engine: FakeEngine, folder: Path) -> None:
    conversation = Conversation()
    with pytest.raises(UserError, match="nothing to download yet"):
        as_markdown(conversation)
    said(conversation, engine, "which <b>?", ImageRef("a [b].png", path=folder / "red.png"))
    text, (question, answer) = as_markdown(conversation), as_json(conversation)

    assert "![a  b .png](data:image/jpeg;base64,/9j/" in text and "> which <b>?" in text
    assert "87% sure of its words · quickstart" in text
    assert question == {"role": "user", "text": "which <b>?", "pictures": ["a [b].png"]}
    assert answer["confidence"] == pytest.approx(0.87) and answer["adapter"] == "quickstart"
