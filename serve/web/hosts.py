"""By which names a server on this machine answers, so that no page of the web can reach it under a name of its own.

Such a page can point its name at 127.0.0.1 and have the browser talk to the server as if it were part of that page (DNS
rebinding).
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


def host_name(headers: Headers) -> str:
    """The name, in lower case and without a port, that a request calls the server by."""
    host = headers.get("host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class OwnNamesOnly:
    """Refuses requests that call the server by a name that is not this machine's own.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] in ("http", "websocket") and (name := host_name(Headers(scope=scope))) not in LOOPBACK_NAMES:
            text = f"this page is not called '{name}'; open it by its address, or start it with --auth\n"
            await PlainTextResponse(text, 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)
