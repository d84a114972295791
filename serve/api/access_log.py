"""One line of JSON for each request, on standard error; and each request's id, which its response carries too."""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_FIT = re.compile(r"[A-Za-z0-9._-]{1,64}")  # an id that a client or a proxy may choose: it goes into a log


class RequestIds:
    """Gives each request an id, its client's own if it is fit, and tells of each that has ended.

    Args:
        app: what answers.
        log: write the lines; without, requests have their ids alone.
    """

    def __init__(self, app: ASGIApp, *, log: bool = False) -> None:
        self.app = app
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if _FIT.fullmatch(given) else uuid.uuid4().hex
        began, status, sent = time.monotonic(), 0, 0

        async def noting(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            if self.log:
                client = scope.get("client")
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "id": name,
                    "client": client[0] if client else None,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status or 499,
                    "seconds": round(time.monotonic() - began, 3),
                    "bytes": sent,
                }
                print(json.dumps(line), file=sys.stderr, flush=True)
