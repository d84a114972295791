"""The API on a real, tiny adapter, asked by the official client as by any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from api_server import data_uri, http, openai_client, said, served, shown, user
from openai import BadRequestError, NotFoundError, OpenAI

from adapters.data.prompts import Turn
from qformer.decoding import Decoding
from serve.adapter import user_turn
from serve.engine.engine import Engine

LONGEST = 8
COLOUR = "what colour is it?"


@pytest.fixture(scope="module")
def hall(run_folder: Path, cache_folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with Engine([run_folder], device="cpu", dtype="float32", offline=True) as engine:
            yield engine


@pytest.fixture(scope="module")
def url(hall: Engine) -> Iterator[str]:
    with served(hall) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return openai_client(url)


@pytest.fixture
def picture(data_file: Path) -> Path:
    return data_file.parent / "1.png"


def ask(client: OpenAI, *messages: dict[str, Any], **options: Any) -> Any:
    values: dict[str, Any] = {"model": "tiny", "max_tokens": LONGEST} | options
    return client.chat.completions.create(messages=messages, **values)  # type: ignore[call-overload]


def alone(hall: Engine, *turns: Turn, tokens: int = LONGEST) -> Any:
    return hall.chat(turns, decoding=Decoding(max_new_tokens=tokens)).result(60)


def test_a_question_about_a_picture(client: OpenAI, hall: Engine, picture: Path) -> None:
    reply = ask(client, user(said(COLOUR), shown(picture)))
    expected = alone(hall, user_turn(picture, COLOUR))

    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "tiny"
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert reply.usage.completion_tokens == expected.tokens
    assert reply.usage.total_tokens == expected.prompt_tokens + expected.tokens
    assert reply.model_extra["querybridge"] == {"confidence": pytest.approx(expected.confidence)}


def test_a_conversation_in_every_form(client: OpenAI, hall: Engine, picture: Path) -> None:
    reply = ask(
        client,
        {"role": "developer", "content": "be brief"},
        user(shown(picture), said("look"), said(COLOUR)),
        {"role": "assistant", "content": [said("<image>red")]},
        user("and now?"),
    )
    expected = alone(
        hall,
        Turn("system", "be brief"),
        user_turn(picture, f"look\n{COLOUR}"),
        Turn("assistant", "red"),
        Turn("user", "and now?"),
    )

    assert reply.choices[0].message.content == expected.text


def test_pictures_with_words_between_them_stay_in_their_places(client: OpenAI, hall: Engine, data_file: Path) -> None:
    first, second = data_file.parent / "0.png", data_file.parent / "1.png"
    apart = ask(client, user(said("a"), shown(first), said("b"), shown(second), said("alike?")))
    marked = ask(client, user(said("a<image>b<image>alike?"), shown(first), shown(second)))
    together = ask(client, user(said("alike?"), shown(first), shown(second)))

    placed = alone(hall, user_turn([first, second], "a<image>b<image>alike?"))
    for reply in (apart, marked):
        assert reply.choices[0].message.content == placed.text
        assert reply.model_extra["querybridge"]["confidence"] == pytest.approx(placed.confidence)
    before = alone(hall, user_turn([first, second], "alike?"))
    assert together.model_extra["querybridge"]["confidence"] == pytest.approx(before.confidence)


def test_a_stream_adds_up_to_the_answer(client: OpenAI, hall: Engine, picture: Path) -> None:
    chunks = list(ask(client, user(shown(picture), said(COLOUR)), stream=True, stream_options={"include_usage": True}))
    expected = alone(hall, user_turn(picture, COLOUR))
    *worded, last, usage = chunks

    assert "".join(chunk.choices[0].delta.content for chunk in worded) == expected.text
    assert worded[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.choices[0].finish_reason for chunk in (*worded, last)] == [None] * len(worded) + [expected.finish]
    assert last.model_extra["querybridge"]["confidence"] == pytest.approx(expected.confidence)
    assert usage.choices == []
    assert usage.usage.completion_tokens == expected.tokens
    assert all(chunk.usage is None for chunk in (*worded, last))


def test_a_stream_on_the_wire(url: str, picture: Path) -> None:
    asked = {"messages": [user(shown(picture), said(COLOUR))], "max_tokens": 3, "stream": True}
    with http(url) as client:
        reply = client.post("/v1/chat/completions", json=asked)
    events = reply.text.split("\n\n")

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_a_stop_string_ends_an_answer_streamed_or_not(client: OpenAI, hall: Engine, picture: Path) -> None:
    expected = alone(hall, user_turn(picture, COLOUR)).text
    stop = expected[2:4]
    whole = ask(client, user(shown(picture), said(COLOUR)), stop=stop)
    chunks = list(ask(client, user(shown(picture), said(COLOUR)), stop=["no such thing", stop], stream=True))

    assert whole.choices[0].message.content == expected[: expected.index(stop)].rstrip()
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_a_closed_question(client: OpenAI, hall: Engine, picture: Path) -> None:
    choices = ["red", "green", "blue"]
    reply = ask(client, user(shown(picture), said(COLOUR)), extra_body={"answer_choices": choices})
    expected = hall.choose([user_turn(picture, COLOUR)], choices).result(60)
    found = reply.model_extra["querybridge"]

    assert reply.choices[0].message.content == expected.text
    assert found["choices"] == pytest.approx(expected.choices)
    assert found["confidence"] == found["choices"][expected.text]
    streamed = list(
        ask(client, user(shown(picture), said(COLOUR)), extra_body={"answer_choices": choices}, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected.text
    with pytest.raises(BadRequestError, match="answer_choices: 1 given") as caught:
        ask(client, user("hm?"), extra_body={"answer_choices": ["red"]})
    assert caught.value.param == "answer_choices"


def test_settings_reach_the_model(client: OpenAI, hall: Engine, picture: Path) -> None:
    short = ask(client, user(shown(picture), said(COLOUR)), max_tokens=9, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2

    seen = {
        ask(client, user(shown(picture), said(COLOUR)), temperature=2.0, top_p=1.0).choices[0].message.content
        for _ in range(4)
    }
    assert len(seen) > 1, "nothing was drawn by lot"
    greedy = ask(client, user(shown(picture), said(COLOUR)), temperature=2.0, top_p=1e-6)
    assert greedy.choices[0].message.content == alone(hall, user_turn(picture, COLOUR)).text


def test_models_are_the_adapters(client: OpenAI) -> None:
    (model,) = client.models.list().data

    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "querybridge")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(NotFoundError, match="'gpt-4' does not exist"):
        client.models.retrieve("gpt-4")


def test_an_unknown_model_is_told_as_openai_does(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="'gpt-4' does not exist; take one of tiny") as caught:
        ask(client, user("hm?"), model="gpt-4")

    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found", "model", "invalid_request_error",
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("address", "says"),
    [
        (data_uri(b"no picture"), "message 1: image 'data:image/png;base64,"),
        ("data:image/png;base64,%%%", "broken base64"),
        ("data:image/png,plain", "is not of the form"),
        ("/etc/passwd", "is no data URI"),
        ("file:///etc/passwd", "is no data URI"),
        ("https://example.org/a.png", "are off here.*--allow-remote-images"),
    ],
)
def test_a_bad_picture_is_told(client: OpenAI, address: str, says: str, stream: bool) -> None:
    with pytest.raises(BadRequestError, match=says) as caught:
        ask(client, user(shown(address), said(COLOUR)), stream=stream)

    assert caught.value.param == "messages"


def test_the_engines_refusals_are_told(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="the last one must be the user's"):
        ask(client, user("a"), {"role": "assistant", "content": "b"})
    with pytest.raises(BadRequestError, match="begin anew"):
        ask(client, user("x" * 10_000))


def test_many_clients_at_once_each_get_their_own_answer(url: str, data_file: Path) -> None:
    asked = [
        (data_file.parent / f"{number % 12}.png", f"what is the {'very ' * (number % 4)}thing{number}?")
        for number in range(24)
    ]

    def one(picture: Path, question: str, stream: bool = False) -> tuple[str, float]:
        reply = ask(openai_client(url), user(shown(picture), said(question)), stream=stream)
        if not stream:
            return reply.choices[0].message.content, reply.model_extra["querybridge"]["confidence"]
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].model_extra["querybridge"]["confidence"]

    single = [one(*question) for question in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda number: one(*asked[number], stream=number % 2 == 0), range(len(asked))))

    assert [text for text, _ in found] == [text for text, _ in single]
    assert [sure for _, sure in found] == pytest.approx([sure for _, sure in single], rel=1e-4)
    assert len({sure for _, sure in single}) > 12, "the questions do not tell answers apart"
