"""The page, served for real: its endpoints, what bad files get, where it listens, and a browser's view of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from adapters.artefact import Facts
from adapters.data.images import ImageRef, open_image
from adapters.recipe import Recipe, parse_recipe
from qformer.errors import UserError
from serve.demo import build_page, example_questions, launch
from serve.engine import Engine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COLOURS = {"red": (220, 20, 60), "green": (46, 139, 87), "blue": (65, 105, 225)}


class FakeEngine:
    """Says what it was asked, and by what name it knows the picture; opens the picture as the real one does."""

    def __init__(self, recipe: Recipe, name: str = "runs/quickstart/best") -> None:
        self.name = name
        self.assembly = SimpleNamespace(recipe=recipe)
        self.facts = Facts(
            fingerprints={},
            data={"train": "shapes.jsonl", "answers": 1234, "pictures": 321},
            metrics={"val_exact_match": 0.9625},
            terms=("MIT <b>or</b> so",),
            steps=600,
        )

    def ask(self, picture: ImageRef, question: str) -> str:
        return f"asked {question!r} about {picture.label} {open_image(picture).size}"

    def caption(self, picture: ImageRef) -> str:
        return f"a caption of {picture.label} {open_image(picture).size}"


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    values = {
        "description": "Answers questions about shapes & <colours>.",
        "data": {"train": str(folder / "shapes.jsonl")},
        "vision": {"towers": [{"source": "pypi:efficientnet-lite2", "layer": -1}]},
        "language": {"source": "pypi:smollm2-135m-instruct"},
    }
    return parse_recipe(values | changes, "test")


def draw_data(folder: Path) -> None:
    """Two questions about each of three pictures; the first question is the same for all."""
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
        rows += [
            {"image": f"{name}.png", "question": text} for text in ("what colour is it?", f"is it shape {number}?")
        ]
    (folder / "shapes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    draw_data(folder)
    (folder / "text.jpg").write_text("not a picture", encoding="utf-8")
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    before = os.environ.copy()
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = "http://127.0.0.1:9"  # a dead one, which must not matter
    page = launch(FakeEngine(make_recipe(folder)), port=0, block=False)  # type: ignore[arg-type]
    yield page.local_url
    page.close(verbose=False)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


def test_ask_answers_about_the_uploaded_file_under_its_own_name(client: Client, folder: Path) -> None:
    said = client.predict(handle_file(folder / "red.png"), "what is it?", api_name="/ask")

    assert said == "asked 'what is it?' about red.png (40, 30)"


def test_caption_takes_a_picture_alone(client: Client, folder: Path) -> None:
    assert client.predict(handle_file(folder / "blue.png"), api_name="/caption") == "a caption of blue.png (40, 30)"


def test_only_the_two_endpoints_are_public(client: Client) -> None:
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/ask", "/caption"}


def test_a_format_that_only_our_opener_straightens_comes_upright(client: Client, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held on its side
    Image.new("CMYK", (40, 30)).save(tmp_path / "side.jpg", exif=exif)

    assert client.predict(handle_file(tmp_path / "side.jpg"), api_name="/caption").endswith("(30, 40)")


@pytest.mark.parametrize(
    ("name", "says"), [("text.jpg", "'text.jpg' is not a picture"), ("empty.png", "'empty.png' is empty (0 bytes)")]
)
def test_a_file_that_is_no_picture_is_told_in_one_line(client: Client, folder: Path, name: str, says: str) -> None:
    with pytest.raises(AppError) as caught:
        client.predict(handle_file(folder / name), "what is it?", api_name="/ask")

    assert says in str(caught.value)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_no_question_and_no_picture_are_told(client: Client, folder: Path, question: str) -> None:
    with pytest.raises(AppError, match="no question yet"):
        client.predict(handle_file(folder / "red.png"), question, api_name="/ask")
    with pytest.raises(AppError, match="no picture yet"):
        client.predict(None, "what is it?", api_name="/ask")


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_a_path_on_the_server_is_no_way_to_read_its_files(address: str, tmp_path: Path, meta: dict[str, Any]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    body = json.dumps({"data": [{"path": str(tmp_path / "private.png"), **meta}]}).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    call = urllib.request.Request(f"{address}gradio_api/call/caption", body, {"Content-Type": "application/json"})
    with opener.open(call) as reply:
        event = json.load(reply)["event_id"]
    with opener.open(f"{address}gradio_api/call/caption/{event}") as reply:
        said = reply.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        opener.open(f"{address}gradio_api/file={tmp_path / 'private.png'}")

    assert "event: error" in said
    assert "a caption of" not in said


def test_the_page_is_bounded_and_private(address: str, folder: Path) -> None:
    page = build_page(FakeEngine(make_recipe(folder)))  # type: ignore[arg-type]
    models = [fn for fn in page.fns.values() if fn.api_name in ("ask", "caption")]

    assert address.startswith("http://127.0.0.1:")
    assert page._queue.max_size == 16
    assert [(fn.concurrency_id, fn.concurrency_limit) for fn in models] == [("model", 1)] * 2
    assert page.analytics_enabled is False
    assert page.delete_cache == (3600, 3600)


def test_an_upload_over_the_limit_is_refused(address: str) -> None:
    boundary = "x"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'.encode()
    body = head + bytes(65 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    call = urllib.request.Request(
        f"{address}gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(call)


def test_examples_have_a_picture_and_a_question_of_their_own(folder: Path) -> None:
    found = example_questions(make_recipe(folder))

    assert [(path.name, text) for path, text in found] == [
        ("red.png", "what colour is it?"),
        ("green.png", "is it shape 1?"),
        ("blue.png", "is it shape 2?"),
    ]


def test_a_row_of_several_pictures_is_no_example(folder: Path, tmp_path: Path) -> None:
    images = [str(folder / "red.png"), str(folder / "blue.png")]
    rows = [{"images": images, "question": "which?"}, {"image": images[1], "question": "what?"}]
    (tmp_path / "shapes.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    assert example_questions(make_recipe(tmp_path)) == [(folder / "blue.png", "what?")]


def test_without_its_data_an_adapter_has_no_examples(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)

    assert example_questions(recipe) == []
    assert "Try one" not in json.dumps(build_page(FakeEngine(recipe)).get_config_file(), default=str)  # type: ignore[arg-type]


def test_a_caption_adapter_puts_captions_first(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a black picture\n", encoding="utf-8")
    recipe = make_recipe(tmp_path, task="caption", data={"train": str(tmp_path / "captions.csv")})

    config = build_page(FakeEngine(recipe)).get_config_file()  # type: ignore[arg-type]
    buttons = {c["props"]["value"]: c["props"]["variant"] for c in config["components"] if c["type"] == "button"}
    (dataset,) = [c["props"] for c in config["components"] if c["type"] == "dataset"]

    assert buttons == {"Ask": "secondary", "Caption": "primary"}
    assert [len(row) for row in dataset["samples"]] == [1]  # a picture, no question


def test_a_taken_port_names_the_flag(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: something else listens there"):
            launch(FakeEngine(make_recipe(folder)), port=port, block=False)  # type: ignore[arg-type]


def test_ctrl_c_ends_the_server_and_exits_with_130(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import serve.demo, serve.engine
from test_demo import FakeEngine, make_recipe
serve.engine.load_adapter = lambda *a, **k: FakeEngine(make_recipe(Path({str(tmp_path)!r})))
sys.argv = ["querybridge", "demo", "--port", "0"]
from serve.cli import main
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


def test_a_real_adapter_answers_as_it_does_without_the_page(engine: Engine, data_file: Path) -> None:
    picture = data_file.parent / "3.png"
    page = launch(engine, port=0, block=False)
    try:
        said = Client(page.local_url, verbose=False).predict(handle_file(picture), "what?", api_name="/ask")
    finally:
        page.close(verbose=False)

    assert said == engine.ask(picture, "what?")


def test_uploads_are_deleted_after_a_while_and_examples_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr("serve.demo._HOUR", 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    page = launch(FakeEngine(make_recipe(folder)), port=0, block=False)  # type: ignore[arg-type]
    uploads = tmp_path / "uploads"
    try:
        client = Client(page.local_url, verbose=False)
        client.predict(handle_file(tmp_path / "mine.png"), api_name="/caption")
        came = {path.name for path in uploads.rglob("*.png")}
        began = time.monotonic()
        while list(uploads.rglob("mine.png")) and time.monotonic() - began < 20:
            time.sleep(0.05)
        left = {path.name for path in uploads.rglob("*.png")}
    finally:
        page.close(verbose=False)

    assert came - left == {"mine.png"}
    assert left == {"red.png", "green.png", "blue.png"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_in_a_browser(browser: Any, address: str, folder: Path, width: int, height: int) -> None:
    view = browser.new_page(viewport={"width": width, "height": height})
    view.set_default_timeout(90_000)  # for a busy machine
    asked_for: list[str] = []
    faults: list[str] = []
    view.on("request", lambda request: asked_for.append(request.url))
    view.on("pageerror", lambda error: faults.append(str(error)))
    view.goto(address)
    view.wait_for_selector("#question textarea")
    answer = "document.querySelector('#answer textarea').value"

    assert view.inner_text("#head h1") == "quickstart"
    assert "shapes & <colours>" in view.inner_text("#head")
    assert "1,234 answers about 321 pictures" in view.inner_text("#head")
    assert view.evaluate("document.documentElement.scrollWidth") <= width

    # a picture, a question, the answer
    view.set_input_files("#picture input[type=file]", folder / "green.png")
    view.wait_for_selector("#picture .image-frame img")
    view.fill("#question textarea", "is it green?")
    view.press("#question textarea", "Enter")
    view.wait_for_function(f"{answer} == \"asked 'is it green?' about green.png (40, 30)\"")
    view.get_by_role("button", name="Caption", exact=True).click()
    view.wait_for_function(f"{answer} == 'a caption of green.png (40, 30)'")

    # another picture takes the old answer away, a file that is none says so and leaves the page
    view.get_by_label("Remove Image").or_(view.get_by_label("Clear")).first.click()
    view.wait_for_function(f"{answer} == ''")
    view.set_input_files("#picture input[type=file]", folder / "text.jpg")
    view.get_by_text("image 'text.jpg' is not a picture").wait_for()
    view.wait_for_selector("#picture input[type=file]", state="attached")

    # an example fills both in
    view.locator("#examples tr", has_text="is it shape 1?").click()
    view.wait_for_selector("#picture .image-frame img")
    view.get_by_role("button", name="Ask", exact=True).click()
    view.wait_for_function(f"{answer} == \"asked 'is it shape 1?' about green.png (40, 30)\"")

    outside = [url for url in asked_for if not url.startswith((address, "data:", "blob:"))]
    assert outside == []
    assert faults == []
    view.close()


def test_the_page_names_no_fonts_from_elsewhere(address: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for part in ("", "theme.css"):
        with opener.open(address + part) as reply:
            text = reply.read().decode()

        assert "system-ui" in text or part == ""
        assert "fonts.googleapis" not in text
        assert "fonts.gstatic" not in text
