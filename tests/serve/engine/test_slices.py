"""Nobody waits for somebody else: long prompts and beam searches are done in slices, and clients take turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Turn
from adapters.inference.request import Request
from qformer import generation
from qformer.continuous import _layers_of
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.generation import PartlyRead, _StopWhenAsked
from serve.adapter import user_turn
from serve.engine import engine as engine_module
from serve.engine import writing
from serve.engine.engine import Engine
from serve.engine.pending import CLIENT, PendingAnswer

SHORT = Decoding(max_new_tokens=4)
BEAMS = Decoding(max_new_tokens=40, num_beams=3, length_penalty=5.0)
LONG = [Turn("user", "which of all these words is the longest one? " * 20)]
PART = 64


@pytest.fixture(scope="module")
def hall(run_folder: Path, cache_folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with Engine([run_folder], device="cpu", dtype="float32", offline=True, max_batch=3) as engine:
            yield engine


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each part of a prompt was read; a part of a long one takes its time."""
    monkeypatch.setattr(generation, "READ_AT_ONCE", PART)
    monkeypatch.setattr(writing, "_BRIEF", PART)
    real, times = PartlyRead._logits, []

    def slow(self: PartlyRead, embeds: Tensor, *rest: object) -> Tensor:
        times.append(time.monotonic())
        if embeds.shape[1] == PART:
            time.sleep(0.05)
        return real(self, embeds, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PartlyRead, "_logits", slow)
    return times


def question(data_file: Path, number: int = 1) -> list[Turn]:
    return [user_turn(data_file.parent / f"{number}.png", "what colour is it?")]


@contextmanager
def asked_by(client: str) -> Iterator[None]:
    token = CLIENT.set(client)
    try:
        yield
    finally:
        CLIENT.reset(token)


def started(times: list[float], pending: PendingAnswer) -> None:
    began = time.monotonic()
    while len(times) < 2:
        assert not pending.done and time.monotonic() - began < 30
        time.sleep(0.005)


@pytest.mark.usefixtures("parts")
def test_a_short_question_passes_a_long_prompt(hall: Engine, data_file: Path, parts: list[float]) -> None:
    alone = hall.chat(LONG, decoding=SHORT).result(60), hall.chat(question(data_file), decoding=SHORT).result(60)
    parts.clear()
    long = hall.chat(LONG, decoding=SHORT)
    started(parts, long)
    short = hall.chat(question(data_file), decoding=SHORT)

    assert short.result(60).text == alone[1].text
    assert not long.done and long.text == ""
    assert long.result(60).text == alone[0].text
    assert long.result().confidence == pytest.approx(alone[0].confidence, rel=1e-4)


def test_who_leaves_during_a_long_prompt_stops_costing(hall: Engine, data_file: Path, parts: list[float]) -> None:
    left, behind = hall.chat(LONG, decoding=SHORT), hall.chat(LONG, decoding=SHORT)
    started(parts, left)
    behind.stop()
    left.stop()
    assert [one.result(60).finish for one in (left, behind)] == ["stopped"] * 2
    seen = len(parts)
    assert seen < len(LONG[0].text) / PART - 5
    assert hall.chat(question(data_file), decoding=SHORT).result(60).tokens > 0
    assert len(parts) <= seen + 3  # the question's own


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("choices", [(), ("red", "green")])
def test_who_leaves_ends_the_reading_of_a_part_between_two_layers(
    hall: Engine, data_file: Path, choices: tuple[str, ...]
) -> None:
    language = hall.adapter().assembly.model.language
    layers = _layers_of(language)
    held = threading.Event()
    hall.run(lambda _: held.wait(20))
    left = hall.choose(LONG, choices) if choices else hall.chat(LONG, decoding=SHORT)
    passed: list[int] = []

    def look(number: int, shape: tuple[int, ...]) -> None:
        passed.append(number)
        if number == 0 and shape[1] == PART:
            left.stop()

    hooks = [
        layer.register_forward_hook(lambda _, given, __, number=number: look(number, given[0].shape))
        for number, layer in enumerate(layers)
    ]
    try:
        held.set()
        found = left.result(60)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(layers) > 1 and passed == [0]
    assert (found.finish, found.text) == ("stopped", "")
    assert hall.chat(question(data_file), decoding=SHORT).result(60).tokens > 0
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_a_short_question_is_answered_between_two_layers_of_a_long_pass(
    hall: Engine, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither answer changes."""
    alone = hall.chat(LONG, decoding=SHORT).result(60), hall.chat(question(data_file), decoding=SHORT).result(60)
    monkeypatch.setattr(writing, "_BRIEF", PART)
    monkeypatch.setattr(engine_module, "_SLICE", 0.0)
    language = hall.adapter().assembly.model.language
    layers = _layers_of(language)
    order: list[tuple[int, bool]] = []  # of each pass of a layer: which, and whether it reads the long prompt
    asked: list[PendingAnswer] = []

    def look(number: int, shape: tuple[int, ...]) -> None:
        order.append((number, shape[1] > PART))
        if order == [(0, True)]:
            asked.append(hall.chat(question(data_file), decoding=SHORT))

    hooks = [
        layer.register_forward_hook(lambda _, given, __, number=number: look(number, given[0].shape))
        for number, layer in enumerate(layers)
    ]
    try:
        long = hall.chat(LONG, decoding=SHORT).result(60)
        (short,) = (one.result(60) for one in asked)
    finally:
        for hook in hooks:
            hook.remove()
    assert order[:2] == [(0, True), (0, False)]  # the short question's first layer, before the long prompt's second
    assert (1, True) in order[2:]
    assert (long.text, short.text) == (alone[0].text, alone[1].text)
    assert short.confidence == pytest.approx(alone[1].confidence, rel=1e-4)


def test_a_short_question_passes_a_beam_search(hall: Engine, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a search for which nobody waits any more ends at its next token."""
    picture = data_file.parent / "2.png"
    alone = hall.caption(picture, decoding=BEAMS).result(60), hall.chat(question(data_file), decoding=SHORT).result(60)
    steps: list[float] = []
    real = _StopWhenAsked.__call__

    def slow(self: _StopWhenAsked, *rest: object, **options: object) -> Tensor:
        steps.append(time.monotonic())
        time.sleep(0.03)
        return real(self, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(_StopWhenAsked, "__call__", slow)
    search = hall.caption(picture, decoding=BEAMS)
    started(steps, search)
    short = hall.chat(question(data_file), decoding=SHORT)
    assert short.result(60).text == alone[1].text
    assert not search.done
    assert search.result(60).text == alone[0].text
    steps.clear()
    left = hall.caption(picture, decoding=BEAMS)
    started(steps, left)
    left.stop()
    left.result(60)
    assert len(steps) < 10


def test_who_cannot_be_read_fails_alone_and_ends_no_longer_work(
    hall: Engine, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may fail when it is asked how much of a prompt is known."""
    alone = hall.chat(LONG, decoding=SHORT).result(60)
    monkeypatch.setattr(writing, "_BRIEF", PART)
    monkeypatch.setattr(engine_module, "_SLICE", 0.0)
    generator = hall.adapter().generator
    unread, asked = generator.unread, list[PendingAnswer]()

    def failing(one: Request) -> int:
        if asked and one is asked[0].asked:
            raise OSError(5, "Input/output error")
        return unread(one)

    monkeypatch.setattr(generator, "unread", failing)
    (first, *_) = _layers_of(hall.adapter().assembly.model.language)
    hook = first.register_forward_hook(
        lambda *_: None if asked else asked.append(hall.chat(question(data_file, 3), decoding=SHORT))
    )
    try:
        assert hall.chat(LONG, decoding=SHORT).result(60).text == alone.text
    finally:
        hook.remove()
    assert asked[0].result(60).tokens > 0
    assert hall.chat(question(data_file, 2), decoding=SHORT).result(60).tokens > 0


def test_a_closed_question_with_a_long_prompt(hall: Engine, data_file: Path, parts: list[float]) -> None:
    choices = ["red", "green", "a rather long answer"]
    loaded = hall.adapter()
    pictured = [user_turn(data_file.parent / "1.png", LONG[0].text)]
    for turns in (LONG, pictured):
        ((red, green, other),) = loaded.generator.choose([loaded.chat_request(turns)], [choices])
        parts.clear()
        found = hall.choose(turns, choices).result(60).choices
        assert found == pytest.approx(dict(zip(choices, (red, green, other), strict=True)), rel=1e-3)
        assert len(parts) > 10
    pending = hall.choose(LONG, choices)
    pending.stop()
    assert pending.result(60).finish == "stopped"


def test_clients_take_turns(hall: Engine, data_file: Path) -> None:
    held = threading.Event()
    hall.run(lambda _: held.wait(20))
    while hall.waiting:  # until the job is being done
        time.sleep(0.01)
    ended: list[str] = []

    def ask(client: str, number: int) -> PendingAnswer:
        with asked_by(client):
            pending = hall.chat(question(data_file, number), decoding=SHORT)
        pending.watch(lambda: ended.append(client) if pending.done else None)
        return pending

    many = [ask("greedy", number % 6) for number in range(9)]
    one = ask("modest", 1)
    assert hall.ahead_of(one) == 9
    held.set()
    for pending in [*many, one]:
        pending.result(60)
    assert ended.index("modest") < 4
    assert hall.ahead_of(one) == 0


def test_a_picture_that_is_gone_fails_alone(hall: Engine, data_file: Path, tmp_path: Path) -> None:
    held = threading.Event()
    hall.run(lambda _: held.wait(20))
    gone = hall.chat([Turn("user", "hm?", (ImageRef("gone.png", path=tmp_path / "gone.png"),))], decoding=SHORT)
    good = hall.chat(question(data_file), decoding=SHORT)
    held.set()
    with pytest.raises(UserError, match=r"gone\.png"):
        gone.result(60)
    assert good.result(60).tokens > 0


def test_closing_does_not_wait_for_a_long_prompt(run_folder: Path, parts: list[float]) -> None:
    with Engine([run_folder], device="cpu", dtype="float32", offline=True) as engine:
        pending = engine.chat(LONG, decoding=SHORT)
        started(parts, pending)
    assert len(parts) < 10
    with pytest.raises(RuntimeError, match="closed"):
        pending.result(1)
