"""`querybridge serve` as it is started: its address, its flags, what it says, and how Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import http, openai_client, said, shown, user
from command import FAST, Call

ROOT = Path(__file__).parents[2]
PROGRAM = "from serve.cli.command import main; main()"


@contextmanager
def running(*flags: object, program: str = PROGRAM, **environment: str) -> Iterator[tuple[Any, str]]:
    """The command in a process of its own, and its address."""
    run = subprocess.Popen(
        [sys.executable, "-c", program, "serve", "--port", "0", *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    try:
        assert run.stderr is not None
        first = run.stderr.readline()
        assert first.startswith("querybridge: the API is at http://127.0.0.1:"), first + run.stderr.read()
        assert first.endswith("/v1 (Ctrl-C ends it)\n")
        yield run, first.split()[5].removesuffix("/v1")
    finally:
        run.kill()
        run.communicate()


def test_the_command_serves_until_ctrl_c(run_folder: Path, data_file: Path) -> None:
    flags = ["--adapter", run_folder, "--max-images", 1, "--max-tokens", 3, *FAST, "--offline"]
    with running(*flags, QUERYBRIDGE_API_KEY="sesame") as (run, url):
        client = openai_client(url, api_key="sesame")
        picture = shown(data_file.parent / "1.png")
        reply = client.chat.completions.create(model="tiny", messages=[user(picture, said("what?"))])  # type: ignore[list-item]
        with pytest.raises(openai.BadRequestError, match="--max-images is 1"):
            client.chat.completions.create(model="tiny", messages=[user(picture, picture, said("what?"))])  # type: ignore[list-item]
        with pytest.raises(openai.AuthenticationError):
            openai_client(url).models.list()
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)

    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 3
    assert (run.returncode, out, err) == (130, "", "querybridge: stopped\n")


def test_who_waits_when_it_ends_is_told(run_folder: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import serve.engine.engine, serve.api.server
from api_server import FakeEngine
serve.engine.engine.Engine = lambda adapters, **_: FakeEngine()
serve.api.server._GRACE = 0.5
{PROGRAM}
"""
    asked = {"messages": [user("hm?")]}
    with running(program=program) as (run, url), ThreadPoolExecutor(2) as pool, http(url) as client:
        waiting = [
            pool.submit(client.post, "/v1/chat/completions", json=asked | {"stream": stream})
            for stream in (False, True)
        ]
        while "requests_waiting 2.0" not in client.get("/metrics").text:
            pass
        run.send_signal(signal.SIGINT)
        replies = [reply.result() for reply in waiting]
        out, err = run.communicate(timeout=60)

    assert [reply.status_code for reply in replies] == [503, 503]
    assert {reply.json()["error"]["code"] for reply in replies} == {"shutting_down"}
    assert (run.returncode, out, err) == (130, "", "querybridge: stopped\n")


def test_a_taken_port_is_told_before_anything_is_loaded(call: Call) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = call("serve", "--port", port, "--adapter", "no/such/run").mistake()

    assert told == f"--port {port}: something else listens there already; take another, or --port 0 for any free one"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: no such name or address"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: this machine has no such address"),
        (["--api-key", " "], "--api-key: it is empty"),
        (["--request-timeout", "0"], "'--request-timeout'"),
        (["--adapter", "no/such/run"], "no/such/run"),
        (["--log", "xml"], "--log xml: json is the one form"),
        (["--cors-origin", "example.org"], "--cors-origin example.org: write scheme, name and port alone"),
        (["--max-prompt", "0"], "'--max-prompt'"),
    ],
)
def test_mistakes_are_told(call: Call, flags: list[str], says: str) -> None:
    assert says in call("serve", "--port", 0, *flags).mistake()


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ([], False),
        (["--host", "localhost"], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
    ],
)
def test_an_open_door_is_warned_of(
    call: Call, run_folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], warned: bool
) -> None:
    monkeypatch.setattr("serve.api.server.serve", lambda app, listener: listener.socket.close())
    done = call("serve", "--port", 0, "--adapter", run_folder, *flags, *FAST, "--offline")

    assert done.code == 0
    warning = "querybridge: warning: with --host 0.0.0.0 and no --api-key, whoever reaches this machine can ask\n"
    assert done.err == (warning if warned else "")
