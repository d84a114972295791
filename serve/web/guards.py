"""What keeps pages of the web and strangers from using a server of this machine as if it were theirs.

Middlewares of both servers, the API's and the page's: no request from another origin, no frame around what is shown,
wrong passwords one after the other and not all at once, and no more uploads than there is room for.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FREE_FAILURES = 5  # of an address, before it has to wait
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 5.0  # seconds
_FORGIVEN = 120.0  # seconds after the last failure
_AT_A_TIME = 8  # of an address that wait
_ADDRESSES = 10_000  # that are remembered


def is_own_origin(headers: Headers, allowed: Sequence[str] = ()) -> bool:
    """Whether a request comes from no page, from one of this server's own, or from an origin that is allowed."""
    origin = headers.get("origin")
    if origin is None or origin in allowed:
        return True
    return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""


class OwnOriginOnly:
    """Refuses requests that a page of another origin sends; a browser says where a page is from.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = Headers(scope=scope)
            if not is_own_origin(headers):
                text = f"requests from {headers['origin']} are not taken; open this page itself\n"
                await PlainTextResponse(text, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class NoFraming:
    """Forbids other pages to show this one in a frame, and browsers to guess at types.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with the headers that say so."""

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Frame-Options", "DENY")
                headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        await self.app(scope, receive, framed if scope["type"] == "http" else send)


class Failures:
    """Wrong keys or passwords of each address: after a few, each further try takes longer.

    Args:
        now: seconds; of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: dict[str, tuple[int, float]] = {}  # failures, and when the last one was
        self._waiting: Counter[str] = Counter()

    def are_too_many(self, address: str) -> bool:
        """Whether so many tries of an address wait that no other is looked at, right or wrong."""
        return self._waiting[address] >= _AT_A_TIME

    def note(self, address: str) -> float:
        """Note a failure; the seconds until it may be told."""
        count, last = self._known.pop(address, (0, 0.0))
        count = 1 if self._now() - last > _FORGIVEN else count + 1
        if len(self._known) >= _ADDRESSES:
            del self._known[next(iter(self._known))]
        self._known[address] = (count, self._now())
        beyond = count - _FREE_FAILURES
        return 0.0 if beyond <= 0 else min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(beyond - 1, 10))

    async def wait(self, address: str) -> None:
        """Note a failure, and wait as long as it has to."""
        seconds = self.note(address)
        if seconds:
            self._waiting[address] += 1
            try:
                await asyncio.sleep(seconds)
            finally:
                self._waiting[address] -= 1


class SlowedLogin:
    """Slows wrong passwords down, at the path that takes them.

    Args:
        app: what answers; a status of 400 or 401 there is a wrong password.
        path: where passwords are sent.
    """

    def __init__(self, app: ASGIApp, path: str = "/login") -> None:
        self.app = app
        self.path = path
        self.failures = Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; a wrong password is told later each time."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != self.path:
            await self.app(scope, receive, send)
            return
        address = address_of(scope)
        if self.failures.are_too_many(address):
            await PlainTextResponse("too many tries; wait a moment\n", 429, {"Retry-After": "5"})(scope, receive, send)
            return

        async def slowed(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 401, 403):
                await self.failures.wait(address)
            await send(message)

        await self.app(scope, receive, slowed)


class BoundedUploads:
    """Refuses uploads once the folder of them holds as much as it may, after old ones have been swept away.

    Args:
        app: what answers.
        folder: where uploads lie; None while there is none.
        most: bytes of all of them.
        oldest: seconds that an upload may lie there unused if room is needed.
        path: where files are sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        folder: Callable[[], Path | None],
        most: int,
        oldest: float,
        path: str = "/gradio_api/upload",
    ) -> None:
        self.app = app
        self.folder, self.most, self.oldest, self.path = folder, most, oldest, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/") == self.path:
            folder = self.folder()
            if folder is not None and not await asyncio.to_thread(make_room, folder, self.most, self.oldest):
                text = "there is no room for more uploads now; try again later\n"
                await PlainTextResponse(text, 507)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def make_room(folder: Path, most: int, oldest: float) -> bool:
    """Whether a folder holds less than it may; old files are deleted, the oldest first, until it does.

    Args:
        folder: of uploads.
        most: bytes.
        oldest: seconds since its last change from which on a file may go.
    """
    found: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*"):
        try:
            status = path.stat()
        except OSError:  # gone meanwhile
            continue
        if path.is_file():
            found.append((status.st_mtime, status.st_size, path))
    held = sum(size for _, size, _ in found)
    for changed, size, path in sorted(found):
        if held < most or time.time() - changed < oldest:
            break
        path.unlink(missing_ok=True)
        held -= size
    return held < most


def address_of(scope: Scope) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return str(client[0]) if client else ""
