"""What a client gets when a request fails: OpenAI's error object, with the status that its clients act upon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

RETRY_AFTER = 2  # seconds


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one line for people.
        type: OpenAI's kind of error.
        param: the field that is wrong, as in "messages[0].content".
        code: a word for programs.
        headers: sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}
        self.headers = dict(headers or {})


def unsupported(param: str, message: str) -> ApiError:
    """A field asks for something that is not done here."""
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported_parameter")


def invalid(error: ValidationError) -> ApiError:
    """The first fault of a request that has not the right form."""
    fault = error.errors(include_url=False, include_input=False)[0]
    param = _param(fault)
    return ApiError(400, f"{param}: {_reason(fault)}" if param else _reason(fault), param=param or None)


def too_busy(message: str) -> ApiError:
    """As many requests are being answered or wait as may."""
    return ApiError(
        429,
        message,
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(RETRY_AFTER)},
    )


def too_slow(seconds: float) -> ApiError:
    """The answer did not come in time. OpenAI's clients would send it again by themselves: a second load, as slow."""
    return ApiError(
        504,
        f"no answer within {seconds:g} s (--request-timeout): ask for fewer tokens, or try when there is less to do",
        type="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def closing() -> ApiError:
    """The server ends."""
    return ApiError(
        503, "the server is being shut down", type="server_error", code="shutting_down", headers={"Connection": "close"}
    )


def fault() -> ApiError:
    """Something that is not the client's doing; the server's log has it."""
    return ApiError(500, "the server made a mistake; its log says which", type="server_error", code="internal_error")


def _param(fault: ErrorDetails) -> str:
    text = ""
    for part in fault["loc"]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _reason(fault: ErrorDetails) -> str:
    context: Mapping[str, Any] = fault.get("ctx", {})
    if fault["type"] == "value_error":
        return str(context["error"])
    if fault["type"] == "missing":
        return "it is missing"
    return fault["msg"][0].lower() + fault["msg"][1:]
