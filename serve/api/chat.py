"""A chat request from its body to its response: pictures read, the engine asked, the answer sent whole or in chunks."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from serve.api.progress import PartialAnswer, Progress
from serve.api.schemas import ChatRequest, Reply, parse_request
from serve.engine import Engine
from serve.limits import Limits
from serve.pending import Answer, Busy, PendingAnswer

LOG = logging.getLogger("querybridge.http")
_PREPARERS = 2  # threads that read bodies and tokenise; more would only get in the engine's way

T = TypeVar("T")


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
        self._taken = 0
        self._followed: set[Progress] = set()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request, so that no more bodies are in memory than can be answered or wait.

        Raises:
            ApiError: all are taken.
        """
        if self.is_closing:
            raise closing()
        if self._taken >= self.engine.max_waiting + self.engine.max_batch:
            raise too_busy(f"{self._taken} requests are being handled already; try again in a moment")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

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
                    progress, reply, stream = await self._begin(body, deadline)
            except TimeoutError:
                raise self._too_late() from None
            del body  # it may be large, and the answer may take its time
            self._followed.add(progress)
            if stream:
                return await self._stream(progress, reply)
            try:
                answer = await progress.answer()
            finally:
                self._leave(progress)
        self._count(answer, progress)
        return JSONResponse(reply.whole(answer))

    def close(self) -> None:
        """End what is still under way, each with an error of its own."""
        self.is_closing = True
        for progress in list(self._followed):
            progress.end(closing())

    def shut(self) -> None:
        """Let go of the threads, once the server has ended."""
        self._preparers.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, body: bytes | bytearray, deadline: float) -> tuple[Progress, Reply, bool]:
        """Ask what a body asks; what becomes of it, the form of its answer, and whether to stream it."""
        request = await self._in_thread(lambda: parse_request(body))
        model = self._model(request)
        pictures = await self._pictures(request)
        plan = plan_of(request, self.engine, pictures, model=model, max_tokens=self.limits.max_tokens)
        progress = Progress(
            await self._ask(plan.begin),
            deadline=deadline,
            too_late=self._too_late,
            conclude=None if plan.conclude is None else self._asking(plan.conclude),
        )
        reply = Reply(model, with_reasons=bool(request.reason), with_usage=request.wants_usage)
        return progress, reply, bool(request.stream)

    def _model(self, request: ChatRequest) -> str:
        model = request.model or self.engine.names[0]
        if model not in self.engine.names:
            raise ApiError(
                404, f"The model '{model}' does not exist; take one of {', '.join(self.engine.names)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return model

    async def _pictures(self, request: ChatRequest) -> list[ImageRef]:
        urls = request.image_urls
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
        return await asyncio.get_running_loop().run_in_executor(self._preparers, work)

    async def _stream(self, progress: Progress, reply: Reply) -> Response:
        """A stream; what goes wrong before its first text is reported by the status instead."""
        written = progress.written()
        try:
            first = await anext(written)
        except BaseException:
            self._leave(progress)
            raise
        return _EventStream(self._events(progress, reply, first, written), on_end=lambda: self._leave(progress))

    async def _events(
        self, progress: Progress, reply: Reply, first: PartialAnswer, rest: AsyncIterator[PartialAnswer]
    ) -> AsyncIterator[str]:
        try:
            with _mistakes_of_users():
                yield _event(reply.opening())
                async for written in _begun(first, rest):
                    for chunk in reply.deltas(written.text, written.rationale):
                        yield _event(chunk)
                answer = progress.result()
                self._count(answer, progress)
                for chunk in reply.closing(answer):
                    yield _event(chunk)
                yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        except Exception:
            LOG.exception("a stream broke off")
            yield _event(fault().body)

    def _leave(self, progress: Progress) -> None:
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


async def _begun(first: PartialAnswer, rest: AsyncIterator[PartialAnswer]) -> AsyncIterator[PartialAnswer]:
    yield first
    async for written in rest:
        yield written


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
