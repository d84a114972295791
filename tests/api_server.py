"""A server of the API in a thread, and an engine whose answers come when a test says so."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI

from adapters.data.prompts import Turn
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.api.app import build_app
from serve.api.server import Listener, make_server
from serve.engine.engine import Engine
from serve.engine.pending import Answer, Busy, PendingAnswer

CHAT = "/v1/chat/completions"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def data_uri(picture: Path | bytes) -> str:
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(picture: Path | bytes | str) -> dict[str, Any]:
    """A part of a message that is a picture: a file, its bytes, or an address."""
    return {"type": "image_url", "image_url": {"url": picture if isinstance(picture, str) else data_uri(picture)}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it did not come about"
        time.sleep(0.01)


class FakeEngine:
    """Takes questions as the real one does, and answers when told to."""

    names = ("first", "second")

    def __init__(self, max_waiting: int = 64, max_batch: int = 16) -> None:
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self.pending: list[PendingAnswer] = []
        self.turns: list[Sequence[Turn]] = []

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def capabilities(self, name: str) -> dict[str, object]:
        return {"pictures": True}

    @property
    def waiting(self) -> int:
        return sum(not pending.done for pending in self.pending)

    def chat(
        self,
        turns: Sequence[Turn],
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        stops: Sequence[str] = (),
        rules: Any = None,
    ) -> PendingAnswer:
        if turns[-1].role != "user":
            raise UserError("messages: the last one must be the user's")
        pending = self._take(SimpleNamespace(images=()), adapter, decoding)
        pending.stops = tuple(stops)
        pending.rules = rules or pending.rules
        self.turns.append(turns)
        return pending

    def asked(self, count: int = 1) -> PendingAnswer:
        """The request of the request that came as the `count`th."""
        eventually(lambda: len(self.pending) >= count)
        return self.pending[count - 1]

    def _take(
        self,
        asked: Any,
        adapter: str | None,
        decoding: Decoding | None,
        choices: Sequence[str] = (),
        *,
        admitted: bool = False,
    ) -> PendingAnswer:
        if self.waiting >= self.max_waiting and not admitted:
            raise Busy(f"{self.max_waiting} requests wait already; try again in a moment")
        pending = PendingAnswer(SimpleNamespace(name=adapter), asked, decoding or Decoding(), tuple(choices))  # type: ignore[arg-type]
        self.pending.append(pending)
        return pending


def finish(pending: PendingAnswer, text: str = "red", **changes: Any) -> None:
    values: dict[str, Any] = {"finish": "stop", "confidence": 0.5, "tokens": 2, "prompt_tokens": 7} | changes
    pending._finish(Answer(text, pending.adapter.name, **values))


@contextmanager
def served(engine: Engine | FakeEngine, **options: Any) -> Iterator[str]:
    """The address of a server over an engine."""
    app = build_app(engine, **options)  # type: ignore[arg-type]
    listener = Listener("127.0.0.1", 0)
    server = make_server(app, listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.socket]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield listener.url
    finally:
        server.should_exit = True
        thread.join(30)
        app.state.chat.shut()
    assert not thread.is_alive()


def openai_client(url: str, **options: Any) -> OpenAI:
    """The official client, past any proxy that the environment may name."""
    values: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
    return OpenAI(base_url=f"{url}/v1", http_client=DefaultHttpxClient(trust_env=False), **values)


def http(url: str, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=60, **options)


def body(**changes: Any) -> dict[str, Any]:
    """A request that `served` over a FakeEngine takes."""
    return {"model": "first", "messages": [user("what is it?")]} | changes


def post(url: str, values: Any = None, **options: Any) -> httpx.Response:
    with http(url) as client:
        return client.post(CHAT, **({"json": values if values is not None else body()} | options))


def half_a_request(url: str, header: bytes = b"", rest: bytes = b'{"messages"') -> socket.socket:
    """A connection over which a request has begun: without a header of its own, one whose body ends with `rest`."""
    host, port = url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=30)
    length = len(rest) if rest.endswith(b"}") else 100
    lines = (b"POST /v1/chat/completions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json")
    line.sendall(b"\r\n".join((*lines, header or b"Content-Length: %d" % length, b"", rest)))
    return line


def error_of(reply: httpx.Response) -> dict[str, Any]:
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    return dict(reply.json()["error"])


def figures(url: str) -> dict[str, float]:
    with http(url) as client:
        reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
