"""A chat request from its body to its response: pictures read, the engine asked, the answer told whole or in chunks."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters.data.images import ImageRef, image_ref
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine import Engine
from serve.http_errors import ApiError, closing, fault, too_busy, too_slow
from serve.http_fetch import PictureFetcher
from serve.http_messages import ChatRequest, Reply, parse_request, turns_of
from serve.http_metrics import Metrics
from serve.http_progress import Progress
from serve.loaded import checked_choices
from serve.tickets import Answer, Busy, Ticket

LOG = logging.getLogger("querybridge.http")
_PREPARERS = 2  # threads that read bodies and tokenise; more would only stand in the engine's way

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        request_timeout: seconds for a whole request, its waiting included.
        max_body: bytes of a request's body; of a picture fetched from elsewhere too.
        max_images: pictures of one request.
        max_tokens: the longest answer; what is given to who asks for more, or names no number.
    """

    request_timeout: float = 120.0
    max_body: int = 20 * 2**20
    max_images: int = 8
    max_tokens: int = 512


class ChatService:
    """Answers chat requests with an engine.

    Args:
        engine: what answers.
        limits: what a request may ask for.
        metrics: where answers are counted.
        fetcher: of pictures from web addresses; None refuses them.
    """

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, fetcher: PictureFetcher | None = None) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.fetcher = fetcher
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
                    ticket, stream, wants_usage = await self._begin(body)
            except TimeoutError:
                raise self._too_late() from None
            del body  # it may be large, and the answer may take its time
            progress = Progress(ticket, deadline=deadline, too_late=self._too_late)
            self._followed.add(progress)
            if stream:
                return await self._stream(progress, wants_usage)
            try:
                answer = await progress.answer()
            finally:
                self._leave(progress)
        self._count(answer, progress)
        return JSONResponse(Reply(answer.adapter).whole(answer))

    def close(self) -> None:
        """End what is still under way, each with an error of its own."""
        self.is_closing = True
        for progress in list(self._followed):
            progress.end(closing())

    def shut(self) -> None:
        """Let go of the threads, once the server has ended."""
        self._preparers.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, body: bytes | bytearray) -> tuple[Ticket, bool, bool]:
        """Ask what a body asks; the ticket, whether to stream it, and whether with a count of tokens."""
        request = await self._in_thread(lambda: parse_request(body))
        model = self._model(request)
        pictures = await self._pictures(request)
        ticket = await self._ask(request, model, pictures)
        return ticket, bool(request.stream), request.wants_usage

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
        return [await self._picture(url, where) for where, url in urls]

    async def _picture(self, url: str, where: str) -> ImageRef:
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return await self._in_thread(lambda: image_ref("data:" + url[5:], where=where))
        if not scheme.startswith(("http://", "https://")):  # above all no path of this machine
            raise UserError(f"{where}: image_url.url is no data URI; write data:image/png;base64,…")
        if self.fetcher is None:
            raise UserError(
                f"{where}: web addresses of pictures are off here; send a data URI (data:image/png;base64,…), or start"
                " the server with --allow-remote-images"
            )
        return await self.fetcher.fetch(url, where=where)

    async def _ask(self, request: ChatRequest, model: str, pictures: list[ImageRef]) -> Ticket:
        """Hand the request to the engine; who leaves meanwhile leaves no work behind."""
        asking = asyncio.ensure_future(self._in_thread(lambda: self._submit(request, model, pictures)))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(_stop_what_came)
            raise

    def _submit(self, request: ChatRequest, model: str, pictures: list[ImageRef]) -> Ticket:
        turns = turns_of(request.messages, pictures)
        if request.answer_choices is not None:
            try:
                choices = checked_choices(request.answer_choices, where="answer_choices")
            except UserError as error:
                raise ApiError(400, str(error), param="answer_choices") from error
            return self.engine.choose(turns, choices, adapter=model)
        asked_for = request.max_completion_tokens or request.max_tokens or self.limits.max_tokens
        decoding = Decoding(
            max_new_tokens=min(asked_for, self.limits.max_tokens),
            temperature=request.temperature or 0.0,
            top_p=request.top_p or 1.0,
        )
        return self.engine.chat(turns, adapter=model, decoding=decoding, stops=request.stop or ())

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._preparers, work)

    async def _stream(self, progress: Progress, wants_usage: bool) -> Response:
        """A stream; what goes wrong before its first text is told by the status instead."""
        texts = progress.texts()
        try:
            first = await anext(texts, None)
        except BaseException:
            self._leave(progress)
            raise
        return _EventStream(self._events(progress, wants_usage, first, texts), on_end=lambda: self._leave(progress))

    async def _events(
        self, progress: Progress, wants_usage: bool, first: str | None, texts: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        reply = Reply(progress.ticket.adapter.name)
        usage: dict[str, Any] = {"usage": None} if wants_usage else {}  # OpenAI's, until the last chunk
        sent = ""
        try:
            yield _event(usage | reply.opening())
            async for text in _begun(first, texts):
                if new := _rest(_settled(text, progress.ticket.stops), sent):
                    yield _event(usage | reply.delta(new))
                    sent += new
            answer = progress.ticket.result()
            self._count(answer, progress)
            if new := _rest(answer.text, sent):
                yield _event(usage | reply.delta(new))
            for chunk in reply.closing(answer, with_usage=wants_usage):
                yield _event(usage | chunk)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        except Exception:
            LOG.exception("a stream broke off")
            yield _event(fault().body)

    def _leave(self, progress: Progress) -> None:
        self._followed.discard(progress)
        progress.ticket.stop()

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


def _stop_what_came(asking: asyncio.Future[Ticket]) -> None:
    if not asking.cancelled() and asking.exception() is None:
        asking.result().stop()


async def _begun(first: str | None, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    if first is not None:
        yield first
    async for text in rest:
        yield text


def _settled(text: str, stops: Sequence[str]) -> str:
    """A text without an end that might yet become a stop string, since what was sent cannot be taken back."""
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held].rstrip() if held else text


def _rest(text: str, sent: str) -> str:
    """What is new in a text."""
    return text[len(sent) :] if text.startswith(sent) else ""


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
