"""What a request for chat completions gets, as OpenAI has it: whole, or in chunks.

Beyond OpenAI's fields a response has `querybridge`, with the answers' confidence, and `reasoning_content`, if reasons
were asked for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from serve.engine.pending import Answer, TokenChance

Told = Callable[[Sequence[TokenChance]], list[dict[str, Any]]]
"""Tokens' probabilities in OpenAI's words."""


class Reply:
    """The answers to one request in OpenAI's words, whole or in chunks.

    Args:
        model: the adapter's name.
        with_reasons: they were asked for; an adapter that gives none leaves their field empty.
        with_usage: a stream ends with a count of tokens.
        tell_tokens: tokens' probabilities in OpenAI's words; None if they were not asked for.
    """

    def __init__(
        self, model: str, *, with_reasons: bool = False, with_usage: bool = False, tell_tokens: Told | None = None
    ) -> None:
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._with_reasons = with_reasons
        self._with_usage = with_usage
        self._tell_tokens = tell_tokens
        self._sent: dict[tuple[int, str], str] = {}
        self._told: dict[int, int] = {}  # tokens of each answer whose probabilities were sent

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of a response."""
        choices = []
        for index, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            if self._with_reasons:
                message["reasoning_content"] = answer.rationale
            told = self._log_probs(answer.chances)
            choices.append(
                {"index": index, "message": message, "logprobs": told, "finish_reason": _finish_reason(answer)}
            )
        return self._object("chat.completion", choices) | {
            "usage": usage_of(answers),
            "querybridge": extras_of(answers),
        }

    def opening(self, index: int = 0) -> dict[str, Any]:
        """The chunk that begins an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def deltas(
        self, index: int, text: str, rationale: str | None, chances: Sequence[TokenChance] = ()
    ) -> Iterator[dict[str, Any]]:
        """Chunks of what is new since the last ones: of the reasons, then of the answer with its new tokens."""
        for field, written in (("reasoning_content", rationale or ""), ("content", text)):
            sent = self._sent.get((index, field), "")
            if written != sent and written.startswith(sent):
                self._sent[index, field] = written
                new = self._new_tokens(index, chances) if field == "content" else None
                yield self._chunk(index, {field: written[len(sent) :]}, told=new)

    def end(self, index: int, answer: Answer) -> Iterator[dict[str, Any]]:
        """Chunks that end an answer: tokens that no text told of, and why it ended."""
        if self._tell_tokens is not None and (told := self._new_tokens(index, answer.chances)):
            yield self._chunk(index, {"content": ""}, told=told)
        yield self._chunk(index, {}, finish=_finish_reason(answer)) | {"querybridge": extras_of([answer])}

    def closing(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """What ends a stream: the count of tokens, if it was asked for."""
        if self._with_usage:
            yield self._object("chat.completion.chunk", []) | {"usage": usage_of(answers)}

    def _new_tokens(self, index: int, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        new = chances[self._told.get(index, 0) :]
        self._told[index] = self._told.get(index, 0) + len(new)
        return self._log_probs(new) if new else None

    def _log_probs(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        return None if self._tell_tokens is None else {"content": self._tell_tokens(chances), "refusal": None}

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, told: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}  # OpenAI's, until the last chunk
        return self._object("chat.completion.chunk", [choice]) | usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def tokens_told(tokenizer: Any) -> Told:
    """Tokens' probabilities in OpenAI's words, with a tokenizer's texts for them.

    A token that is part of a character has no bytes of its own here: its text is the replacement character.
    """

    def named(token: int, log_prob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        told = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "logprob": log_prob, "bytes": told}

    def told(chances: Sequence[TokenChance]) -> list[dict[str, Any]]:
        return [
            named(one.token, one.log_prob) | {"top_logprobs": [named(*other) for other in one.likeliest]}
            for one in chances
        ]

    return told


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """How many tokens were read and written; a prompt that several answers share counts once."""
    read, written = answers[0].prompt_tokens, sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def extras_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """What is known of answers beyond OpenAI's fields; of several, of each."""
    each = [
        {"confidence": answer.confidence} | ({} if answer.choices is None else {"choices": answer.choices})
        for answer in answers
    ]
    return each[0] if len(each) == 1 else {**each[0], "answers": each}


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.finish == "length" else "stop"
