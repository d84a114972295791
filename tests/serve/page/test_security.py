"""What the page keeps to: its own names, no fetching, and uploads that go with the process."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from gradio import processing_utils
from page_server import draw_data, get, opener, post, served

from qformer.errors import UserError
from serve.page.security import inside, private_uploads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("shapes"))


def fake(folder: Path) -> FakeEngine:
    return FakeEngine(FakeAdapter(make_recipe(folder), "quickstart"))


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(fake(folder), tmp_path_factory.mktemp("uploads")) as url:
        yield url


def status(address: str, path: str, host: str) -> int:
    asked = urllib.request.Request(f"{address}{path}", headers={"Host": host, "Origin": f"http://{host}"})
    try:
        with opener().open(asked) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["", "config", "gradio_api/info", "gradio_api/file=/etc/passwd"])
def test_a_page_of_the_web_cannot_call_it_by_its_own_name(address: str, path: str) -> None:
    assert status(address, path, "evil.example") == 403
    assert status(address, path, "127.0.0.1.evil.example:7860") == 403
    assert status(address, path, "LOCALHOST:7860") == status(address, path, "[::1]:7860") != 403 or "passwd" in path


def test_with_a_password_it_may_stand_behind_another_name(folder: Path, tmp_path: Path) -> None:
    with served(fake(folder), tmp_path, auth="ada:lovelace") as url:
        assert status(url, "", "pictures.example") == 200
        assert status(url, "config", "pictures.example") == 401


def test_web_addresses_are_not_fetched(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("httpx.AsyncClient.send", connect)
    named = {"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    told = post(address, "vqa", [named, "what?", "quickstart", 0, 0, 1, 0])
    assert "event: error" in told and "not named by its address" in json.dumps(told)
    assert processing_utils.async_ssrf_protected_download.__module__ == "serve.page.security"


def test_a_path_that_cannot_be_one_is_told_as_no_upload(address: str, tmp_path: Path) -> None:
    assert "was not uploaded" in post(address, "vqa", [{"path": "a\0b"}, "what?", "quickstart", 0, 0, 1, 0])
    assert not inside("a\0b", tmp_path) and not inside("x" * 9000, tmp_path)
    (tmp_path / "link").symlink_to("/etc")
    assert not inside(str(tmp_path / "link" / "passwd"), tmp_path) and inside(str(tmp_path / "a.png"), tmp_path)


def test_uploads_lie_in_a_folder_of_the_process_and_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), private_uploads():
        (folder,) = tmp_path.iterdir()
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "upload.png").write_bytes(b"private")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir()) and os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with private_uploads():
        pass
    assert "GRADIO_TEMP_DIR" not in os.environ


SERVER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from serve.page.app import launch
launch(FakeEngine(FakeAdapter(make_recipe(Path({folder!r})), "quickstart")), port=0)
"""


def test_sigterm_leaves_no_upload_behind(folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    code = SERVER.format(paths=[str(root / "tests"), str(root)], folder=str(folder))
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        if "the page is at" in line:
            url = line.split("the page is at ")[1].split()[0]
            break
    assert "querybridge" in get(url)
    (uploads,) = tmp_path.glob("querybridge-page-*")
    (uploads / "upload.png").write_bytes(b"private")
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.stderr.close()
    assert process.returncode == 143
    assert not list(tmp_path.glob("querybridge-page-*"))


@pytest.mark.parametrize(("command", "variable"), [("demo", "QUERYBRIDGE_DEMO_AUTH"), ("serve", "QUERYBRIDGE_API_KEY")])
def test_an_empty_secret_is_a_mistake_and_no_open_door(
    command: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.cli.demo import demo
    from serve.cli.serve import serve

    monkeypatch.setenv(variable, "")
    with pytest.raises(UserError, match=f"{variable}: it is set and empty"):
        demo(auth=None) if command == "demo" else serve(api_key=None)
