"""A request on its way through the engine, and what it is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from adapters.inference.request import Request
from qformer.continuous import AnswerRow
from qformer.decoding import Decoding
from qformer.token_rules import TokenRules
from serve.adapter import LoadedAdapter

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""Who asks, in words of whoever lets them in: the engine gives each of them a turn. All are one if it is not set."""


@dataclass(frozen=True)
class TokenChance:
    """A token of an answer.

    Attributes:
        token: its id.
        log_prob: under the model, before penalties and temperature.
        likeliest: ids and log-probabilities of the likeliest tokens in its place.
    """

    token: int
    log_prob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the engine answered.

    Attributes:
        text: in words.
        adapter: the name of the adapter that answered.
        finish: "stop" came to its end; "length" reached its longest; "stopped" was stopped by the one who asked.
        confidence: the geometric mean of its tokens' probabilities or, of a choice, its probability among the choices;
            None if nothing was written.
        tokens: written, the end token included.
        prompt_tokens: read, the pictures' included.
        choices: each choice's probability, the likeliest first, if there were any.
        rationale: the reasons that it was made from, in an answer of two stages; its tokens are then those of both.
        chances: of each token that was written, if the request asked for them.
    """

    text: str
    adapter: str
    finish: Literal["stop", "length", "stopped"]
    confidence: float | None
    tokens: int
    prompt_tokens: int
    choices: dict[str, float] | None = None
    rationale: str | None = None
    chances: tuple[TokenChance, ...] = ()


class Busy(Exception):
    """The queue is full: try again later."""


class PendingAnswer:
    """A request on its way: iterate to read along, or wait for `result`.

    Args:
        adapter: which one answers.
        asked: the prompt.
        decoding: how tokens are chosen.
        choices: what the answer must be one of; () leaves it open.
        worded: what the model would write for each of them, such as its letter; None for the choices themselves.
        rules: what is asked of its tokens besides.

    Attributes:
        client: who asks, as `CLIENT` says.
        row: the answer while the engine writes it; None before, and if it is not written token by token.
    """

    def __init__(
        self,
        adapter: LoadedAdapter,
        asked: Request,
        decoding: Decoding,
        choices: tuple[str, ...] = (),
        worded: tuple[str, ...] | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        self.adapter = adapter
        self.asked = asked
        self.decoding = decoding
        self.choices = choices
        self.worded = choices if worded is None else worded
        self.stops: tuple[str, ...] = ()
        self.rules = rules or TokenRules()
        self.client = CLIENT.get()
        self.row: AnswerRow | None = None
        self._changed = threading.Condition()
        self._text = ""
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._on_change: Callable[[], None] | None = None

    @property
    def text(self) -> str:
        """What is written so far; of an answer that has come, all of it."""
        return self._text

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._answer is not None or self._error is not None

    @property
    def stopped(self) -> bool:
        """Whether the one who asked does not want more."""
        return self._stopped

    def stop(self) -> None:
        """End it after the token that is being written; the result holds what was written until then."""
        self._stopped = True

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call something each time there is more text or an end, for callers that must not wait; at once if it is done.

        Args:
            on_change: called in the engine's thread, so it returns at once and raises nothing.
        """
        with self._changed:
            self._on_change = on_change
            if self.done:
                on_change()

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer.

        Raises:
            TimeoutError: it took longer than `timeout` seconds; the request is stopped then.
            Exception: what went wrong in answering.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                self.stop()
                raise TimeoutError(f"no answer within {timeout:g} s")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def wait(self, seconds: float) -> bool:
        """Wait for an end, so many seconds at most; whether there is one."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, seconds)

    def __iter__(self) -> Iterator[str]:
        """The whole text so far, each time it has grown; ends with the answer's text.

        Raises:
            Exception: what went wrong in answering.
        """
        return self.texts()

    def texts(self, every: float | None = None) -> Iterator[str]:
        """As iterating; if the text has not grown for so many seconds, it comes again, even if it is empty."""
        seen: str | None = None
        while True:
            with self._changed:
                grew = self._changed.wait_for(
                    lambda known=seen: self.done or (self._text not in ("", known)),  # type: ignore[misc]
                    every,
                )
                text, done = self._text, self.done
            if self._error is not None:
                raise self._error
            if not grew or (text and text != seen):
                seen = text
                yield text
            if done:
                return

    def _update(self, text: str) -> None:
        with self._changed:
            self._text = text
            self._notify()

    def _finish(self, answer: Answer) -> None:
        with self._changed:
            self._text, self._answer = answer.text, answer
            self._notify()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if not self.done:  # one that was answered before its batch failed keeps its answer
                self._error = error
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._on_change is not None:
            self._on_change()
