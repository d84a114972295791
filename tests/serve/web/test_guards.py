"""Slow bodies and headers, wrong keys, other origins and frames: an honest client is served meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from api_server import CHAT, FakeEngine, body, error_of, eventually, finish, half_a_request, http, post, served
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.limits import Limits
from serve.web.guards import BoundedUploads, Failures, OwnOriginOnly, SlowedLogin, make_room


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def test_eighty_slow_bodies_keep_nobody_out(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    """As many as there are places, each a byte a second."""
    over = threading.Event()
    with served(engine) as url:
        lines = [half_a_request(url, b"Content-Length: 1000", b"{") for _ in range(80)]

        def trickle() -> None:
            while not over.wait(0.3):
                for line in lines:
                    with contextlib.suppress(OSError):
                        line.sendall(b" ")

        trickling = threading.Thread(target=trickle)
        trickling.start()
        time.sleep(0.7)
        began = time.monotonic()
        reply = pool.submit(post, url)
        finish(engine.asked())
        assert reply.result().status_code == 200
        assert time.monotonic() - began < 10
        over.set()
        trickling.join()
        for line in lines:
            line.close()


def test_a_body_that_trickles_in_is_given_up(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.app.BODY_PATIENCE", 0.4)
    with served(engine) as url:
        with half_a_request(url) as silent:
            answer = silent.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408 ") and b"1024 bytes a second" in answer
        with half_a_request(url) as slow:
            for _ in range(5):
                slow.sendall(b" ")
                time.sleep(0.15)
            assert slow.makefile("rb").read().startswith(b"HTTP/1.1 408 ")


def test_headers_that_do_not_come_end_the_connection(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.server.HEADER_PATIENCE", 0.5)
    with served(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        with http(url) as client:  # a connection that is kept open is another thing
            assert client.get("/health").status_code == 200
            time.sleep(0.8)
            assert client.get("/health").status_code == 200
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
            with socket.create_connection((host, int(port)), timeout=10) as line:
                line.sendall(sent)
                began = time.monotonic()
                assert line.recv(100) == b""
                assert time.monotonic() - began < 5


def test_places_are_held_per_client(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with served(engine, limits=Limits(max_per_client=2)) as url:
        waiting = [pool.submit(post, url) for _ in range(2)]
        engine.asked(2)
        refused = post(url)
        for pending in engine.pending:
            finish(pending)
        assert [reply.result().status_code for reply in waiting] == [200, 200]
    assert refused.status_code == 429 and "2 of your requests" in error_of(refused)["message"]


def test_wrong_keys_are_told_later_and_later(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    with served(engine, api_key="open") as url, http(url) as client:

        def seconds(key: str) -> float:
            began = time.monotonic()
            client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            return time.monotonic() - began

        quick = max(seconds("closed") for _ in range(5))
        slow = [seconds("closed") for _ in range(2)]
        assert slow[0] > 0.2 and slow[1] > 0.4 and seconds("open") < max(0.2, quick)


def test_failures_are_forgiven_and_bounded() -> None:
    now = 0.0
    failures = Failures(lambda: now)
    waits = [failures.note("a") for _ in range(14)]
    assert waits[:7] == [0, 0, 0, 0, 0, 0.2, 0.4] and waits[-1] == 5.0
    assert failures.note("b") == 0.0
    now = 1000.0
    assert failures.note("a") == 0.0


def test_pages_of_other_origins_are_refused_unless_allowed(engine: FakeEngine) -> None:
    with served(engine, cors_origins=["https://friend.example"]) as url, http(url) as client:
        for origin, status in (
            ("https://evil.example", 403), ("null", 403), ("https://friend.example", 200), (url, 200),
        ):  # fmt: skip
            reply = client.get("/v1/models", headers={"origin": origin})
            assert reply.status_code == status, origin
            allowed = reply.headers.get("access-control-allow-origin")
            assert allowed == (origin if origin == "https://friend.example" else None)
        asked = {"origin": "https://friend.example", "access-control-request-method": "POST",
                 "access-control-request-headers": "content-type,authorization"}  # fmt: skip
        assert client.options(CHAT, headers=asked).status_code == 200
        assert client.options(CHAT, headers=asked | {"origin": "https://evil.example"}).status_code == 400
    assert engine.pending == []


def test_what_the_api_says_about_itself(engine: FakeEngine) -> None:
    with served(engine, api_key="k") as url, http(url) as client:
        described, page = client.get("/openapi.json"), client.get("/docs")
    fields = described.json()["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "seed", "n", "logprobs", "response_format", "regex", "choices"} <= set(fields)
    assert set(described.json()["paths"]) >= {CHAT, "/v1/embeddings", "/v1/models"}
    assert "ImageUrl" in described.json()["components"]["schemas"]
    assert described.json()["security"] == [{"key": []}]
    assert "<script" not in page.text and "http" not in page.text.replace("https://", "")
    assert "src=" not in page.text and "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"


def test_requests_have_ids_and_a_line_each(
    engine: FakeEngine, pool: ThreadPoolExecutor, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(engine, log_requests=True) as url, http(url) as client:
        named = client.get("/v1/models", headers={"x-request-id": "mine-1"})
        unfit = client.get("/nowhere", headers={"x-request-id": 'a"b {}'})
        log: list[str] = []
        eventually(lambda: log.append(capfd.readouterr().err) or "".join(log).count("}\n") >= 2)
    lines = [json.loads(line) for line in "".join(log).splitlines() if line.startswith("{")]

    assert named.headers["x-request-id"] == "mine-1"
    assert len(unfit.headers["x-request-id"]) == 32
    assert [(line["id"], line["path"], line["status"]) for line in lines] == [
        ("mine-1", "/v1/models", 200), (unfit.headers["x-request-id"], "/nowhere", 404),
    ]  # fmt: skip
    assert lines[0]["bytes"] == len(named.content) and lines[0]["client"] == "127.0.0.1"


def app(*middleware: Middleware) -> TestClient:
    async def answer(_: object) -> PlainTextResponse:
        return PlainTextResponse("no", 400)

    paths = ("/login", "/gradio_api/upload")
    routes = [Route(path, answer, methods=["POST"]) for path in paths]
    return TestClient(Starlette(routes=routes, middleware=list(middleware)), base_url="http://127.0.0.1:7860")


def test_another_page_uploads_nothing() -> None:
    client = app(Middleware(OwnOriginOnly))
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:7860", 400)):
        assert client.post("/gradio_api/upload", headers={"origin": origin}).status_code == status
    assert client.post("/gradio_api/upload").status_code == 400  # no page at all


def test_wrong_passwords_are_slowed_down() -> None:
    client = app(Middleware(SlowedLogin))
    for _ in range(5):
        client.post("/login")
    began = time.monotonic()
    client.post("/login")
    assert time.monotonic() - began > 0.19


def test_uploads_have_a_bound_and_old_ones_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "old.png", tmp_path / "new.png"
    old.parent.mkdir()
    for file in (old, new):
        file.write_bytes(b"x" * 600)
    os.utime(old, (0, 0))
    assert make_room(tmp_path, 2000, 60) and old.exists()
    assert make_room(tmp_path, 1000, 60) and not old.exists() and new.exists()
    assert not make_room(tmp_path, 500, 60) and new.exists()
    client = app(Middleware(BoundedUploads, folder=lambda: tmp_path, most=500, oldest=60))
    assert client.post("/gradio_api/upload").status_code == 507
    assert client.post("/login").status_code == 400
    assert (
        app(Middleware(BoundedUploads, folder=lambda: None, most=1, oldest=1)).post("/gradio_api/upload").status_code
        == 400
    )


def test_a_body_is_still_the_request(engine: FakeEngine, pool: ThreadPoolExecutor) -> None:
    """In two pieces, half a second apart."""
    with served(engine) as url:
        text = json.dumps(body()).encode()
        with half_a_request(url, b"Content-Length: %d" % len(text), text[:20]) as line:
            time.sleep(0.6)
            line.sendall(text[20:])
            finish(engine.asked())
            assert line.recv(20).startswith(b"HTTP/1.1 200")
