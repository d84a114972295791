"""A page served for a test, and how the tests of the page talk to it past all proxies."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from serve.page.app import launch

COLOURS = {"red": (220, 20, 60), "green": (46, 139, 87), "blue": (65, 105, 225)}


def draw_data(folder: Path) -> Path:
    """Two questions about each of three pictures, the first the same for all; and two files that are no pictures."""
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
        rows += [
            {"image": f"{name}.png", "question": text} for text in ("what colour is it?", f"is it shape {number}?")
        ]
    (folder / "shapes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "text.jpg").write_text("not a picture", encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    return folder


@contextmanager
def served(engine: Any, uploads: Path, **options: Any) -> Iterator[str]:
    """The address of a page over an engine; uploads lie in a folder of the test's own."""
    before = os.environ.copy()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    page = launch(engine, port=0, block=False, **{"votes": uploads.parent / "votes.jsonl", **options})
    try:
        yield page.local_url
    finally:
        page.close(verbose=False)
        os.environ.clear()
        os.environ.update(before)


def opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> str:
    with opener().open(url) as reply:
        return reply.read().decode()


def post(address: str, name: str, data: list[Any]) -> str:
    """All events of a call to a named endpoint, as they come over the line."""
    call = urllib.request.Request(
        f"{address}gradio_api/call/{name}", json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with opener().open(call) as reply:
        event = json.load(reply)["event_id"]
    return get(f"{address}gradio_api/call/{name}/{event}")


def call(address: str, number: int, event_data: Any, data: list[Any]) -> str:
    """All messages about an event that says of itself what was selected."""
    session = f"forged{number}{time.monotonic_ns()}"
    body = {"data": data, "fn_index": number, "session_hash": session, "event_data": event_data}
    asked = urllib.request.Request(
        f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        opener().open(asked).close()
        return get(f"{address}gradio_api/queue/data?session_hash={session}")
    except urllib.error.HTTPError as error:
        return error.read().decode()
