"""What becomes of requests that are large, slow, left or too many, and of a server that breaks or ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from api_server import (
    CHAT,
    PNG,
    FakeEngine,
    body,
    error_of,
    eventually,
    figures,
    finish,
    half_a_request,
    http,
    openai_client,
    post,
    said,
    served,
    shown,
    user,
)

from serve.engine.pending import PendingAnswer
from serve.limits import Limits


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


# how much, how long --------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_however_it_comes(engine: FakeEngine) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        yield from (b"x" * 1000 for _ in range(count))

    with served(engine, limits=Limits(max_body=100_000)) as url:
        big = json.dumps(body(messages=[user("x" * 100_000)])).encode()
        headers = {"content-type": "application/json"}
        for content in (big, iter([big]), pieces(150), b"x" * 199_000, b"x" * 2 * 2**20, pieces(2000)):
            reply = post(url, json=None, content=content, headers=headers)
            assert reply.status_code == 413
            assert error_of(reply)["code"] == "request_too_large"
            assert reply.headers["connection"] == "close"
        with pytest.raises(openai.APIStatusError, match="--max-body") as caught:
            openai_client(url).chat.completions.create(model="first", messages=[user("x" * 100_000)])  # type: ignore[list-item]
        assert caught.value.status_code == 413
    assert engine.pending == []


def test_an_endless_body_is_cut_off(engine: FakeEngine) -> None:
    sent = 0
    with (
        served(engine, limits=Limits(max_body=100_000)) as url,
        half_a_request(url, b"Transfer-Encoding: chunked", b"") as line,
        pytest.raises(OSError),
    ):
        while sent < 100 * 2**20:
            line.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent += 65536
    assert sent < 20 * 2**20  # what the system's own buffers hold


def test_a_body_that_never_ends_coming_is_given_up(engine: FakeEngine) -> None:
    with served(engine, limits=Limits(request_timeout=0.3)) as url, half_a_request(url) as line:
        answer = line.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_too_many_pictures_are_refused(engine: FakeEngine) -> None:
    with served(engine, limits=Limits(max_images=2)) as url:
        reply = post(url, body(messages=[user(shown(PNG), said("a")), user(*[shown(PNG)] * 2, said("b"))]))

    assert reply.status_code == 400
    assert error_of(reply)["message"] == "messages: 3 pictures, and --max-images is 2"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_does_not_come_in_time(engine: FakeEngine, stream: bool) -> None:
    with served(engine, limits=Limits(request_timeout=0.2)) as url:
        with pytest.raises(openai.InternalServerError, match=r"no answer within 0\.2 s") as caught:
            openai_client(url, max_retries=2).chat.completions.create(  # which would send it thrice
                model="first", messages=[{"role": "user", "content": "hm?"}], stream=stream
            )
        eventually(lambda: engine.pending[0].stopped)

    assert caught.value.status_code == 504
    assert caught.value.code == "timeout"
    assert len(engine.pending) == 1


def test_a_stream_that_stalls_ends_with_an_error(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with served(engine, limits=Limits(request_timeout=1)) as url:
        reply = pool.submit(post, url, body(stream=True))
        engine.asked()._update("re")
        *_, delta, last, end = reply.result().text.split("\n\n")

    assert json.loads(delta.removeprefix("data: "))["choices"][0]["delta"] == {"content": "re"}
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert end == ""
    assert engine.pending[0].stopped


def test_one_too_many_is_told_to_come_again(pool: ThreadPoolExecutor) -> None:
    engine = FakeEngine(max_waiting=2)
    with served(engine) as url:
        waiting = [pool.submit(post, url) for _ in range(2)]
        engine.asked(2)
        refused = post(url)
        with pytest.raises(openai.RateLimitError, match="2 requests wait already"):
            openai_client(url).chat.completions.create(model="first", messages=[{"role": "user", "content": "hm?"}])
        for pending in engine.pending:
            finish(pending)
        assert [reply.result().status_code for reply in waiting] == [200, 200]

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert error_of(refused)["type"] == "rate_limit_error"


def test_bodies_in_memory_are_bounded_too(pool: ThreadPoolExecutor) -> None:
    engine = FakeEngine(max_waiting=1, max_batch=1)
    with served(engine) as url:
        lines = [half_a_request(url) for _ in range(2)]
        eventually(lambda: post(url, []).status_code == 429)
        for line in lines:
            line.close()
        eventually(lambda: post(url, []).status_code == 400)  # their places are free again


# who leaves, what breaks, what ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_waiting_stops_the_request(url: str, engine: FakeEngine, stream: bool) -> None:
    with half_a_request(url, rest=json.dumps(body(stream=stream)).encode()):
        pending = engine.asked()
        time.sleep(0.1)
        assert not pending.stopped
    eventually(lambda: pending.stopped)
    eventually(lambda: figures(url).get(f'querybridge_requests_total{{endpoint="{CHAT}",status="499"}}') == 1)


def test_who_leaves_a_stream_stops_the_request(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    def read_a_little() -> str:
        stream = openai_client(url).chat.completions.create(
            model="first", messages=[{"role": "user", "content": "hm?"}], stream=True
        )
        text = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text:
                stream.close()
                return text
        return text

    reading = pool.submit(read_a_little)
    pending = engine.asked()
    pending._update("re")
    assert reading.result() == "re"
    eventually(lambda: pending.stopped)
    eventually(lambda: figures(url).get(f'querybridge_requests_total{{endpoint="{CHAT}",status="499"}}') == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_ours_is_an_error_without_its_secrets(
    url: str, engine: FakeEngine, pool: ThreadPoolExecutor, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    reply = pool.submit(post, url, body(stream=stream))
    engine.asked()._fail(RuntimeError("the secret of the house"))

    assert reply.result().status_code == 500
    assert error_of(reply.result())["code"] == "internal_error"
    assert "secret" not in reply.result().text
    eventually(lambda: "RuntimeError: the secret of the house" in caplog.text)


def test_a_fault_in_a_stream_is_its_last_event(
    url: str, engine: FakeEngine, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[str] = []

    def read() -> None:
        stream = openai_client(url).chat.completions.create(
            model="first", messages=[{"role": "user", "content": "hm?"}], stream=True
        )
        begun.extend(chunk.choices[0].delta.content or "" for chunk in stream)

    reading = pool.submit(read)
    pending = engine.asked()
    pending._update("re")
    eventually(lambda: bool(begun))
    pending._fail(RuntimeError("the secret of the house"))

    with pytest.raises(openai.APIError, match="the server made a mistake"):
        reading.result()
    eventually(lambda: "RuntimeError: the secret of the house" in caplog.text)


def test_what_might_become_a_stop_string_is_held_back(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    told = pool.submit(lambda: engine.asked()._update("red E"))
    asked = body(stream=True, stop=["END", "##"])
    with http(url) as client, client.stream("POST", CHAT, json=asked) as reply:
        told.result()
        deltas = (
            json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
            for line in reply.iter_lines()
            if line.startswith("data: {")
        )
        assert [next(deltas), next(deltas)] == ["", "red"]
        engine.pending[0]._update("red EN")
        engine.pending[0]._update("red EN or #")
        assert next(deltas) == " EN or"
        engine.pending[0]._update("red EN or #1")
        assert next(deltas) == " #1"
        finish(engine.pending[0], "red EN or #1 E")
        assert list(deltas) == [" E", None]


def test_closing_gives_those_who_wait_an_answer(
    engine: FakeEngine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.api.server._GRACE", 0.5)
    with served(engine) as url:
        waiting, streaming = pool.submit(post, url), pool.submit(post, url, body(stream=True))
        engine.asked(2)
    for reply in (waiting.result(), streaming.result()):
        assert reply.status_code == 503
        assert error_of(reply)["code"] == "shutting_down"
    assert all(pending.stopped for pending in engine.pending)


def test_what_can_end_soon_is_answered_while_closing(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    def answer(pending: PendingAnswer) -> None:
        finish(pending, "in time")

    with served(engine) as url:
        waiting = pool.submit(post, url)
        threading.Timer(1, answer, [engine.asked()]).start()
    assert waiting.result().json()["choices"][0]["message"]["content"] == "in time"
