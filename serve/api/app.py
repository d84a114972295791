"""The API: OpenAI's chat completions and embeddings over an engine, with the adapters as models.

POST /v1/chat/completions    POST /v1/embeddings    GET /v1/models    GET /v1/models/NAME
GET /health    GET /metrics    GET /openapi.json    GET /docs
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.access_log import HEADER, RequestIds
from serve.api.chat import SLOWEST, ChatService, Place
from serve.api.description import description_page, openapi
from serve.api.embeddings import Embedder, embed_with
from serve.api.errors import ApiError, closing, fault
from serve.api.metrics import MEDIA_TYPE, Metrics
from serve.engine.engine import Engine
from serve.engine.pending import CLIENT
from serve.limits import Limits
from serve.web.guards import Failures, NoFraming, address_of, is_own_origin
from serve.web.hosts import LOOPBACK_NAMES, host_name

BODY_PATIENCE = 10.0  # seconds that a body may come slowly, or not at all
_GONE = 499  # what other servers log if a client did not wait for its answer


def build_app(
    engine: Engine,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    allow_remote_images: bool = False,
    hosts: frozenset[str] | None = LOOPBACK_NAMES,
    cors_origins: Sequence[str] = (),
    log_requests: bool = False,
) -> FastAPI:
    """The API over an engine, not served yet; `app.state.chat` is its ChatService.

    Args:
        engine: what answers; who made it closes it.
        limits: what a request may ask for.
        api_key: what clients must send, but for /health; None lets everyone ask.
        allow_remote_images: fetch pictures from public web addresses.
        hosts: the names by which a server without a key may be called, so that no page of the web can reach it under
            a name of its own; None allows all.
        cors_origins: the origins of pages of the web that may ask; all others are refused.
        log_requests: write a line of JSON for each request on standard error.
    """
    limits = limits or Limits()
    metrics = Metrics(lambda: engine.waiting)
    chat = ChatService(engine, limits, metrics, allow_remote_images=allow_remote_images)
    began = int(time.time())

    embedder = Embedder(engine)
    failures = Failures()

    def named(request: Request) -> None:
        if not is_own_origin(request.headers, cors_origins):
            raise ApiError(403, f"pages of {request.headers['origin']} may not ask here; see --cors-origin")
        if api_key is None and hosts is not None and (name := host_name(request.headers)) not in hosts:
            raise ApiError(403, f"this server is not called '{name}'; use its address, or set an API key")

    async def allowed(request: Request) -> None:
        named(request)
        if api_key is not None:
            await _check_key(request, api_key, failures)

    # Their pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="querybridge", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.chat = chat
    app.add_middleware(_Measured, metrics=metrics)
    app.add_middleware(NoFraming)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", "x-stainless-*"], expose_headers=[HEADER],
        )  # fmt: skip
    app.add_middleware(RequestIds, log=log_requests)
    app.add_exception_handler(ApiError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(Exception, _error_response)
    guarded: Mapping[str, Any] = {"dependencies": [Depends(allowed)]}
    told: Mapping[str, Any] = {"dependencies": [Depends(named)]}

    async def answered(
        request: Request, answer: Callable[[bytearray, float], Coroutine[Any, Any, Response]]
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + limits.request_timeout
        CLIENT.set(address_of(request.scope))
        with chat.place(CLIENT.get()) as place:
            try:
                body = await _body(request, limits, deadline, place)
                return await _unless_gone(request, answer(body, deadline))
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except asyncio.CancelledError:
                if chat.is_closing:
                    raise closing() from None
                raise

    @app.post("/v1/chat/completions", **guarded)
    async def complete(request: Request) -> Response:
        return await answered(request, chat.respond)

    @app.post("/v1/embeddings", **guarded)
    async def embeddings(request: Request) -> Response:
        return await answered(request, partial(embed_with, chat, embedder))

    @app.get("/v1/models", **guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(engine, name, began) for name in engine.names]}

    @app.get("/v1/models/{name:path}", **guarded)
    async def model(name: str) -> dict[str, Any]:
        if name not in engine.names:
            raise ApiError(404, f"The model '{name}' does not exist", param="model", code="model_not_found")
        return _model(engine, name, began)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": version("querybridge"), "adapters": engine.names}

    @app.get("/openapi.json", **told)
    async def described() -> dict[str, Any]:
        return openapi(key_needed=api_key is not None)

    @app.get("/docs", **told)
    async def page() -> Response:
        return description_page()

    @app.get("/metrics", **guarded)
    async def figures() -> Response:
        return Response(metrics.page(), media_type=MEDIA_TYPE)

    return app


def _model(engine: Engine, name: str, created: int) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": created, "owned_by": "querybridge"}
    return model | {"querybridge": engine.capabilities(name)}


async def _check_key(request: Request, api_key: str, failures: Failures) -> None:
    address = address_of(request.scope)
    if failures.are_too_many(address):
        raise ApiError(429, "too many wrong API keys; wait a moment", code="rate_limit_exceeded",
                       headers={"Retry-After": "5", "Connection": "close"})  # fmt: skip
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes that were read as Latin-1.
    same = secrets.compare_digest(given.strip().encode("latin-1"), api_key.encode())
    if scheme.lower() != "bearer" or not same:
        if given:
            await failures.wait(address)
        problem = "the API key is wrong" if given else "an API key is needed"
        raise ApiError(
            401, f"{problem}; send the header 'Authorization: Bearer KEY'", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


async def _body(request: Request, limits: Limits, deadline: float, place: Place) -> bytearray:
    """A request's body, up to the limit.

    Raises:
        ApiError: it is not JSON by its header, too large, or does not come in time.
        ClientDisconnect: it does not come at all.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of the web cannot send this kind elsewhere unasked
        raise ApiError(415, f"the content type is '{kind}'; send the header 'Content-Type: application/json'")
    too_large = ApiError(
        413,
        f"the body is larger than {limits.max_body / 2**20:.3g} MiB (--max-body): send smaller or fewer pictures",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > 2 * limits.max_body:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout_at(deadline):
            async for piece in _steadily(request, place):
                size += len(piece)
                if size <= limits.max_body:
                    body += piece
                else:  # read on for a while, since most clients listen only once they have spoken
                    body.clear()
                    if size > 2 * limits.max_body:
                        break
    except TimeoutError:
        late = f"the body did not come within {limits.request_timeout:g} s, or slower than {SLOWEST} bytes a second"
        raise ApiError(408, late, headers={"Connection": "close"}) from None
    if size > limits.max_body:
        raise too_large
    return body


async def _steadily(request: Request, place: Place) -> AsyncIterator[bytes]:
    """The pieces of a body.

    Raises:
        TimeoutError: they come too slowly.
    """
    pieces = request.stream()
    with place.reading():
        while True:
            try:
                async with asyncio.timeout(BODY_PATIENCE):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                return
            place.came += len(piece)
            if place.is_slow(after=BODY_PATIENCE):
                raise TimeoutError
            yield piece


async def _unless_gone(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Answer, unless the client leaves before that."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.create_task(answering), asyncio.create_task(leave())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=_GONE)
    finally:
        gone.cancel()
        answer.cancel()


async def _error_response(_: Request, error: Exception) -> Response:
    """Any error as OpenAI's error object."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{error.detail}: see docs/serving.md", headers=error.headers)
    answer = error if isinstance(error, ApiError) else fault()
    return JSONResponse(answer.body, answer.status, headers=answer.headers)


class _Measured:
    """Counts requests, by route and by what became of them.

    Args:
        app: what handles them.
        metrics: where they are counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, is_whole = 500, False

        async def noting(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole |= message["type"] == "http.response.body" and not message.get("more_body", False)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, noting)
            finally:
                endpoint = getattr(scope.get("route"), "path", "other")
                if status == 200 and not is_whole:  # a stream that nobody reads any more
                    status = _GONE
                self.metrics.requests.labels(endpoint, str(status)).inc()
