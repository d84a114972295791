"""What a request may ask of its answers: several, tokens' probabilities, penalties, a seed, and a form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from api_server import data_uri, openai_client, said, served, shown, user
from openai import BadRequestError, OpenAI

from serve.engine.engine import Engine

COLOUR = "what colour is it?"
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 9},
        "sure": {"type": "boolean"},
        "note": {"type": "string"},
    },
    "required": ["colour", "sides", "sure", "note"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def hall(run_folder: Path, cache_folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with Engine([run_folder], device="cpu", dtype="float32", offline=True, max_prompt=500) as engine:
            yield engine


@pytest.fixture(scope="module")
def client(hall: Engine) -> Iterator[OpenAI]:
    with served(hall) as url:
        yield openai_client(url)


@pytest.fixture
def asked(data_file: Path) -> dict[str, Any]:
    return user(shown(data_file.parent / "1.png"), said(COLOUR))


def ask(client: OpenAI, message: dict[str, Any], **options: Any) -> Any:
    values: dict[str, Any] = {"model": "tiny", "max_tokens": 8} | options
    return client.chat.completions.create(messages=[message], **values)  # type: ignore[call-overload]


def test_several_answers_whole_and_streamed(client: OpenAI, asked: dict[str, Any]) -> None:
    drawn = {"temperature": 1.5, "seed": 11, "n": 3}
    reply = ask(client, asked, **drawn)
    texts = [choice.message.content for choice in reply.choices]
    single = [ask(client, asked, temperature=1.5, seed=11 + number) for number in range(3)]

    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert texts == [one.choices[0].message.content for one in single]
    assert len(set(texts)) > 1
    assert reply.usage.completion_tokens == sum(one.usage.completion_tokens for one in single)
    assert reply.usage.prompt_tokens == single[0].usage.prompt_tokens
    assert [each["confidence"] for each in reply.model_extra["querybridge"]["answers"]] == pytest.approx(
        [one.model_extra["querybridge"]["confidence"] for one in single], rel=1e-4
    )
    written = ["", "", ""]
    ends = []
    for chunk in ask(client, asked, stream=True, stream_options={"include_usage": True}, **drawn):
        for choice in chunk.choices:
            written[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
        usage = chunk.usage
    assert written == texts
    assert sorted(ends) == [0, 1, 2]
    assert usage.completion_tokens == reply.usage.completion_tokens


def test_tokens_with_their_probabilities(client: OpenAI, hall: Engine, asked: dict[str, Any]) -> None:
    reply = ask(client, asked, logprobs=True, top_logprobs=2)
    tokens = reply.choices[0].logprobs.content
    end = reply.choices[0].finish_reason == "stop"

    written = "".join(token.token for token in tokens if not token.token.startswith("<"))  # no special ones
    assert written.strip() == reply.choices[0].message.content
    assert all(bytes(token.bytes).decode() == token.token for token in tokens)
    for token in tokens:  # greedy: the likeliest is what was written
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
        assert token.top_logprobs[1].logprob <= token.logprob <= 0
    if not end:
        mean = sum(token.logprob for token in tokens) / len(tokens)
        assert math.exp(mean) == pytest.approx(reply.model_extra["querybridge"]["confidence"], rel=1e-4)
    streamed = [
        token
        for chunk in ask(client, asked, logprobs=True, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert all(token.top_logprobs == [] for token in streamed)


def test_penalties_change_what_is_written(client: OpenAI, asked: dict[str, Any]) -> None:
    plain = ask(client, asked, max_tokens=20).choices[0].message.content
    penalised = ask(client, asked, max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0)
    text = penalised.choices[0].message.content

    assert text != plain
    assert len(set(text)) > len(set(plain))


def test_an_address_as_a_plain_string_and_its_detail(client: OpenAI, data_file: Path, asked: dict[str, Any]) -> None:
    uri = data_uri(data_file.parent / "1.png")
    plain = user({"type": "image_url", "image_url": uri}, said(COLOUR))
    detailed = user({"type": "image_url", "image_url": {"url": uri, "detail": "low"}}, said(COLOUR))
    expected = ask(client, asked).choices[0].message.content

    assert [ask(client, one).choices[0].message.content for one in (plain, detailed)] == [expected] * 2


FORMS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}},
    "object": {"response_format": {"type": "json_object"}},
    "regex": {"extra_body": {"regex": "[a-z]{3,5}-[0-9]+"}},
    "choices": {"extra_body": {"choices": ["red", "green", 'a "dark" blue']}},
}


def check(form: str, text: str) -> None:
    """Whether an answer is of its form, by other means than those that made it."""
    if form == "schema":
        value = json.loads(text)
        assert set(value) == set(SCHEMA["properties"])  # type: ignore[call-overload]
        assert value["colour"] in ("red", "green") and value["sides"] in range(10)
        assert isinstance(value["sure"], bool) and isinstance(value["note"], str)
    elif form == "object":
        assert isinstance(json.loads(text), dict)
    elif form == "regex":
        assert re.fullmatch("[a-z]{3,5}-[0-9]+", text)
    else:
        assert text in FORMS["choices"]["extra_body"]["choices"]


def test_answers_keep_to_their_form_streamed_or_not(client: OpenAI, asked: dict[str, Any]) -> None:
    def one(number: int) -> tuple[str, str]:
        form = list(FORMS)[number % len(FORMS)]
        options = {"max_tokens": 90, "temperature": 1.0 + number % 2, "seed": number, **FORMS[form]}
        if number % 3:
            return form, ask(client, asked, **options).choices[0].message.content
        chunks = ask(client, asked, stream=True, **options)
        return form, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, range(24)))

    for form, text in found:
        check(form, text)
    assert len({text for _, text in found}) > 12


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"extra_body": {"regex": "(a"}}, "regex", "regex: .*unclosed group"),
        ({"extra_body": {"choices": ["a", " a"]}}, "choices", "choices: one is there twice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "strang"}}}},
            "response_format",
            "Invalid type: strang",
        ),
    ],
)
def test_a_form_that_is_none_is_told(
    client: OpenAI, asked: dict[str, Any], options: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(BadRequestError, match=says) as caught:
        ask(client, asked, **options)
    assert caught.value.param == param


def test_a_prompt_over_the_limit_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"is 1\d\d\d tokens, and --max-prompt is 500: shorten it"):
        ask(client, user("x" * 1100))
