"""Tickets as a server holds them: followed without a thread, dropped when nobody waits, kept once they are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.data.prompts import Turn
from qformer.decoding import Decoding
from serve.engine.engine import Engine
from serve.engine.pending import Answer, Busy, PendingAnswer

QUESTION = [Turn("user", "what is it?")]
SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def small(run_folder: Path, cache_folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with Engine([run_folder], device="cpu", dtype="float32", offline=True, max_waiting=2) as engine:
            yield engine


@pytest.fixture
def held(small: Engine) -> Iterator[threading.Event]:
    """The engine's thread is busy until this is set."""
    event = threading.Event()
    small.run(lambda _: event.wait(60))
    while small.waiting:
        time.sleep(0.01)
    yield event
    event.set()


def test_a_ticket_tells_each_change_and_its_end(small: Engine, held: threading.Event) -> None:
    seen: list[tuple[str, bool]] = []
    pending = small.chat(QUESTION, decoding=SHORT)
    pending.watch(lambda: seen.append((pending.text, pending.done)))
    assert seen == []
    held.set()
    answer = pending.result(60)

    assert [done for _, done in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1][0] == answer.text == pending.text
    assert all(answer.text.startswith(text) for text, _ in seen)
    late: list[bool] = []
    pending.watch(lambda: late.append(pending.done))
    assert late == [True]


def test_who_was_stopped_waits_in_nobodys_way(small: Engine, held: threading.Event) -> None:
    waiting = [small.chat(QUESTION, decoding=SHORT) for _ in range(2)]
    with pytest.raises(Busy):
        small.chat(QUESTION)
    waiting[0].stop()
    third = small.chat(QUESTION, decoding=SHORT)
    with pytest.raises(Busy):
        small.chat(QUESTION)
    waiting[1].stop()
    held.set()

    stopped = [pending.result(60) for pending in waiting]
    assert [(answer.finish, answer.text, answer.tokens) for answer in stopped] == [("stopped", "", 0)] * 2
    assert third.result(60).tokens > 0


def test_a_queue_of_stopped_ones_alone_is_no_work(small: Engine, held: threading.Event) -> None:
    pending = small.chat(QUESTION, decoding=SHORT)
    pending.stop()
    held.set()

    assert pending.result(60).finish == "stopped"
    assert small.chat(QUESTION, decoding=SHORT).result(60).tokens > 0  # its thread is well


def test_an_answer_outlives_its_batch(small: Engine) -> None:
    pending = PendingAnswer(small.adapter(), small.adapter().chat_request(QUESTION), SHORT, ())
    answer = Answer("red", "tiny", "stop", 0.5, 2, 3)
    pending._finish(answer)
    pending._fail(RuntimeError("a later token's"))

    assert pending.result() == answer
