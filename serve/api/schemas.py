"""The shapes of OpenAI's chat completions: what a client sends, checked, and what it gets.

What is not done here is refused if it would change the answer, and ignored if it would not. Beyond OpenAI's
fields a request may have `answer_choices`, `reason` and `context`, and a response has `querybridge`, with the answer's
confidence, and `reasoning_content`, if reasons were asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import IMAGE_MARK, Turn, words_between
from serve.api.errors import ApiError, invalid, unsupported
from serve.pending import Answer

MAX_TEXT = 200_000  # characters of a conversation; no language model here reads as many
MAX_STOPS = 4
MAX_CHOICES = 32

# What each field that is not supported may still say, since it then asks for nothing.
_NOTHING: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


Choice = Annotated[str, Field(max_length=200)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class ImageUrl(_Shape):
    """Where a picture is: a data URI, or a web address."""

    url: str


class Part(_Shape):
    """One part of a message: words, or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _whole(self) -> Part:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type '{self.type}' needs the field '{self.type}'")
        return self


class Message(_Shape):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]
    tool_calls: Any = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        if content is None:
            raise ValueError("it is null; give a string or a list of parts")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @field_validator("tool_calls")
    @classmethod
    def _no_tools(cls, calls: Any) -> Any:
        if calls:
            raise ValueError("tools are not supported")
        return calls

    @model_validator(mode="after")
    def _only_users_show_pictures(self) -> Message:
        if self.role != "user" and any(part.image_url for part in self.content):
            raise ValueError(f"pictures belong to the user's messages, not to the {self.role}'s")
        return self


class StreamOptions(_Shape):
    """What a stream sends beside the text."""

    include_usage: bool | None = None


class ChatRequest(_Shape):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    answer_choices: Annotated[list[Choice], Field(max_length=MAX_CHOICES)] | None = None
    reason: bool | None = None
    context: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and (len(stops) > MAX_STOPS or "" in stops):
            raise ValueError(f"give one to {MAX_STOPS} strings, none of them empty")
        return stops

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where stream is true")
        return self

    @property
    def image_urls(self) -> list[tuple[str, str]]:
        """Pictures in reading order: the message each is in, for people, and its address."""
        return [
            (f"message {number}", part.image_url.url)
            for number, message in enumerate(self.messages, start=1)
            for part in message.content
            if part.image_url is not None
        ]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_request(body: bytes | bytearray) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: it is not JSON, has not the right form, asks for what is not done here, or is too long.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    for field, allowed in _NOTHING.items():
        if values.get(field) is not None and values[field] not in allowed:
            raise unsupported(field, "it is not supported here; leave it out")
    try:
        request = ChatRequest.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None
    length = sum(len(part.text or "") for message in request.messages for part in message.content)
    if length + len(request.context or "") > MAX_TEXT:
        raise ApiError(
            400, f"messages: more than {MAX_TEXT:,} characters; shorten them", param="messages",
            code="context_length_exceeded",
        )  # fmt: skip
    if not any((part.text or "").strip() for part in request.messages[-1].content):
        raise ApiError(400, "messages: the last one has no words; ask something", param="messages")
    _check_reason(request)
    return request


def _check_reason(request: ChatRequest) -> None:
    if not request.reason:
        if request.context is not None:
            raise unsupported("context", "only where reason is true; say it in the question")
        return
    if request.stop:
        raise unsupported("stop", "not where reason is true; leave it out")
    if [message.role for message in request.messages] != ["user"]:
        raise unsupported(
            "messages",
            "where reason is true there is one, the user's; what is told beside its pictures goes in context",
        )


def turns_of(messages: Sequence[Message], pictures: Sequence[ImageRef]) -> list[Turn]:
    """A conversation for the engine.

    Args:
        messages: as they were sent.
        pictures: of all of them, in reading order.
    """
    left = iter(pictures)
    turns = []
    for message in messages:
        shown = tuple(next(left) for part in message.content if part.image_url is not None)
        if message.role == "assistant":  # a model may have written what stands for a picture
            turns.append(Turn("assistant", _words(message.content).replace(IMAGE_MARK, "")))
        else:
            turns.append(Turn("user" if message.role == "user" else "system", _words(message.content), shown))
    return turns


def _words(parts: Sequence[Part]) -> str:
    """A message's text, with marks for its pictures only if it has words between them."""
    return words_between([part.text or "" if part.type == "text" else None for part in parts])


class Reply:
    """One answer in OpenAI's words, whole or in chunks.

    Args:
        model: the adapter's name.
        with_reasons: they were asked for; an adapter that gives none leaves their field empty.
        with_usage: a stream ends with a count of tokens.
    """

    def __init__(self, model: str, *, with_reasons: bool = False, with_usage: bool = False) -> None:
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._with_reasons = with_reasons
        self._with_usage = with_usage
        self._sent = {"reasoning_content": "", "content": ""}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a response."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        if self._with_reasons:
            message["reasoning_content"] = answer.rationale
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer)}
        return self._object("chat.completion", [choice]) | {"usage": usage_of(answer), "querybridge": extras_of(answer)}

    def opening(self) -> dict[str, Any]:
        """The chunk that begins a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def deltas(self, text: str, rationale: str | None) -> Iterator[dict[str, Any]]:
        """Chunks of what is new since the last ones: of the reasons, then of the answer."""
        for field, written in (("reasoning_content", rationale or ""), ("content", text)):
            sent = self._sent[field]
            if written != sent and written.startswith(sent):
                self._sent[field] = written
                yield self._chunk({field: written[len(sent) :]})

    def closing(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """What ends a stream: why it ended and, if it was asked for, the count of tokens."""
        yield self._chunk({}, _finish_reason(answer)) | {"querybridge": extras_of(answer)}
        if self._with_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": usage_of(answer)}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}  # OpenAI's, until the last chunk
        return self._object("chat.completion.chunk", [choice]) | usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage_of(answer: Answer) -> dict[str, int]:
    """How many tokens were read and written."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }


def extras_of(answer: Answer) -> dict[str, Any]:
    """What is known of an answer beyond OpenAI's fields."""
    extras: dict[str, Any] = {"confidence": answer.confidence}
    return extras if answer.choices is None else extras | {"choices": answer.choices}


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.finish == "length" else "stop"
