"""The shape of a request for chat completions, as OpenAI has it, checked.

What is not done here, or not known, is refused by name; what changes no answer is ignored (`IGNORED`). Beyond OpenAI's
fields a request may have `regex`, `choices`, `answer_choices`, `reason` and `context`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import IMAGE_MARK, Turn, words_between
from serve.api.errors import ApiError, invalid, unsupported

MAX_TEXT = 200_000  # characters of a conversation; no language model here reads as many
MAX_STOPS = 4
MAX_CHOICES = 32

MAX_ANSWERS = 16
MAX_TOP_LOGPROBS = 20
MAX_FORM = 20_000  # characters of a schema or a regular expression

# What each field that is not supported may still say, since it then asks for nothing.
_NOTHING: Mapping[str, Sequence[Any]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
}

# Fields that change no answer.
IGNORED = frozenset(
    (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls",
    )
)  # fmt: skip


Choice = Annotated[str, Field(max_length=200)]


class Shape(BaseModel):
    """What all of them have in common: no value is bent into another type."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class ImageUrl(Shape):
    """Where a picture is: a data URI, or a web address. `detail` has no effect: pictures are seen in one size."""

    url: str
    detail: str | None = None


class Part(Shape):
    """One part of a message: words, or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @field_validator("image_url", mode="before")
    @classmethod
    def _address(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _whole(self) -> Part:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type '{self.type}' needs the field '{self.type}'")
        return self


class Message(Shape):
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


class StreamOptions(Shape):
    """What a stream sends beside the text."""

    include_usage: bool | None = None


class SchemaForm(Shape):
    """A JSON schema that an answer keeps to, as OpenAI names it."""

    json_schema: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Shape):
    """What form an answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaForm | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type 'json_schema' and the field 'json_schema' go together")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema; None if any text will do."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.json_schema


class ChatRequest(Shape):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, Field(min_length=1, max_length=MAX_FORM)] | None = None
    choices: Annotated[list[Choice], Field(min_length=2, max_length=MAX_CHOICES)] | None = None
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
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only where logprobs is true")
        if len(self.forms) > 1:
            raise ValueError(f"{' and '.join(self.forms)}: an answer has one form; leave the others out")
        return self

    @property
    def forms(self) -> list[str]:
        """The fields that hold the answer to a form."""
        schema = self.response_format.schema_of_answer if self.response_format is not None else None
        given = {"response_format": schema, "regex": self.regex, "choices": self.choices}
        return [name for name, value in given.items() if value is not None]

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
    for field in values:
        if values[field] is not None and field not in (ChatRequest.model_fields.keys() | _NOTHING.keys() | IGNORED):
            raise unsupported(field, "it is not known here, and might change the answer; leave it out")
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
    for way in ("reason", "answer_choices"):
        asked_beside = [field for field in _ONE_FREE_ANSWER if getattr(request, field)]
        if getattr(request, way) and (beside := [*asked_beside, *request.forms, *_more_than_one(request)]):
            raise unsupported(beside[0], f"not beside {way}; leave one of them out")
    return request


_ONE_FREE_ANSWER = ("logprobs", "frequency_penalty", "presence_penalty")


def _more_than_one(request: ChatRequest) -> list[str]:
    return ["n"] if (request.n or 1) > 1 else []


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
