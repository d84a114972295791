"""One engine for many who ask: shared frozen models, batches equal to single answers, streaming, stopping, refusing."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Turn
from qformer.continuous import AnswerBatch
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, load_adapter, short_name, user_turn
from serve.engine.engine import Engine
from serve.engine.pending import Answer, Busy

SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def other_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter with other weights, LoRA and all."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    shutil.copytree(run_folder / "best", folder)
    for file in (folder / "bridge.safetensors", folder / "lora" / "adapter_model.safetensors"):
        torch.manual_seed(1)
        state = {name: tensor + 0.3 * torch.randn(tensor.shape) for name, tensor in load_file(file).items()}
        save_file({name: tensor.bfloat16() for name, tensor in state.items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def hall(run_folder: Path, other_run: Path, cache_folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with Engine([run_folder, other_run], device="cpu", dtype="float32", offline=True) as engine:
            yield engine


@pytest.fixture
def turns(data_file: Path) -> list[list[Turn]]:
    """Questions of different lengths about different pictures, one of them about two, one a conversation."""
    folder = data_file.parent
    asked = [[user_turn(folder / f"{number}.png", "what colour is it" + "?" * (1 + number % 3))] for number in range(6)]
    asked.append([user_turn([folder / "1.png", folder / "2.png"], "are they alike?")])
    asked.append([user_turn(folder / "3.png", "hm?"), Turn("assistant", "red"), Turn("user", "and now?")])
    asked.append([Turn("user", "no picture at all")])
    return asked


def test_adapters_stand_on_the_same_frozen_models(hall: Engine) -> None:
    first, second = (hall.adapter(name).assembly for name in hall.names)
    assert hall.names == ["tiny", "other"]
    assert hall.adapter() is hall.adapter("tiny")
    assert first.model.language.base is second.model.language.base
    assert first.model.encoders[0] is second.model.encoders[0]
    assert first.model.bridge is not second.model.bridge


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(hall: Engine, turns: list[list[Turn]]) -> None:
    def ask(seed: int) -> Decoding:
        return replace(SHORT, temperature=1.0, seed=seed)

    alone = [hall.chat(conversation, decoding=ask(5)).result(60) for conversation in turns]
    together = [hall.chat(conversation, decoding=ask(5)) for conversation in turns]
    others = [hall.chat(conversation, decoding=ask(6)) for conversation in turns]
    assert [pending.result(60).text for pending in together] == [answer.text for answer in alone]
    assert [pending.result(60).text for pending in others] != [answer.text for answer in alone]


def test_each_adapter_answers_as_it_does_alone(
    hall: Engine, run_folder: Path, other_run: Path, turns: list[list[Turn]]
) -> None:
    """Asked in turns, so that LoRA is switched each time; closeness of the numbers, not of the words alone."""
    alone = {name: load_adapter(path, device="cpu", dtype="float32") for name, path in
             (("tiny", run_folder), ("other", other_run))}  # fmt: skip
    found: dict[str, list[Answer]] = {"tiny": [], "other": []}
    for conversation in turns:
        for name in ("tiny", "other"):
            found[name].append(hall.chat(conversation, adapter=name, decoding=SHORT).result(60))
    for name, answers in found.items():
        expected = [alone[name].generator([alone[name].chat_request(conversation)], SHORT)[0] for conversation in turns]
        assert [answer.text for answer in answers] == [said.text for said in expected]
        assert [answer.confidence for answer in answers] == pytest.approx(
            [said.confidence for said in expected], rel=1e-4
        )
        assert all(answer.adapter == name for answer in answers)
    assert hall.adapter("tiny").fingerprint() == alone["tiny"].fingerprint() != hall.adapter("other").fingerprint()
    assert [a.confidence for a in found["tiny"]] != [a.confidence for a in found["other"]]


def test_what_arrives_together_is_written_side_by_side_with_the_same_answers(
    hall: Engine, turns: list[list[Turn]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [replace(SHORT, max_new_tokens=3 + number % 4) for number in range(len(turns))]
    alone = [hall.chat(one, decoding=how).result(60) for one, how in zip(turns, lengths, strict=True)]
    sizes: list[int] = []
    real = AnswerBatch.step

    def counted(self: AnswerBatch) -> None:
        sizes.append(len(self.rows))
        real(self)

    monkeypatch.setattr(AnswerBatch, "step", counted)
    held = threading.Event()
    hall.run(lambda _: held.wait(60))
    pending_answers = [hall.chat(one, decoding=how) for one, how in zip(turns, lengths, strict=True)]
    held.set()
    together = [pending.result(60) for pending in pending_answers]

    assert max(sizes) > len(turns) / 2
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [a.confidence for a in together] == pytest.approx([a.confidence for a in alone], rel=1e-4)


def test_one_broken_picture_fails_alone(hall: Engine, turns: list[list[Turn]]) -> None:
    held = threading.Event()
    hall.run(lambda _: held.wait(60))
    good = hall.chat(turns[0], decoding=SHORT)
    bad = hall.chat([Turn("user", "what is it?", (ImageRef("broken.png", data=b"no picture"),))], decoding=SHORT)
    held.set()
    assert good.result(60).text == hall.chat(turns[0], decoding=SHORT).result(60).text
    with pytest.raises(UserError, match=r"broken\.png"):
        bad.result(60)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes its time over a token, as real ones do."""
    real = AnswerBatch.step

    def step(self: AnswerBatch) -> None:
        time.sleep(0.02)
        real(self)

    monkeypatch.setattr(AnswerBatch, "step", step)


@pytest.mark.usefixtures("unhurried")
def test_an_answer_is_read_along(hall: Engine, turns: list[list[Turn]]) -> None:
    pending = hall.chat(turns[0], decoding=replace(SHORT, max_new_tokens=12))
    texts = list(pending)
    answer = pending.result()
    assert texts[-1] == answer.text
    assert texts == sorted(set(texts), key=len), "a text did not grow"
    assert len(texts) > 1
    assert all(answer.text.startswith(text.strip()) for text in texts)
    assert answer.finish == ("length" if answer.tokens == 12 else "stop")
    assert 0 < (answer.confidence or 0) <= 1
    assert answer.prompt_tokens == len(pending.asked.prompt.ids)


@pytest.mark.usefixtures("unhurried")
def test_an_answer_is_stopped(hall: Engine, turns: list[list[Turn]]) -> None:
    pending = hall.chat(turns[0], decoding=Decoding(max_new_tokens=500))
    next(iter(pending))
    pending.stop()
    answer = pending.result(60)
    assert answer.finish == "stopped"
    assert 0 < answer.tokens < 500


def test_an_answer_ends_before_a_stop_string(hall: Engine, turns: list[list[Turn]]) -> None:
    whole = hall.chat(turns[0], decoding=SHORT).result(60)
    middle = whole.text[2:4]
    cut = hall.chat(turns[0], decoding=SHORT, stops=["never there", middle]).result(60)
    assert cut.text == whole.text[: whole.text.index(middle)].rstrip()
    assert cut.finish == "stop"


def test_a_closed_question_is_answered_by_a_choice(hall: Engine, turns: list[list[Turn]]) -> None:
    answer = hall.choose(turns[0], ["red", "green", " blue "]).result(60)
    assert answer.choices is not None
    assert set(answer.choices) == {"red", "green", "blue"}
    assert sum(answer.choices.values()) == pytest.approx(1, abs=1e-5)
    assert answer.text == max(answer.choices, key=answer.choices.__getitem__)
    assert answer.confidence == answer.choices[answer.text]
    for wrong, says in ((["red"], "at least two"), (["red", "red"], "twice")):
        with pytest.raises(UserError, match=says):
            hall.choose(turns[0], wrong)


def test_beams_answer_at_the_end(hall: Engine, data_file: Path) -> None:
    pending = hall.caption(data_file.parent / "1.png", decoding=Decoding(max_new_tokens=6, num_beams=3))
    assert list(pending) in ([pending.result().text], [])
    confidence = pending.result().confidence
    assert confidence is not None and 0 < confidence <= 1


def test_too_many_are_refused_and_closing_fails_what_waits(engine: LoadedAdapter, turns: list[list[Turn]]) -> None:
    small = Engine([engine], max_waiting=2)
    held = threading.Event()
    small.run(lambda _: held.wait(60))
    while small.waiting:  # until the job is being done
        time.sleep(0.01)
    waiting = [small.chat(turns[0], decoding=SHORT) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests wait"):
        small.chat(turns[0])
    asked = engine.chat_request(turns[0])
    waiting.append(small.submit(asked, decoding=SHORT, admitted=True))  # it was let in before
    with pytest.raises(Busy):
        small.submit(asked)
    threading.Timer(0.2, held.set).start()
    small.close()
    for pending in waiting:
        with pytest.raises(RuntimeError, match="closed"):
            pending.result(10)
    with pytest.raises(RuntimeError, match="closed"):
        small.chat(turns[0])


def test_waiting_has_an_end(hall: Engine, turns: list[list[Turn]]) -> None:
    held = threading.Event()
    hall.run(lambda _: held.wait(60))
    pending = hall.chat(turns[0], decoding=SHORT)
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        pending.result(0.05)
    held.set()
    assert pending.result(60).finish in ("stopped", "stop")


def test_other_work_is_done_in_its_turn(hall: Engine) -> None:
    assert hall.run(lambda adapter: adapter.name, adapter="other").result(60) == "other"

    def broken(_: LoadedAdapter) -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        hall.run(broken).result(60)
    with pytest.raises(UserError, match="take one of tiny, other"):
        hall.run(broken, adapter="third")


def test_two_adapters_of_one_name_are_refused(engine: LoadedAdapter) -> None:
    with pytest.raises(UserError, match="rename"):
        Engine([engine, engine])
    assert short_name("runs/birds/best") == "birds"
    assert short_name("photo") == "photo"


def test_a_conversation_that_is_too_long_is_told(engine: LoadedAdapter) -> None:
    longest = engine.assembly.model.language.config.max_position_embeddings
    with pytest.raises(UserError, match=f"reads {longest}"):
        engine.chat_request([Turn("user", "x" * (longest + 10))])


def test_no_answer_is_longer_than_there_is_room_for(hall: Engine, turns: list[list[Turn]]) -> None:
    """Alone or together: a long prompt beside a long answer would go beyond the last position."""
    loaded = hall.adapter()
    longest = loaded.context_length
    assert longest is not None
    nearly = [Turn("user", "x" * (longest - 40))]
    alone = hall.chat(nearly, decoding=Decoding(max_new_tokens=10_000))
    assert alone.decoding.max_new_tokens < 40
    alone.result(60)
    together = [
        hall.chat(nearly, decoding=Decoding(max_new_tokens=2)),
        hall.chat(turns[0], decoding=Decoding(max_new_tokens=60)),
    ]
    assert [pending.result(60).text for pending in together] == [
        hall.chat(nearly, decoding=Decoding(max_new_tokens=2)).result(60).text,
        hall.chat(turns[0], decoding=Decoding(max_new_tokens=60)).result(60).text,
    ]
