"""A request followed from an event loop: the engine's thread wakes the loop, and no thread waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from serve.api.errors import ApiError
from serve.engine.pending import Answer, PendingAnswer, TokenChance
from serve.engine.writing import chances_of


@dataclass(frozen=True)
class PartialAnswer:
    """What is written so far and won't be taken back.

    Attributes:
        text: of the answer.
        rationale: of the reasons; None if there are none.
        chances: of the answer's tokens, if they were asked for.
    """

    text: str
    rationale: str | None = None
    chances: tuple[TokenChance, ...] = ()


class Progress:
    """What becomes of a request, for one client, in one stage or in two.

    Args:
        pending: what was asked.
        deadline: of all of it, in the loop's time.
        too_late: the error of an answer that is not there by then.
        conclude: asks for the answer, given what the request was answered: the reasons; None if that is the answer.
    """

    def __init__(
        self,
        pending: PendingAnswer,
        *,
        deadline: float,
        too_late: Callable[[], ApiError],
        conclude: Callable[[str], Awaitable[PendingAnswer]] | None = None,
    ) -> None:
        self.began = time.monotonic()
        self.first: float | None = None  # when the first text, or an end, was there
        self._deadline = deadline
        self._too_late = too_late
        self._conclude = conclude
        self._answer: Answer | None = None
        self._ended_by: ApiError | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._follow(pending)

    async def written(self) -> AsyncIterator[PartialAnswer]:
        """What is written, each time there may be more of it; at the end, all of it.

        Raises:
            ApiError: the answer did not come in time, or something else ended it.
            Exception: what went wrong in answering.
        """
        thought: Answer | None = None
        if self._conclude is not None:
            async for text in self._texts():
                yield PartialAnswer("", text)
            thought = self._pending.result()
            yield PartialAnswer("", thought.text)
            self._go_on()
            async with self._in_time():
                self._follow(await self._conclude(thought.text))
        rationale = None if thought is None else thought.text
        async for text in self._texts():
            yield PartialAnswer(_settled(text, self._pending.stops), rationale, chances_of(self._pending))
        self._answer = self._whole(self._pending.result(), thought)
        yield PartialAnswer(self._answer.text, rationale, self._answer.chances)

    async def answer(self) -> Answer:
        """The answer, once it is there; raises as `written`."""
        async for _ in self.written():
            pass
        return self.result()

    @property
    def is_answered(self) -> bool:
        """Whether there is a result that was passed on, or is being passed on."""
        return self._answer is not None

    def result(self) -> Answer:
        """The answer, once its end was passed on; of two stages, with the reasons and the tokens of both."""
        assert self._answer is not None
        return self._answer

    def stop(self) -> None:
        """Have the engine work no more on it."""
        self._pending.stop()

    def end(self, error: ApiError) -> None:
        """Raise an error for whoever follows; called from the loop."""
        self._ended_by = error
        self._changed.set()

    def _follow(self, pending: PendingAnswer) -> None:
        self._pending = pending
        pending.watch(self._wake)

    async def _texts(self) -> AsyncIterator[str]:
        """The request's whole text so far, each time it has grown, until its answer is there."""
        seen = ""
        while True:
            self._changed.clear()
            self._go_on()
            if self._pending.done:
                self._pending.result()  # raises what went wrong
                return
            text = self._pending.text
            if text != seen:
                seen = text
                yield text
            async with self._in_time():
                await self._changed.wait()

    def _go_on(self) -> None:
        if self._ended_by is not None:
            raise self._ended_by

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            raise self._too_late() from None

    def _whole(self, answer: Answer, thought: Answer | None) -> Answer:
        if thought is None:
            return answer
        tokens, read = thought.tokens + answer.tokens, thought.prompt_tokens + answer.prompt_tokens
        return replace(answer, rationale=thought.text, tokens=tokens, prompt_tokens=read)

    def _wake(self) -> None:
        if self.first is None:
            self.first = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody follows any more
            self._loop.call_soon_threadsafe(self._changed.set)


async def all_written(followed: Sequence[Progress]) -> AsyncIterator[tuple[int, PartialAnswer]]:
    """What is written of several answers, as it comes, each with its place; raises as `Progress.written`."""
    streams = [progress.written() for progress in followed]
    waiting = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                place = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    yield place, task.result()
                    waiting[asyncio.ensure_future(anext(streams[place]))] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _settled(text: str, stops: Sequence[str]) -> str:
    """A text without an end that might yet become a stop string, since what was sent cannot be taken back."""
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held].rstrip() if held else text
