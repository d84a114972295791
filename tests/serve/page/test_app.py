"""The page's server: where it listens, what it keeps from whom, how it starts and ends, what it offers to try."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, AuthenticationError
from page_client import PageClient
from page_server import call, draw_data, get, opener, post, served
from PIL import Image

from qformer.errors import UserError
from serve.page.app import build_page, launch
from serve.page.examples import CREDITS, data_examples, find_examples

PUBLIC = {
    "/chat",
    "/retry",
    "/undo",
    "/clear",
    "/stop",
    "/vqa",
    "/caption",
    "/reason",
    "/search",
    "/look",
    "/ground",
    "/compare",
    "/batch",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(fake(folder), tmp_path_factory.mktemp("uploads")) as url:
        yield url


def fake(folder: Path) -> FakeEngine:
    return FakeEngine(FakeAdapter(make_recipe(folder), "quickstart"))


def test_every_action_has_a_named_endpoint_and_nothing_else_is_public(address: str) -> None:
    described = Client(address, verbose=False).view_api(return_format="dict")

    assert set(described["named_endpoints"]) == PUBLIC
    assert described["unnamed_endpoints"] == {}


def test_settings_have_names_and_may_be_left_out(address: str) -> None:
    described = Client(address, verbose=False).view_api(return_format="dict")["named_endpoints"]
    for name in ("/chat", "/vqa", "/caption", "/reason"):
        given = {one["parameter_name"]: one for one in described[name]["parameters"]}

        assert {"adapter", "longest", "temperature", "top_p", "beams"} <= given.keys()
        assert all(
            given[one]["parameter_has_default"] for one in ("adapter", "longest", "temperature", "top_p", "beams")
        )


def test_the_page_is_bounded_and_private(address: str, folder: Path) -> None:
    page = build_page(fake(folder))  # type: ignore[arg-type]
    asking = [fn for fn in page.fns.values() if f"/{fn.api_name}" in PUBLIC - {"/undo", "/clear", "/stop"}]

    assert address.startswith("http://127.0.0.1:")
    assert page._queue.max_size == 32
    assert len(asking) == 10
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in asking} == {("model", 32)}
    assert page.analytics_enabled is False
    assert page.delete_cache == (3600, 3600)


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
@pytest.mark.parametrize("name", ["caption", "vqa", "reason", "look", "chat", "search", "search files"])
def test_a_path_on_the_server_is_no_way_to_read_its_files(
    address: str, tmp_path: Path, name: str, meta: dict[str, Any]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    file = {"path": str(tmp_path / "private.png"), **meta}
    settings = ["quickstart", 0, 0, 1, 0]
    data: dict[str, list[Any]] = {
        "caption": [file, "beam", "en", *settings],
        "vqa": [file, "what?", *settings],
        "reason": [file, "what?", "", *settings],
        "look": [file, "", 0, 0, "quickstart"],
        "chat": [{"text": "what?", "files": [file]}, *settings],
        "search": ["", file, "uploads", [], 3, "quickstart"],
        "search files": ["words", None, "uploads", [file], 3, "quickstart"],
    }
    said = post(address, name.split()[0], data[name])
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"{address}gradio_api/file={tmp_path / 'private.png'}")

    assert "event: error" in said
    assert "private.png" not in said.replace("'private.png'", "")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "..%2f..%2fetc/passwd", "{here}", "http://127.0.0.1:9/"]
)
def test_no_address_reads_what_was_not_uploaded(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match=r"40[0345]"):
        get(f"{address}gradio_api/file={path.format(here=Path(__file__))}")


def test_a_forged_conversation_is_no_way_in(address: str, tmp_path: Path) -> None:
    """The page keeps conversations itself: what a client sends as one, with files of the server in it, is not read."""
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    value = {"path": str(tmp_path / "private.png")}
    part = {"type": "component", "component": "image", "props": {}, "constructor_args": {}, "value": value}
    forged = {"role": "user", "content": [part]}
    said = post(address, "chat", [{"text": "what?", "files": []}, [forged], 0, 0, 1, 0])

    assert "event: error" in said


def test_a_forged_event_is_no_way_to_have_a_file_copied(address: str, tmp_path: Path) -> None:
    """Files under the temporary and the working folder may be put out by the page itself, so no event may name one."""
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    forged = {"index": 0, "value": {"text": "x", "files": [file], "image": file}, "selected": True}
    config = json.loads(get(f"{address}config"))
    (chosen,) = [one for one in config["dependencies"] if any(kind == "example_select" for _, kind in one["targets"])]
    data = [None] * (len(chosen["inputs"]) - 1) + ["quickstart"]
    said = call(address, chosen["id"], forged, data)

    honest = call(address, chosen["id"], {"index": 0, "value": "x", "selected": True}, data)

    assert f"file={tmp_path}" not in said
    assert "red.png" in honest  # what stands at that place in our own list


def test_an_upload_over_the_limit_is_refused(address: str) -> None:
    boundary = "x"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'.encode()
    body = head + bytes(65 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    call = urllib.request.Request(
        f"{address}gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="413"):
        opener().open(call)


def test_the_page_names_no_fonts_from_elsewhere(address: str) -> None:
    for part in ("", "theme.css"):
        text = get(address + part)

        assert "system-ui" in text or part == ""
        assert "fonts.googleapis" not in text
        assert "fonts.gstatic" not in text


def test_a_password_keeps_others_out(folder: Path, tmp_path: Path) -> None:
    with served(fake(folder), tmp_path / "uploads", auth="ada:engine no. 1") as url:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url, "caption", [None, "beam", "en"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}gradio_api/file={folder / 'red.png'}")
        with pytest.raises((AuthenticationError, ValueError), match="Could not login"):
            Client(url, verbose=False, auth=("ada", "wrong"))
        client = PageClient(url, verbose=False, auth=("ada", "engine no. 1"))

        assert client.predict(handle_file(folder / "red.png"), api_name="/caption") == "a caption (en) of red.png"


@pytest.mark.parametrize("auth", ["ada", "ada:", ":password", ""])
def test_half_a_login_is_told(folder: Path, auth: str) -> None:
    with pytest.raises(UserError, match="--auth: write it as user:password"):
        launch(fake(folder), port=0, block=False, auth=auth)  # type: ignore[arg-type]


def test_a_folder_that_is_none_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        launch(fake(folder), port=0, block=False, search_folder=folder / "none")  # type: ignore[arg-type]


def test_a_folder_that_no_adapter_can_search_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="--search-folder: no adapter here has its text side"):
        launch(fake(folder), port=0, block=False, search_folder=folder)  # type: ignore[arg-type]


def test_a_taken_port_names_the_flag(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: something else listens there"):
            launch(fake(folder), port=port, block=False)  # type: ignore[arg-type]


def test_ctrl_c_ends_the_server_and_exits_with_130(tmp_path: Path) -> None:
    tests = Path(__file__).parents[2]
    program = f"""
import sys
sys.path.insert(0, {str(tests)!r})
from pathlib import Path
import serve.engine.engine
from fake_engine import FakeAdapter, FakeEngine, make_recipe
serve.engine.engine.Engine = lambda *a, **k: FakeEngine(FakeAdapter(make_recipe(Path({str(tmp_path)!r})), "quickstart"))
sys.argv = ["querybridge", "demo", "--port", "0"]
from serve.cli.command import main
main()
"""
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stderr is not None
    first = run.stderr.readline()
    run.send_signal(signal.SIGINT)
    out, rest = run.communicate(timeout=90)

    assert "the page is at http://127.0.0.1:" in first
    assert run.returncode == 130
    assert rest == "querybridge: stopped\n"
    assert out == ""


def test_uploads_are_deleted_after_a_while_and_examples_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.page.app._HOUR", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    uploads = tmp_path / "uploads"
    with served(fake(folder), uploads) as url:
        client = PageClient(url, verbose=False)
        client.predict({"text": "what?", "files": [handle_file(tmp_path / "mine.png")]}, api_name="/chat")
        came = {path.name for path in uploads.rglob("*.png")}
        began = time.monotonic()
        while list(uploads.rglob("mine.png")) and time.monotonic() - began < 20:
            time.sleep(0.05)
        left = {path.name for path in uploads.rglob("*.png")}
        with pytest.raises(AppError, match="deleted since: upload it again"):
            client.predict({"text": "and now?", "files": []}, api_name="/chat")

    assert came - left == {"mine.png"}
    assert left == {"red.png", "green.png", "blue.png"}


def test_examples_have_a_picture_and_questions_of_their_own(folder: Path, tmp_path: Path) -> None:
    words, found = find_examples(tmp_path, task="vqa", train=[str(folder / "shapes.jsonl")])

    assert words == "from its training data"
    assert [(one.path.name, one.questions) for one in found] == [
        ("red.png", ("what colour is it?", "is it shape 0?")),
        ("green.png", ("is it shape 1?", "what colour is it?")),
        ("blue.png", ("is it shape 2?", "what colour is it?")),
    ]


def test_a_row_of_several_pictures_is_no_example(tmp_path: Path) -> None:
    draw_data(tmp_path)
    images = ["red.png", "blue.png"]
    rows = [{"images": images, "question": "which?"}, {"image": images[1], "question": "what?"}]
    (tmp_path / "shapes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    assert [(one.path, one.questions) for one in data_examples(str(tmp_path / "shapes.jsonl"), "vqa")] == [
        (tmp_path / "blue.png", ("what?",))
    ]


def test_without_its_data_six_photos_in_colour_are_offered_with_their_credits(tmp_path: Path) -> None:
    words, found = find_examples(tmp_path, task="vqa", train=[str(tmp_path / "shapes.jsonl")])

    assert words == "photos, not from its training data"
    assert len(found) == 6 and all(one.questions for one in found)
    for one in found:
        red, _, blue = Image.open(one.path).convert("RGB").split()
        assert red.histogram() != blue.histogram()  # none is grey
        assert one.path.stem in CREDITS


def test_an_adapter_of_drawn_shapes_gets_no_photos(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.page.examples.data_examples", lambda source, task: [])
        words, found = find_examples(tmp_path, task="vqa", train=["easy-vqa:train"])

    assert words == "drawn scenes, not from its training data"
    assert [one.path.parent for one in found] == [tmp_path] * 6


def test_proxies_of_the_environment_do_not_matter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a dead one
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    before = os.environ.get("no_proxy")
    with served(fake(folder), tmp_path / "uploads") as url:
        assert "querybridge" in get(url)
    monkeypatch.setenv("no_proxy", before or "")
