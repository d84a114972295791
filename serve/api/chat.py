"""A chat request from its body to its response: pictures read, the engine asked, the answer sent whole or in chunks."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters.data.image_ref import ImageRef, image_ref
from qformer.errors import UserError
from serve.api.errors import ApiError, closing, fault, too_busy, too_slow
from serve.api.image_fetch import ImageFetcher
from serve.api.metrics import Metrics
from serve.api.plan import plan_of
from serve.api.progress import PartialAnswer, Progress, all_written
from serve.api.replies import Reply, tokens_told
from serve.api.schemas import parse_request
from serve.engine.engine import Engine
from serve.engine.pending import Answer, Busy, PendingAnswer
from serve.limits import Limits

LOG = logging.getLogger("querybridge.http")
SLOWEST = 1024  # bytes a second of a body that is still waited for
_HURRY = 0.5  # seconds after which a slow body gives its place up to who needs it
_PREPARERS = 2  # threads that read bodies and tokenise; more would only get in the engine's way

T = TypeVar("T")


class Place:
    """One request that is being handled, and how fast its body comes.

    Args:
        client: who asks.
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self.came = 0  # bytes of its body
        self.is_reading = False
        self._began = time.monotonic()
        self._reader: asyncio.Task[Any] | None = None
        self.given_up = False

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.came / max(time.monotonic() - self._began, 1e-3)

    def is_slow(self, *, after: float) -> bool:
        """Whether its body has been coming for so many seconds, and slower than any honest client's."""
        return self.is_reading and time.monotonic() - self._began > after and self.rate < SLOWEST

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While its body comes.

        Raises:
            TimeoutError: it was given up.
        """
        self.is_reading, self._reader = True, asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self.given_up and self._reader is not None:
                self._reader.uncancel()
                raise TimeoutError from None
            raise
        finally:
            self.is_reading = False

    def give_up(self) -> None:
        """Wait no longer for its body."""
        self.given_up = True
        if self._reader is not None:
            self._reader.cancel()


class ChatService:
    """Answers chat requests with an engine.

    Args:
        engine: what answers.
        limits: what a request may ask for.
        metrics: where answers are counted.
        allow_remote_images: fetch pictures from web addresses, those of a request within `limits.max_body` together.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, *, allow_remote_images: bool = False) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.allow_remote_images = allow_remote_images
        self.is_closing = False
        self._preparers = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="querybridge-http")
        self._places: set[Place] = set()
        self._followed: set[Progress] = set()

    @contextmanager
    def place(self, client: str = "") -> Iterator[Place]:
        """A place for one request, so that no more bodies are in memory than can be answered or wait.

        If all are taken, one whose body trickles in gives its place up.

        Args:
            client: who asks; each has `limits.max_per_client` places at most.

        Raises:
            ApiError: all are taken.
        """
        if self.is_closing:
            raise closing()
        most = self.limits.max_per_client
        if most is not None and sum(place.client == client for place in self._places) >= most:
            raise too_busy(f"{most} of your requests are being handled already; wait for one of them")
        if len(self._places) >= self.engine.max_waiting + self.engine.max_batch and not self._free_a_place():
            raise too_busy(f"{len(self._places)} requests are being handled already; try again in a moment")
        place = Place(client)
        self._places.add(place)
        try:
            yield place
        finally:
            self._places.discard(place)

    def _free_a_place(self) -> bool:
        """Have the body that comes the slowest be given up; whether there is one that is slow."""
        slow = [place for place in self._places if place.is_slow(after=_HURRY)]
        if not slow:
            return False
        slowest = min(slow, key=lambda place: place.rate)
        slowest.give_up()
        self._places.discard(slowest)
        return True

    async def respond(self, body: bytes | bytearray, deadline: float) -> Response:
        """Answer the body of a request.

        Args:
            body: as it came.
            deadline: in the loop's time.

        Raises:
            ApiError: it is wrong, or it cannot be answered now or in time.
            Exception: what went wrong in answering.
        """
        with _mistakes_of_users():
            try:
                async with asyncio.timeout_at(deadline):
                    followed, reply, stream = await self._begin(body, deadline)
            except TimeoutError:
                raise self._too_late() from None
            del body  # it may be large, and the answer may take its time
            self._followed.update(followed)
            if stream:
                return await self._stream(followed, reply)
            try:
                answers = await _gathered(followed)
            finally:
                self._leave(followed)
        for answer, progress in zip(answers, followed, strict=True):
            self._count(answer, progress)
        return JSONResponse(reply.whole(answers))

    def close(self) -> None:
        """End what is still under way, each with an error of its own."""
        self.is_closing = True
        for progress in list(self._followed):
            progress.end(closing())

    def shut(self) -> None:
        """Let go of the threads, once the server has ended."""
        self._preparers.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, body: bytes | bytearray, deadline: float) -> tuple[list[Progress], Reply, bool]:
        """Ask what a body asks; what becomes of each answer, the form of the reply, and whether to stream it."""
        request = await self._in_thread(lambda: parse_request(body))
        model = self.model(request.model)
        pictures = await self.pictures(request.image_urls)
        plan = await self._in_thread(
            lambda: plan_of(request, self.engine, pictures, model=model, max_tokens=self.limits.max_tokens)
        )
        asked: list[PendingAnswer] = []
        try:
            for begin in plan.begin:
                asked.append(await self._ask(begin))
        except BaseException:
            for pending in asked:
                pending.stop()
            raise
        conclude = None if plan.conclude is None else self._asking(plan.conclude)
        followed = [
            Progress(pending, deadline=deadline, too_late=self._too_late, conclude=conclude) for pending in asked
        ]
        tell = None
        if request.logprobs:
            tell = tokens_told(self.engine.adapter(model).assembly.prompts.tokenizer)
        reply = Reply(model, with_reasons=bool(request.reason), with_usage=request.wants_usage, tell_tokens=tell)
        return followed, reply, bool(request.stream)

    def model(self, named: str | None) -> str:
        """The name of the adapter that answers; the first if none is named.

        Raises:
            ApiError: there is no such adapter.
        """
        model = named or self.engine.names[0]
        if model not in self.engine.names:
            raise ApiError(
                404, f"The model '{model}' does not exist; take one of {', '.join(self.engine.names)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return model

    async def pictures(self, urls: Sequence[tuple[str, str]]) -> list[ImageRef]:
        """Pictures by their addresses, each with where it is named, for people.

        Raises:
            UserError: there are too many, or one cannot be had.
        """
        if len(urls) > self.limits.max_images:
            raise UserError(f"messages: {len(urls)} pictures, and --max-images is {self.limits.max_images}")
        fetcher = ImageFetcher(self.limits.max_body) if self.allow_remote_images else None
        return [await self._picture(url, where, fetcher) for where, url in urls]

    async def _picture(self, url: str, where: str, fetcher: ImageFetcher | None) -> ImageRef:
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return await self._in_thread(lambda: image_ref("data:" + url[5:], where=where))
        if not scheme.startswith(("http://", "https://")):  # above all no path of this machine
            raise UserError(f"{where}: image_url.url is no data URI; write data:image/png;base64,…")
        if fetcher is None:
            raise UserError(
                f"{where}: web addresses of pictures are off here; send a data URI (data:image/png;base64,…), or start"
                " the server with --allow-remote-images"
            )
        return await fetcher.fetch(url, where=where)

    def _asking(self, conclude: Callable[[str], PendingAnswer]) -> Callable[[str], Awaitable[PendingAnswer]]:
        return lambda rationale: self._ask(partial(conclude, rationale))

    async def _ask(self, submit: Callable[[], PendingAnswer]) -> PendingAnswer:
        """Hand a request to the engine; if the client leaves before that, the request is cancelled."""
        asking = asyncio.ensure_future(self._in_thread(submit))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(_stop_what_came)
            raise

    async def _in_thread(self, work: Callable[[], T]) -> T:
        context = copy_context()  # which says who asks
        return await asyncio.get_running_loop().run_in_executor(self._preparers, lambda: context.run(work))

    async def _stream(self, followed: Sequence[Progress], reply: Reply) -> Response:
        """A stream; what goes wrong before its first text is reported by the status instead."""
        written = all_written(followed)
        try:
            first = await anext(written)
        except BaseException:
            self._leave(followed)
            raise
        return _EventStream(self._events(followed, reply, first, written), on_end=lambda: self._leave(followed))

    async def _events(
        self,
        followed: Sequence[Progress],
        reply: Reply,
        first: tuple[int, PartialAnswer],
        rest: AsyncIterator[tuple[int, PartialAnswer]],
    ) -> AsyncIterator[str]:
        ended: set[int] = set()
        try:
            with _mistakes_of_users():
                for index in range(len(followed)):
                    yield _event(reply.opening(index))
                async for index, written in _begun(first, rest):
                    for chunk in reply.deltas(index, written.text, written.rationale, written.chances):
                        yield _event(chunk)
                    if followed[index].is_answered and index not in ended:
                        ended.add(index)
                        self._count(followed[index].result(), followed[index])
                        for chunk in reply.end(index, followed[index].result()):
                            yield _event(chunk)
                for chunk in reply.closing([progress.result() for progress in followed]):
                    yield _event(chunk)
                yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        except Exception:
            LOG.exception("a stream broke off")
            yield _event(fault().body)

    def _leave(self, followed: Sequence[Progress]) -> None:
        for progress in followed:
            self._followed.discard(progress)
            progress.stop()

    def _count(self, answer: Answer, progress: Progress) -> None:
        now = time.monotonic()
        first = progress.first if progress.first is not None else now
        self.metrics.answered(answer, first=first - progress.began, whole=now - progress.began)

    def _too_late(self) -> ApiError:
        return too_slow(self.limits.request_timeout)


class _EventStream(StreamingResponse):
    """Server-sent events; however it ends, what it was about is let go of."""

    def __init__(self, events: AsyncIterator[str], *, on_end: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


@contextmanager
def _mistakes_of_users() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from error
    except Busy as error:
        raise too_busy(str(error)) from error


def _stop_what_came(asking: asyncio.Future[PendingAnswer]) -> None:
    if not asking.cancelled() and asking.exception() is None:
        asking.result().stop()


async def _gathered(followed: Sequence[Progress]) -> list[Answer]:
    """The answers, once all are there; the first error, if there is one."""
    async for _ in all_written(followed):
        pass
    return [progress.result() for progress in followed]


async def _begun(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for written in rest:
        yield written


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
