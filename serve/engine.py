"""The engine behind the page, the API and the command: several adapters over frozen models that are loaded once.

One thread works for all who ask. It gathers what arrives together into batches, and each answer can be read along.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from adapters.data.images import open_image
from adapters.data.prompts import Turn
from adapters.inference.answering import Completion, Request
from adapters.loading.vision_side import FrozenModels
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import ImageInput, LoadedAdapter, checked_choices, load_adapter, ranked, short_name
from serve.pending import Answer, Busy, PendingAnswer

T = TypeVar("T")

_GATHER = 0.01  # seconds that a first request waits for company


class Engine:
    """Several adapters over frozen models that are loaded once; one thread works for all who ask.

    Requests that arrive together, or while others are being answered, are answered in one batch, each as it would be
    alone. Every method may be called from any thread.

    Args:
        adapters: loaded ones, or names as `load_adapter` takes them; the default first. None is the shipped default.
        device: "cpu", "cuda", …; a GPU if there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        max_batch: requests answered together.
        max_waiting: requests that may wait; the next one is refused.

    Raises:
        UserError: there is no such adapter, it does not fit its frozen models, or two have the same name.
    """

    def __init__(
        self,
        adapters: Sequence[LoadedAdapter | str | Path | None] = (None,),
        *,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool = False,
        max_batch: int = 16,
        max_waiting: int = 64,
    ) -> None:
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self._adapters: dict[str, LoadedAdapter] = {}
        frozen = FrozenModels()
        for named in adapters:
            loaded = (
                named
                if isinstance(named, LoadedAdapter)
                else load_adapter(named, device=device, dtype=dtype, offline=offline, frozen=frozen)
            )
            name = short_name(loaded.name)
            if name in self._adapters:
                raise UserError(f"--adapter {loaded.name}: another is called '{name}' too; rename one of the folders")
            self._adapters[name] = LoadedAdapter(loaded.assembly, loaded.facts, name)
        self._waiting: deque[PendingAnswer | _Job] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="querybridge-engine", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, the default first."""
        return list(self._adapters)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def adapter(self, name: str | None = None) -> LoadedAdapter:
        """A loaded adapter; the default if no name is given.

        Raises:
            UserError: none of that name is loaded.
        """
        if name is None:
            return next(iter(self._adapters.values()))
        if name not in self._adapters:
            raise UserError(f"adapter '{name}': not loaded; take one of {', '.join(self._adapters)}")
        return self._adapters[name]

    def chat(
        self,
        turns: Sequence[Turn],
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        stops: Sequence[str] = (),
    ) -> PendingAnswer:
        """Go on with a conversation; one user's turn is a plain question.

        Args:
            turns: the last is the user's; pictures belong to the turns they were shown in.
            adapter: which one answers; the default if left out.
            decoding: how tokens are chosen; greedy if left out.
            stops: the answer ends before any of these strings.

        Raises:
            UserError: the conversation cannot be put to the model.
            Busy: too many wait.
        """
        loaded = self.adapter(adapter)
        pending = _pending_answer(loaded, loaded.chat_request(turns), decoding or Decoding())
        pending.stops = tuple(stops)
        return self._submit(pending)

    def caption(
        self,
        picture: ImageInput,
        *,
        language: str = "en",
        adapter: str | None = None,
        decoding: Decoding | None = None,
    ) -> PendingAnswer:
        """Describe a picture; raises as `chat`."""
        loaded = self.adapter(adapter)
        return self._submit(
            _pending_answer(loaded, loaded.caption_request(picture, language), decoding or Decoding.preset("caption"))
        )

    def choose(self, turns: Sequence[Turn], choices: Sequence[str], *, adapter: str | None = None) -> PendingAnswer:
        """Answer with one of the choices; raises as `chat`, and if there are fewer than two choices."""
        loaded = self.adapter(adapter)
        return self._submit(PendingAnswer(loaded, loaded.chat_request(turns), Decoding(), checked_choices(choices)))

    def submit(
        self,
        asked: Request,
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        choices: Sequence[str] = (),
        admitted: bool = False,
    ) -> PendingAnswer:
        """Answer a prompt that is made already; raises as `chat`.

        Args:
            asked: the prompt, with its pictures.
            adapter: which one answers; the default if left out.
            decoding: how tokens are chosen; greedy if left out.
            choices: one of these is the answer, which the prompt lists; none leaves it open.
            admitted: it goes on with what was let in before, and is not refused half way, however many wait.
        """
        loaded = self.adapter(adapter)
        if choices:
            worded = tuple(loaded.assembly.prompts.choice(choice, choices) for choice in choices)
            return self._submit(
                PendingAnswer(loaded, loaded.check_length(asked), Decoding(), tuple(choices), worded), admitted
            )
        return self._submit(_pending_answer(loaded, loaded.check_length(asked), decoding or Decoding()), admitted)

    def run(
        self, job: Callable[[LoadedAdapter], T], *, adapter: str | None = None, admitted: bool = False
    ) -> Future[T]:
        """Have the engine's thread do something else with an adapter's models, in its turn.

        Args:
            job: what is done.
            adapter: with which models; the default's if left out.
            admitted: as in `submit`.

        Raises:
            Busy: too many wait.
        """
        waiting = _Job(self.adapter(adapter), job)
        self._submit(waiting, admitted)
        return waiting.future

    def close(self) -> None:
        """End the thread; what waits fails."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, request: _Request, admitted: bool = False) -> _Request:
        with self._arrived:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self.max_waiting:
                self._drop_stopped()
            if len(self._waiting) >= self.max_waiting and not admitted:
                raise Busy(f"{self.max_waiting} requests wait already; try again in a moment")
            self._waiting.append(request)
            self._arrived.notify_all()
        return request

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    for request in self._waiting:
                        request._fail(RuntimeError("the engine was closed"))
                    return
            time.sleep(_GATHER)
            chosen: _Job | list[PendingAnswer] = []
            try:
                with self._arrived:
                    chosen = self._next()
                if isinstance(chosen, _Job):
                    chosen.do()
                else:
                    _answer(chosen)
            except BaseException as error:
                for request in [chosen] if isinstance(chosen, _Job) else chosen:
                    request._fail(error)

    def _next(self) -> _Job | list[PendingAnswer]:
        """The oldest request and those answered with it, taken off the queue; none if all were stopped."""
        self._drop_stopped()
        if not self._waiting:
            return []
        first = self._waiting.popleft()
        if isinstance(first, _Job):
            return first
        chosen = [first]
        for request in list(self._waiting):
            if len(chosen) == self.max_batch or not isinstance(request, PendingAnswer):
                continue
            if _batch_key(request) == _batch_key(first) and _have_room([*chosen, request]):
                chosen.append(request)
                self._waiting.remove(request)
        return chosen

    def _drop_stopped(self) -> None:
        """Take those off the queue that nobody waits for any more."""
        for request in [one for one in self._waiting if isinstance(one, PendingAnswer) and one.stopped]:
            self._waiting.remove(request)
            length = len(request.asked.prompt.ids)
            request._finish(Answer("", request.adapter.name, "stopped", None, 0, length))


class _Job:
    """Something else that is done in the engine's thread."""

    def __init__(self, adapter: LoadedAdapter, job: Callable[[LoadedAdapter], Any]) -> None:
        self.adapter = adapter
        self.job = job
        self.future: Future[Any] = Future()

    def do(self) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(self.job(self.adapter))

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


_Request = TypeVar("_Request", PendingAnswer, _Job)


def _pending_answer(adapter: LoadedAdapter, asked: Request, decoding: Decoding) -> PendingAnswer:
    return PendingAnswer(adapter, asked, adapter.fit_decoding(asked, decoding))


def _batch_key(pending: PendingAnswer) -> tuple[object, ...]:
    """Pending answers with equal keys are generated together: lengths may differ, unless beams are searched."""
    decoding = pending.decoding if pending.decoding.num_beams > 1 else replace(pending.decoding, max_new_tokens=1)
    return (id(pending.adapter), decoding, bool(pending.choices))


def _have_room(pending_answers: Sequence[PendingAnswer]) -> bool:
    """Whether every prompt could be followed by the longest of the answers: a row that is done is still counted on."""
    longest = pending_answers[0].adapter.context_length
    prompt = max(len(pending.asked.prompt.ids) for pending in pending_answers)
    return longest is None or prompt + max(pending.decoding.max_new_tokens for pending in pending_answers) <= longest


def _answer(pending_answers: Sequence[PendingAnswer]) -> None:
    """Answer requests that belong together."""
    if not pending_answers:
        return
    adapter = pending_answers[0].adapter
    readable = _those_that_can_be_read(pending_answers)
    if not readable:
        return

    def stopped() -> bool:
        return all(pending.stopped for pending in readable)

    if pending_answers[0].choices:
        found = adapter.generator.choose(
            [pending.asked for pending in readable], [pending.worded for pending in readable], stopped=stopped
        )
        for pending, each in zip(readable, found, strict=True):
            shares = ranked(pending.choices, each)
            best = next(iter(shares))
            finish: Literal["stop", "stopped"] = "stopped" if pending.stopped else "stop"
            length = len(pending.asked.prompt.ids)
            pending._finish(Answer(best, adapter.name, finish, shares[best], 0, length, shares))
        return

    def on_step(said: list[Completion]) -> list[bool]:
        return [_pass_on(pending, one) for pending, one in zip(readable, said, strict=True)]

    decoding = replace(
        pending_answers[0].decoding, max_new_tokens=max(pending.decoding.max_new_tokens for pending in readable)
    )
    said = adapter.generator([pending.asked for pending in readable], decoding, on_step=on_step, stopped=stopped)
    for pending, one in zip(readable, said, strict=True):
        if not pending.done:
            _finish(pending, one)


def _those_that_can_be_read(pending_answers: Sequence[PendingAnswer]) -> list[PendingAnswer]:
    """Pending answers whose pictures open; the others fail alone, not their company with them."""
    good = []
    for pending in pending_answers:
        try:
            if len(pending_answers) > 1 and not pending.adapter.generator.knows(pending.asked):
                for image in pending.asked.images:
                    open_image(image)
            good.append(pending)
        except UserError as error:
            pending._fail(error)
    return good


def _pass_on(pending: PendingAnswer, said: Completion) -> bool:
    """Pass on to a request what was written; whether that is enough."""
    if pending.done:
        return True
    cut = _cut(said.text, pending.stops)
    enough = said.ended or cut is not None or pending.stopped or said.tokens >= pending.decoding.max_new_tokens
    if enough:
        _finish(pending, said)
    else:
        pending._update(said.text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character may want more tokens
    return enough


def _finish(pending: PendingAnswer, said: Completion) -> None:
    cut = _cut(said.text, pending.stops)
    finish: Literal["stop", "length", "stopped"] = (
        "stop" if said.ended or cut is not None else "stopped" if pending.stopped else "length"
    )
    text = said.text if cut is None else cut
    length = len(pending.asked.prompt.ids)
    pending._finish(Answer(text, pending.adapter.name, finish, said.confidence, said.tokens, length))


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stops; None if none is in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].rstrip() if places else None
