"""The guard around pictures from elsewhere: what it does not reach, how much it reads, how long it waits."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from api_server import PNG, FakeEngine, finish, http, said, served, shown, user

from qformer.errors import UserError
from serve.api import image_fetch as http_fetch
from serve.api.image_fetch import ImageFetcher, is_public

Request = list[tuple[str, str]]


class Elsewhere(BaseHTTPRequestHandler):
    """A web server that behaves as its path says."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Request] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"]))
        what, _, rest = self.path[1:].partition("/")
        self.close_connection = True
        if what == "to":
            self.reply(302, b"", Location=rest)
        elif what == "round":
            self.reply(302, b"", Location=f"/round/{int(rest) - 1}" if int(rest) else "/picture")
        elif what == "slow":
            time.sleep(0.2)
            self.reply(200, PNG)
        elif what == "missing":
            self.reply(404, b"nothing here")
        elif what == "empty":
            self.reply(200, b"")
        elif what == "zipped":
            self.reply(200, gzip.compress(bytes(10**6)), **{"Content-Encoding": "gzip"})
        elif what == "announced":
            self.reply(200, b"", **{"Content-Length": str(10**9)})
        elif what in ("endless", "dripping"):
            self.send_response(200)
            self.end_headers()
            piece, pause = (b"x" * 65536, 0.0) if what == "endless" else (b"x", 0.05)
            try:
                while True:
                    self.wfile.write(piece)
                    time.sleep(pause)
            except OSError:
                self.asked.append((self.path, "left"))
        else:
            self.reply(200, PNG)

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a server on 127.0.0.1."""
    Elsewhere.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count 127.0.0.1 as public, and nothing else."""
    monkeypatch.setattr(http_fetch, "is_public", lambda address: address == "127.0.0.1")


def fetch(address: str, max_bytes: int = 10**6) -> bytes:
    found = asyncio.run(ImageFetcher(max_bytes).fetch(address, where="message 1"))
    assert found.data is not None
    return found.data


def refusal(address: str, max_bytes: int = 10**6) -> str:
    with pytest.raises(UserError) as caught:
        fetch(address, max_bytes)
    return str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "192.0.0.192",
        "100.100.100.200", "168.63.129.16", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::", "::1",
        "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1", "::ffff:127.0.0.1",
        "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::",
        "2001:0:7f00:1::", "5f00::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_the_public_internets(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "64:ff9b::808:808"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "0"],
)
def test_this_machine_is_not_reached_however_it_is_written(port: int, host: str) -> None:
    assert "cannot be fetched" in refusal(f"http://{host}:{port}/picture")
    assert Elsewhere.asked == []


def test_a_name_that_is_public_and_private_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, "both.example", ["93.184.216.34", "127.0.0.1"], [])

    assert "is not on the public internet" in refusal(f"http://both.example:{port}/picture")
    assert Elsewhere.asked == []


def point(monkeypatch: pytest.MonkeyPatch, name: str, addresses: list[str], asked: list[str]) -> None:
    """Have a name mean addresses, once; after that it means one that nothing may be sent to."""

    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        assert host == name
        meant = addresses if len(asked) == 1 else ["127.0.0.99"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in meant]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)


def test_the_checked_address_is_the_one_that_is_reached(
    port: int, reachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved: list[str] = []
    point(monkeypatch, "pictures.example", ["127.0.0.1"], resolved)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy would look the name up by itself

    assert fetch(f"http://pictures.example:{port}/picture") == PNG
    assert resolved == ["pictures.example"]
    assert Elsewhere.asked == [("/picture", f"pictures.example:{port}")]


def test_the_next_address_is_tried(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetch, "is_public", lambda address: address.startswith("127.0.0."))
    point(monkeypatch, "pictures.example", ["127.0.0.3", "127.0.0.1"], [])  # nothing listens at the first

    assert fetch(f"http://pictures.example:{port}/picture") == PNG


def test_a_silent_address_leaves_time_for_the_next(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetch, "is_public", lambda address: address.startswith("127.0.0."))
    monkeypatch.setattr(http_fetch, "CONNECT_SECONDS", 0.2)
    point(monkeypatch, "pictures.example", ["127.0.0.3", "127.0.0.1"], [])
    with ExitStack() as sockets:
        full = sockets.enter_context(socket.create_server(("127.0.0.3", port), backlog=0))
        for _ in range(4):  # those who wait in front of it; who comes now gets no answer
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())

        assert fetch(f"http://pictures.example:{port}/picture") == PNG


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate with")
def test_the_certificate_must_be_the_names(tmp_path: Path, reachable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.example",
         "-addext", "subjectAltName=DNS:pictures.example", *files],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
    monkeypatch.setattr(http_fetch, "_certificates", http_fetch._certificates.__wrapped__)  # read anew
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        port = server.server_address[1]
        try:
            point(monkeypatch, "pictures.example", ["127.0.0.1"], [])
            assert fetch(f"https://pictures.example:{port}/picture") == PNG
            point(monkeypatch, "other.example", ["127.0.0.1"], [])
            assert "CERTIFICATE_VERIFY_FAILED" in refusal(f"https://other.example:{port}/picture")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("http://127.0.0.2:1/", "is not on the public internet"),
        ("http://169.254.169.254/latest/meta-data", "is not on the public internet"),
        ("//127.0.0.2/", "is not on the public internet"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("http://user:word@127.0.0.1/", "a user's name"),
    ],
)
def test_a_redirect_is_checked_as_the_first_address_is(port: int, reachable: None, target: str, says: str) -> None:
    assert says in refusal(f"http://127.0.0.1:{port}/to/{target}")
    assert len(Elsewhere.asked) == 1


def test_redirects_are_followed_and_have_an_end(port: int, reachable: None) -> None:
    assert fetch(f"http://127.0.0.1:{port}/round/2") == PNG
    assert "more than 3 redirects" in refusal(f"http://127.0.0.1:{port}/round/9")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing", "status 404"),
        ("empty", "it is empty"),
        ("zipped", "compressed"),
        ("announced", "may be 0.0954 MiB together"),
        ("endless", "may be 0.0954 MiB together"),
    ],
)
def test_what_is_no_picture_or_too_much_is_told(port: int, reachable: None, path: str, says: str) -> None:
    told = refusal(f"http://127.0.0.1:{port}/{path}", max_bytes=100_000)

    assert told.startswith(f"message 1: image 'http://127.0.0.1:{port}/{path}' cannot be fetched (")
    assert says in told


def test_a_server_that_drips_is_left(port: int, reachable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetch, "FETCH_SECONDS", 0.5)
    began = time.monotonic()

    assert "did not come within the 0.5 s" in refusal(f"http://127.0.0.1:{port}/dripping")
    assert time.monotonic() - began < 10


def test_pictures_of_a_request_share_their_bounds(port: int, reachable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch_all(paths: list[str], max_bytes: int) -> None:
        fetcher = ImageFetcher(max_bytes)
        for path in paths:
            await fetcher.fetch(f"http://127.0.0.1:{port}/{path}", where="message 1")

    asyncio.run(fetch_all(["picture"] * 3, 3 * len(PNG)))
    with pytest.raises(UserError, match="together"):
        asyncio.run(fetch_all(["picture"] * 3, 3 * len(PNG) - 1))
    monkeypatch.setattr(http_fetch, "FETCH_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"within the 0\.5 s"):
        asyncio.run(fetch_all(["slow"] * 20, 10**6))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "address", ["http://", "http:///a.png", "http://a b/", "http://\x00/", "http://[::1/", "http://x:99999/"]
)
def test_an_address_that_is_none_is_told(address: str) -> None:
    assert "cannot be fetched" in refusal(address)


def test_a_picture_from_elsewhere_reaches_the_engine(port: int, reachable: None) -> None:
    engine = FakeEngine()
    address = f"http://127.0.0.1:{port}/picture"
    asked = {"messages": [user(shown(address), said("what is it?"))]}
    with served(engine, allow_remote_images=True) as url, http(url) as client:
        answering = threading.Thread(target=lambda: finish(engine.asked()))
        answering.start()
        reply = client.post("/v1/chat/completions", json=asked)
        answering.join()
        refused = client.post(
            "/v1/chat/completions", json={"messages": [user(shown("http://10.0.0.1/a.png"), said("what is it?"))]}
        )

    assert reply.status_code == 200
    (image,) = engine.turns[0][0].images
    assert (image.data, image.label) == (PNG, address)
    assert refused.status_code == 400
    assert "is not on the public internet" in refused.json()["error"]["message"]
