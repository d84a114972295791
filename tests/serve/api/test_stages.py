"""Chain of thought through the API, stage by stage, on an engine that answers when it is told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_server import FakeEngine, eventually, finish, http, openai_client, served, user
from fake_engine import FakeAdapter, make_recipe
from reason_client import ask

from adapters.inference.request import Request
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.pending import PendingAnswer
from serve.limits import Limits

CHAT = "/v1/chat/completions"


class Thinker(FakeEngine):
    """Takes both stages; choices go by letters."""

    def __init__(self) -> None:
        super().__init__()
        recipe = make_recipe(Path("."), task="reason", prompt={"letters": True}, reason={"rationale_tokens": 20})
        self._adapter = FakeAdapter(recipe, "first")

    def adapter(self, name: str | None = None) -> FakeAdapter:
        assert name == "first"
        return self._adapter

    def submit(
        self,
        asked: Request,
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        choices: Sequence[str] = (),
        admitted: bool = False,
    ) -> PendingAnswer:
        return self._take(asked, adapter, decoding, choices, admitted=admitted)

    def words(self, pending: PendingAnswer) -> str:
        """A request's prompt."""
        decoded = self._adapter.assembly.prompts.tokenizer.decode(pending.asked.prompt.ids, skip_special_tokens=True)
        return str(decoded)


@pytest.fixture
def engine() -> Thinker:
    return Thinker()


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "first", "messages": [user("why?")], "reason": True} | changes


def post(url: str, **changes: Any) -> httpx.Response:
    with http(url) as client:
        return client.post(CHAT, json=body(**changes))


def events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def deltas(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    yield from (event["choices"][0]["delta"] for event in events(reply))


def figure(url: str, name: str) -> float:
    with http(url) as client:
        lines = client.get("/metrics").text.splitlines()
    (found,) = [line for line in lines if line.startswith(name + "{")]
    return float(found.rpartition(" ")[2])


def test_each_stage_is_streamed_as_it_is_written(url: str, engine: Thinker, pool: ThreadPoolExecutor) -> None:
    begun = pool.submit(lambda: engine.asked()._update("It is"))
    asked = body(stream=True, max_tokens=9, temperature=0.5)
    with http(url) as client, client.stream("POST", CHAT, json=asked) as reply:
        begun.result()
        told = deltas(reply)
        assert [next(told), next(told)] == [{"role": "assistant", "content": ""}, {"reasoning_content": "It is"}]
        finish(engine.pending[0], "It is wet.")
        assert next(told) == {"reasoning_content": " wet."}
        second = engine.asked(2)
        second._update("rain")
        assert next(told) == {"content": "rain"}
        finish(second, "rain fell")
        assert list(told) == [{"content": " fell"}, {}]

    assert "step by step" in engine.words(engine.pending[0]) and "It is wet." not in engine.words(engine.pending[0])
    assert "why?" in engine.words(second) and "It is wet." in engine.words(second)
    lengths = [(pending.decoding.max_new_tokens, pending.decoding.temperature) for pending in engine.pending]
    assert lengths == [(20, 0.5), (9, 0.5)]


def test_no_reasons_are_longer_than_the_server_allows(engine: Thinker, pool: ThreadPoolExecutor) -> None:
    with served(engine, limits=Limits(max_tokens=6)) as url:
        reply = pool.submit(post, url)
        finish(engine.asked())
        finish(engine.asked(2))
        assert reply.result().status_code == 200

    assert [pending.decoding.max_new_tokens for pending in engine.pending] == [6, 6]


def test_choices_are_for_the_second_stage(url: str, engine: Thinker, pool: ThreadPoolExecutor) -> None:
    shares = {"snow": 0.9, "rain": 0.1}
    whole = pool.submit(post, url, answer_choices=["rain", "snow"])
    finish(engine.asked(), "It is cold.")
    finish(engine.asked(2), "snow", choices=shares)
    stream = pool.submit(post, url, answer_choices=["rain", "snow"], stream=True)
    finish(engine.asked(3), "It is cold.")
    finish(engine.asked(4), "snow", choices=shares)

    assert "(A) rain (B) snow" in engine.words(engine.pending[0])
    assert [pending.choices for pending in engine.pending] == [(), ("rain", "snow")] * 2
    reply = whole.result().json()
    message = reply["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("snow", "It is cold.")
    assert reply["querybridge"]["choices"] == shares
    assert [delta for delta in deltas(stream.result()) if delta.get("content")] == [{"content": "snow"}]


def test_the_time_is_for_both_stages(engine: Thinker, pool: ThreadPoolExecutor) -> None:
    with served(engine, limits=Limits(request_timeout=1)) as url:
        whole, stream = pool.submit(post, url), pool.submit(post, url, stream=True)
        engine.asked(2)
        began = time.monotonic()
        time.sleep(0.7)
        for pending in engine.pending[:2]:
            finish(pending)
        engine.asked(4)
        status, last = whole.result().status_code, list(events(stream.result()))[-1]
        seconds = time.monotonic() - began
        eventually(lambda: all(pending.stopped for pending in engine.pending[2:]))

    assert status == 504
    assert last["error"]["code"] == "timeout"
    assert seconds < 1.6


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_stops_the_stage_that_runs(
    url: str, engine: Thinker, pool: ThreadPoolExecutor, stage: int, stream: bool
) -> None:
    def leave() -> None:
        with http(url) as client, client.stream("POST", CHAT, json=body(stream=stream), timeout=1) as reply:
            for _ in reply.iter_lines():
                pass

    leaving = pool.submit(leave)
    for pending in range(1, stage):
        finish(engine.asked(pending))
    running = engine.asked(stage)
    running._update("re")
    assert not running.stopped
    with pytest.raises(httpx.ReadTimeout):
        leaving.result()
    eventually(lambda: running.stopped)
    finish(running)
    time.sleep(0.2)
    assert len(engine.pending) == stage


def test_metrics_count_both_stages(url: str, engine: Thinker, pool: ThreadPoolExecutor) -> None:
    reply = pool.submit(post, url)
    first = engine.asked()
    eventually(lambda: first._on_change is not None)  # somebody follows it
    first._update("re")
    time.sleep(0.2)
    finish(first, tokens=20)
    finish(engine.asked(2), tokens=3)

    usage = {"prompt_tokens": 14, "completion_tokens": 23, "total_tokens": 37}
    assert reply.result().json()["usage"] == usage
    assert figure(url, "querybridge_generated_tokens_total") == 23
    assert figure(url, "querybridge_prompt_tokens_total") == 14
    assert figure(url, "querybridge_answer_seconds_count") == 1
    assert figure(url, "querybridge_first_token_seconds_sum") <= figure(url, "querybridge_answer_seconds_sum") - 0.2


def test_who_was_admitted_is_not_refused_half_way(url: str, engine: Thinker, pool: ThreadPoolExecutor) -> None:
    reply = pool.submit(post, url)
    first = engine.asked()
    engine.max_waiting = 0
    finish(first)
    second = engine.asked(2)
    assert post(url).status_code == 429  # who was not
    finish(second, "rain")

    assert reply.result().json()["choices"][0]["message"]["content"] == "rain"


def test_closing_ends_the_wait_for_the_second_stage(
    engine: Thinker, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.api.server._GRACE", 0.3)
    with served(engine) as url:
        reply = pool.submit(post, url)
        finish(engine.asked())
        engine.asked(2)

    assert reply.result().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_the_second_stage(
    url: str, engine: Thinker, pool: ThreadPoolExecutor, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    reading = pool.submit(ask, openai_client(url), "why?", model="first", stream=stream)
    finish(engine.asked())
    engine.asked(2)._fail(RuntimeError("the secret of the house"))

    with pytest.raises(openai.APIError, match="the server made a mistake"):
        reading.result()
    eventually(lambda: "RuntimeError: the secret of the house" in caplog.text)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_for_which_the_reasons_leave_no_room(
    url: str, engine: Thinker, pool: ThreadPoolExecutor, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> PendingAnswer:
        raise UserError("the conversation is too long; begin anew")

    reply = pool.submit(post, url, stream=stream)
    first = engine.asked()
    monkeypatch.setattr(engine, "submit", refuse)
    finish(first)
    told = list(events(reply.result()))[-1] if stream else reply.result().json()

    assert told["error"]["message"] == "the conversation is too long; begin anew"
    assert told["error"]["type"] == "invalid_request_error"
