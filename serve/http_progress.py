"""A ticket followed from an event loop: the engine's thread wakes the loop, and no thread waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from serve.http_errors import ApiError
from serve.tickets import Answer, Ticket


class Progress:
    """What becomes of a ticket, for one client.

    Args:
        ticket: what was asked.
        deadline: in the loop's time.
        too_late: the error of an answer that is not there by then.
    """

    def __init__(self, ticket: Ticket, *, deadline: float, too_late: Callable[[], ApiError]) -> None:
        self.ticket = ticket
        self.began = time.monotonic()
        self.first: float | None = None  # when the first text, or an end, was there
        self._deadline = deadline
        self._too_late = too_late
        self._ended_by: ApiError | None = None
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        ticket.watch(self._told)

    async def texts(self) -> AsyncIterator[str]:
        """The whole text so far, each time it has grown, until the answer is there.

        Raises:
            ApiError: the answer did not come in time, or something else ended it.
            Exception: what went wrong in answering.
        """
        seen = ""
        while True:
            self._changed.clear()
            if self._ended_by is not None:
                raise self._ended_by
            if self.ticket.done:
                self.ticket.result()  # raises what went wrong
                return
            text = self.ticket.text
            if text != seen:
                seen = text
                yield text
            try:
                async with asyncio.timeout_at(self._deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self._too_late() from None

    async def answer(self) -> Answer:
        """The answer, once it is there; raises as `texts`."""
        async for _ in self.texts():
            pass
        return self.ticket.result()

    def end(self, error: ApiError) -> None:
        """Have whoever follows be told of an error; called from the loop."""
        self._ended_by = error
        self._changed.set()

    def _told(self) -> None:
        if self.first is None:
            self.first = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody follows any more
            self._loop.call_soon_threadsafe(self._changed.set)
