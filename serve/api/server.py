"""The API's server: an address of this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import sys

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qformer.errors import UserError

_GRACE = 5.0  # seconds that requests have to end by themselves once the server is asked to
HEADER_PATIENCE = 10.0  # seconds for all headers of a request
_KEEP_ALIVE = 75  # seconds; longer than clients keep a connection, so that none is closed under a request


class Listener:
    """An address, taken before the models are loaded so that a mistake is reported at once.

    Args:
        host: a name or address of this machine.
        port: 0 takes a free one.

    Raises:
        UserError: the host is not this machine's, or the port is taken.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (socket.gaierror, UnicodeError):
            raise UserError(f"--host {host}: no such name or address; take 127.0.0.1") from None
        self.socket = socket.socket(family, kind, protocol)
        try:
            # a server that was closed just now is not in the way
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(address)
            self.socket.listen(2048)
        except OSError as error:
            self.socket.close()
            raise UserError(_cannot_listen(error, host, port)) from None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.socket.getsockname()[0].partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.socket.getsockname()[1]}"


def serve(app: FastAPI, listener: Listener) -> None:
    """Serve an app of `serve.api.app` until Ctrl-C; what is under way then has a few seconds to end.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the server is closed by then.
    """
    try:
        make_server(app, listener).run(sockets=[listener.socket])
    finally:
        app.state.chat.shut()
        listener.socket.close()


def make_server(app: FastAPI, listener: Listener) -> uvicorn.Server:
    """The server of `serve`, not running yet."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(_GRACE) + 2,
    )
    return _Server(config, listener.url)


class _Protocol(H11Protocol):
    """HTTP/1.1, with an end to the patience with headers that do not come."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Count the seconds from the first byte of a request's headers until all of them are there."""
        waits_for_headers = self.conn.their_state is h11.IDLE
        if not waits_for_headers:
            self._unwatch()
        elif self._late is None and (self.cycle is None or self.conn.trailing_data[0]):
            self._late = self.loop.call_later(HEADER_PATIENCE, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """Says where it is, and on its end gives those who wait an answer."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"querybridge: the API is at {self.url}/v1 (Ctrl-C ends it)", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(_GRACE, self.config.app.state.chat.close)  # type: ignore[union-attr]
        await super().shutdown(sockets)
        ending.cancel()


def _cannot_listen(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: this machine has no such address; take 127.0.0.1, or one of its own"
    if isinstance(error, PermissionError):
        return f"--port {port}: the system does not give it to this user; take one above 1023"
    return f"--port {port}: something else listens there already; take another, or --port 0 for any free one"
