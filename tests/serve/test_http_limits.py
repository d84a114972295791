"""What the API refuses and how it says so, and what becomes of requests that are slow, left or too many."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_server import PNG, FakeEngine, eventually, finish, http, openai_client, said, served, shown, user

from serve.http_chat import Limits
from serve.tickets import Ticket

CHAT = "/v1/chat/completions"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with served(engine) as url:
        yield url


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "first", "messages": [user("what is it?")]} | changes


def post(url: str, values: Any = None, **options: Any) -> httpx.Response:
    with http(url) as client:
        return client.post(CHAT, **({"json": values if values is not None else body()} | options))


def half_a_request(url: str, header: bytes = b"", rest: bytes = b'{"messages"') -> socket.socket:
    """A connection over which a request has begun: without a header of its own, one whose body ends with `rest`."""
    host, port = url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=30)
    length = len(rest) if rest.endswith(b"}") else 100
    lines = (b"POST /v1/chat/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json")
    line.sendall(b"\r\n".join((*lines, header or b"Content-Length: %d" % length, b"", rest)))
    return line


def error_of(reply: httpx.Response) -> dict[str, Any]:
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return dict(reply.json()["error"])


# the form of a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"messages": None}, "messages", "valid list"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": ["hm"]}, "messages[0]", "dictionary"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "it is null"),
        ({"messages": [user({"type": "input_audio"})]}, "messages[0].content[0].type", "'text' or 'image_url'"),
        ({"messages": [user(said("a"), {"type": "image_url"})]}, "messages[0].content[1]", "needs the field"),
        ({"messages": [{"role": "system", "content": [shown(PNG)]}]}, "messages[0]", "belong to the user's"),
        ({"messages": [user("")]}, "messages", "no words"),
        ({"messages": [user("x" * 200_001)]}, "messages", "more than 200,000 characters"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ["a"] * 5}, "stop", "one to 4"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"stream_options": {"include_usage": True}}, None, "only where stream is true"),
        ({"answer_choices": ["a"] * 33}, "answer_choices", "at most 32"),
    ],
)
def test_a_wrong_field_is_named(url: str, changes: dict[str, Any], param: str | None, says: str) -> None:
    reply = post(url, body(**changes))
    told = error_of(reply)

    assert reply.status_code == 400
    assert told["type"] == "invalid_request_error"
    assert told["param"] == param
    assert says in told["message"]


def test_what_changes_nothing_is_ignored(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    harmless = {
        "user": "me", "seed": 7, "n": 1, "logprobs": False, "tools": [], "presence_penalty": 0, "logit_bias": {},
        "response_format": {"type": "text"}, "metadata": {"a": "b"}, "store": None, "brand_new": [1],
        "temperature": None, "stream": None, "stop": None, "tool_choice": "none",
    }  # fmt: skip
    reply = pool.submit(post, url, body(**harmless))
    finish(engine.asked())

    assert reply.result().json()["choices"][0]["message"]["content"] == "red"


def test_settings_and_defaults(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    plain = pool.submit(post, url, {"messages": [user("hm?")]})
    finish(engine.asked())
    long = pool.submit(post, url, body(model="second", max_tokens=10**6, temperature=0.5, top_p=0.9, stop="x"))
    finish(engine.asked(2))

    assert plain.result().json()["model"] == "first"
    assert (engine.tickets[0].decoding.max_new_tokens, engine.tickets[0].decoding.temperature) == (512, 0.0)
    assert long.result().json()["model"] == "second"
    decoding = engine.tickets[1].decoding
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p) == (512, 0.5, 0.9)
    assert engine.tickets[1].stops == ("x",)


@pytest.mark.parametrize(
    ("content", "says"), [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"", "not JSON"), (b"\xff", "not JSON")]
)
def test_a_body_that_is_no_json(url: str, content: bytes, says: str) -> None:
    reply = post(url, json=None, content=content, headers={"content-type": "application/json"})

    assert reply.status_code == 400
    assert says in error_of(reply)["message"]


def test_another_kind_of_content_is_refused(url: str) -> None:
    """A page of the web may send text/plain anywhere without asking, but not JSON."""
    reply = post(url, json=None, content=json.dumps(body()), headers={"content-type": "text/plain"})

    assert reply.status_code == 415
    assert "Content-Type: application/json" in error_of(reply)["message"]


def test_unknown_paths_and_methods_are_errors_of_the_same_form(url: str) -> None:
    with http(url) as client:
        missing, wrong = client.get("/v1/embeddings"), client.get(CHAT)

    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "Not Found" in error_of(missing)["message"]
    assert "Method Not Allowed" in error_of(wrong)["message"]


# who may ask ---------------------------------------------------------------------------------------------------


def test_a_key_opens_all_but_health(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with served(engine, api_key="sésame") as url, http(url) as client:
        for path in ("/v1/models", "/metrics"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s\xe9same".encode()}):
                reply = client.get(path, headers=headers)  # type: ignore[arg-type]
                assert reply.status_code == 401
                assert error_of(reply)["code"] == "invalid_api_key"
            assert client.get(path, headers={"authorization": "bearer sésame".encode()}).status_code == 200
        assert client.post(CHAT, content=b"{").status_code == 401
        assert client.get("/health").status_code == 200
    assert engine.tickets == []
    with served(engine, api_key="open") as url:
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            openai_client(url, api_key="closed").models.list()
        assert [model.id for model in openai_client(url, api_key="open").models.list()] == ["first", "second"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("", 403), ("localhost:8000", 200), ("[::1]:1", 200)],
)
def test_without_a_key_only_this_machines_names_are_answered(url: str, host: str, status: int) -> None:
    """Else a web page whose name is made to mean 127.0.0.1 could ask from the user's own browser."""
    with http(url) as client:
        reply = client.get("/v1/models", headers={"host": host})

    assert reply.status_code == status


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
    assert engine.tickets == []


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
        eventually(lambda: engine.tickets[0].stopped)

    assert caught.value.status_code == 504
    assert caught.value.code == "timeout"
    assert len(engine.tickets) == 1


def test_a_stream_that_stalls_ends_with_an_error(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with served(engine, limits=Limits(request_timeout=1)) as url:
        reply = pool.submit(post, url, body(stream=True))
        engine.asked()._told("re")
        *_, delta, last, end = reply.result().text.split("\n\n")

    assert json.loads(delta.removeprefix("data: "))["choices"][0]["delta"] == {"content": "re"}
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert end == ""
    assert engine.tickets[0].stopped


def test_one_too_many_is_told_to_come_again(pool: ThreadPoolExecutor) -> None:
    engine = FakeEngine(max_waiting=2)
    with served(engine) as url:
        waiting = [pool.submit(post, url) for _ in range(2)]
        engine.asked(2)
        refused = post(url)
        with pytest.raises(openai.RateLimitError, match="2 requests wait already"):
            openai_client(url).chat.completions.create(model="first", messages=[{"role": "user", "content": "hm?"}])
        for ticket in engine.tickets:
            finish(ticket)
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
        ticket = engine.asked()
        time.sleep(0.1)
        assert not ticket.stopped
    eventually(lambda: ticket.stopped)
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
    ticket = engine.asked()
    ticket._told("re")
    assert reading.result() == "re"
    eventually(lambda: ticket.stopped)


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
    ticket = engine.asked()
    ticket._told("re")
    eventually(lambda: bool(begun))
    ticket._fail(RuntimeError("the secret of the house"))

    with pytest.raises(openai.APIError, match="the server made a mistake"):
        reading.result()
    eventually(lambda: "RuntimeError: the secret of the house" in caplog.text)


def test_what_might_become_a_stop_string_is_held_back(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    told = pool.submit(lambda: engine.asked()._told("red E"))
    asked = body(stream=True, stop=["END", "##"])
    with http(url) as client, client.stream("POST", CHAT, json=asked) as reply:
        told.result()
        deltas = (
            json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content")
            for line in reply.iter_lines()
            if line.startswith("data: {")
        )
        assert [next(deltas), next(deltas)] == ["", "red"]
        engine.tickets[0]._told("red EN")
        engine.tickets[0]._told("red EN or #")
        assert next(deltas) == " EN or"
        engine.tickets[0]._told("red EN or #1")
        assert next(deltas) == " #1"
        finish(engine.tickets[0], "red EN or #1 E")
        assert list(deltas) == [" E", None]


def test_closing_gives_those_who_wait_an_answer(
    engine: FakeEngine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http_server._GRACE", 0.5)
    with served(engine) as url:
        waiting, streaming = pool.submit(post, url), pool.submit(post, url, body(stream=True))
        engine.asked(2)
    for reply in (waiting.result(), streaming.result()):
        assert reply.status_code == 503
        assert error_of(reply)["code"] == "shutting_down"
    assert all(ticket.stopped for ticket in engine.tickets)


def test_what_can_end_soon_is_answered_while_closing(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    def answer(ticket: Ticket) -> None:
        finish(ticket, "in time")

    with served(engine) as url:
        waiting = pool.submit(post, url)
        threading.Timer(1, answer, [engine.asked()]).start()
    assert waiting.result().json()["choices"][0]["message"]["content"] == "in time"


# figures -------------------------------------------------------------------------------------------------------


def figures(url: str) -> dict[str, float]:
    with http(url) as client:
        reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_count_what_was_done(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    for number, values in enumerate((body(), body(model="second"), body(stream=True)), start=1):
        reply = pool.submit(post, url, values)
        ticket = engine.asked(number)
        assert figures(url)["querybridge_requests_waiting"] == 1
        assert figures(url)["querybridge_requests_in_flight"] == 2  # the one that asks for the figures among them
        ticket._told("re")
        time.sleep(0.3)
        finish(ticket, tokens=5)
        assert reply.result().status_code == 200
    post(url, [])
    with http(url) as client:
        client.get("/no/such/path")
        client.get("/v1/models/first")
    found = figures(url)

    assert found['querybridge_requests_total{endpoint="/v1/chat/completions",status="200"}'] == 3
    assert found['querybridge_requests_total{endpoint="/v1/chat/completions",status="400"}'] == 1
    assert found['querybridge_requests_total{endpoint="/v1/models/{name:path}",status="200"}'] == 1
    assert found['querybridge_requests_total{endpoint="other",status="404"}'] == 1
    assert found['querybridge_generated_tokens_total{adapter="first"}'] == 10
    assert found['querybridge_generated_tokens_total{adapter="second"}'] == 5
    assert found['querybridge_prompt_tokens_total{adapter="first"}'] == 14
    assert found['querybridge_answer_seconds_count{adapter="first"}'] == 2
    assert found['querybridge_answer_seconds_sum{adapter="first"}'] >= 0.6
    first_token = found['querybridge_first_token_seconds_sum{adapter="first"}']
    assert first_token <= found['querybridge_answer_seconds_sum{adapter="first"}'] - 0.5
    assert found["querybridge_requests_waiting"] == 0


def test_two_servers_in_one_process_count_apart(engine: FakeEngine) -> None:
    with served(engine) as first, served(FakeEngine()) as second:
        post(first, [])
        name = 'querybridge_requests_total{endpoint="/v1/chat/completions",status="400"}'

        assert figures(first)[name] == 1
        assert name not in figures(second)


def test_health_names_the_adapters(url: str) -> None:
    with http(url) as client:
        found = client.get("/health").json()

    assert found["status"] == "ok"
    assert found["adapters"] == ["first", "second"]
    assert found["version"].count(".") == 2
