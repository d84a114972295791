"""Who waits for the engine, and who is next: each client in turn, and of one client the oldest request first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from serve.adapter import LoadedAdapter
from serve.engine.pending import CLIENT, PendingAnswer
from serve.engine.writing import batch_key, fit_together, is_brief


class Job:
    """Something else that is done in the engine's thread.

    Args:
        adapter: with whose models.
        job: what is done.
    """

    def __init__(self, adapter: LoadedAdapter, job: Callable[[LoadedAdapter], Any]) -> None:
        self.adapter = adapter
        self.job = job
        self.client = CLIENT.get()
        self.future: Future[Any] = Future()

    def do(self) -> None:
        """Do it; what goes wrong is for whoever waits for it."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.job(self.adapter))
            except BaseException as error:
                self.future.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


Waiting = TypeVar("Waiting", PendingAnswer, Job)


class Queue:
    """The requests that wait; whoever uses it holds the engine's lock."""

    def __init__(self) -> None:
        self._waiting: list[PendingAnswer | Job] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: PendingAnswer | Job) -> None:
        """Have a request wait."""
        self._waiting.append(request)

    def ahead_of(self, request: PendingAnswer) -> int:
        """How many came before a request and wait still; 0 if it does not wait."""
        return self._waiting.index(request) if request in self._waiting else 0

    def take_all(self) -> list[PendingAnswer | Job]:
        """Take all off the queue."""
        taken, self._waiting = self._waiting, []
        return taken

    def take_stopped(self) -> list[PendingAnswer]:
        """Take those off the queue that nobody waits for any more."""
        stopped = [one for one in self._waiting if isinstance(one, PendingAnswer) and one.stopped]
        for one in stopped:
            self._waiting.remove(one)
        return stopped

    def next_brief(self, served: Sequence[str], *, room: int) -> list[PendingAnswer]:
        """Take off the queue those that are begun next in one short pass; none if there are none, or no room for them.

        Args:
            served: the clients of the answers that are being written.
            room: for so many more of them.
        """
        chosen: list[PendingAnswer] = []
        for one in self._in_turn(served):
            if isinstance(one, PendingAnswer) and is_brief(one) and (one.choices or room > 0):
                self._add(chosen, one, room)
        return chosen

    @property
    def has_brief(self) -> bool:
        """Whether one waits that could be begun in a short pass."""
        return any(isinstance(one, PendingAnswer) and is_brief(one) for one in self._waiting)

    def next_long(self, served: Sequence[str], *, room: int) -> list[PendingAnswer] | Job:
        """Take the work off the queue that is next of what takes longer; an empty list if there is none.

        Args:
            served: as in `next_brief`.
            room: for answers that are generated together.
        """
        chosen: list[PendingAnswer] = []
        for one in self._in_turn(served):
            if isinstance(one, PendingAnswer):
                if not is_brief(one) and len(served) < 2 * room:  # each may leave a row that is written
                    self._add(chosen, one, room)
            elif not chosen:
                self._waiting.remove(one)
                return one
        return chosen

    def _add(self, chosen: list[PendingAnswer], one: PendingAnswer, room: int) -> None:
        if (not chosen or batch_key(chosen[0]) == batch_key(one)) and fit_together([*chosen, one], most=room):
            chosen.append(one)
            self._waiting.remove(one)

    def _in_turn(self, served: Sequence[str]) -> Iterator[PendingAnswer | Job]:
        """Those that wait: the fewer are served of a client, or stand before it in the line, the sooner."""
        count = Counter(served)
        ranked = []
        for one in self._waiting:
            ranked.append((count[one.client], one))
            count[one.client] += 1
        yield from (one for _, one in sorted(ranked, key=lambda pair: pair[0]))
