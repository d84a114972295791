"""What a request must look like and who may send one, and how the API says what is wrong."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from api_server import (
    CHAT,
    PNG,
    FakeEngine,
    body,
    error_of,
    finish,
    http,
    openai_client,
    post,
    said,
    served,
    shown,
    user,
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


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
        ({"seed": "7"}, "seed", "valid integer"),
        ({"seed": 7.5}, "seed", "valid integer"),
        ({"seed": True}, "seed", "valid integer"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "one to 4"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"top_logprobs": 2}, None, "only where logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "go together"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"regex": "a+", "choices": ["a", "b"]}, None, "regex and choices: an answer has one form"),
        ({"choices": ["a"]}, "choices", "at least 2"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": True}, "presence_penalty", "valid number"),
        ({"temprature": 0.5}, "temprature", "not known here"),
        ({"guided_regex": "a+"}, "guided_regex", "not known here"),
        ({"answer_choices": ["a", "b"], "n": 2}, "n", "not beside answer_choices"),
        ({"answer_choices": ["a", "b"], "logprobs": True}, "logprobs", "not beside answer_choices"),
        ({"reason": True, "regex": "a+"}, "regex", "not beside reason"),
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
        "user": "me", "seed": None, "n": 1, "logprobs": False, "tools": [], "presence_penalty": 0, "logit_bias": {},
        "response_format": {"type": "text"}, "metadata": {"a": "b"}, "store": None, "brand_new": None,
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
    assert (engine.pending[0].decoding.max_new_tokens, engine.pending[0].decoding.temperature) == (
        512,
        0.0,
    )
    assert long.result().json()["model"] == "second"
    decoding = engine.pending[1].decoding
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p) == (512, 0.5, 0.9)
    assert engine.pending[1].stops == ("x",)


def test_a_seed_goes_with_sampling_alone(url: str, engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    """Greedy answers have no chance in them, and their seeds keep none of them from being gathered."""
    replies = []
    for number, changes in enumerate(({"seed": -7, "temperature": 1.0}, {"seed": 7}, {"temperature": 1.0}), start=1):
        replies.append(pool.submit(post, url, body(**changes)))
        finish(engine.asked(number))

    assert [reply.result().status_code for reply in replies] == [200] * 3
    assert [pending.decoding.seed for pending in engine.pending] == [-7, None, None]


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
        missing, wrong = client.get("/v1/images"), client.get(CHAT)

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
    assert engine.pending == []
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
