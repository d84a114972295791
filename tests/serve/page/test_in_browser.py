"""The page in a real browser: every tab used as people use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from page_view import View


def test_a_conversation(open_view: Callable[..., View], folder: Path, engine: FakeEngine) -> None:
    view = open_view()
    page = view.page
    view.send("which is red?", folder / "red.png", folder / "blue.png")
    view.says("asked 'which is red?' about red.png (40, 30), blue.png (40, 30) after 0 turns")
    view.says("87% sure of its words")
    assert page.input_value("#chat-box textarea") == ""
    view.send("and now?")
    view.says("asked 'and now?' about red.png (40, 30), blue.png (40, 30) after 1 turns")
    assert page.locator("#chat .image-frame img").count() == 2

    asked = len(engine.pending)
    page.get_by_label("Retry").last.click()
    page.wait_for_function("document.querySelectorAll('#chat .typing').length == 0")
    while len(engine.pending) == asked:
        page.wait_for_timeout(20)
    view.says("asked 'and now?' about red.png (40, 30), blue.png (40, 30) after 1 turns")
    page.get_by_label("Undo").last.click()
    page.wait_for_function("document.querySelector('#chat-box textarea').value == 'and now?'")
    assert page.get_by_text("asked 'and now?'").count() == 0

    # a file that is no picture: told, and nothing that was written is lost
    view.send("what is this?", folder / "text.jpg")
    view.says("image 'text.jpg' is not a picture")
    assert page.input_value("#chat-box textarea") == "what is this?"
    page.locator("#chat").get_by_text("asked 'which is red?'").click(
        trial=True
    )  # and nothing lies over the conversation


def test_a_picture_is_taken_with_the_camera(open_view: Callable[..., View]) -> None:
    view = open_view()
    page = view.page
    page.fill("#chat-box textarea", "what do you see?")
    page.locator("#chat-camera button").first.click()
    page.locator("#chat-camera").get_by_text("Access Webcam").click()
    page.wait_for_function("document.querySelector('#chat-camera video').videoWidth > 0")
    page.locator("#chat-camera").get_by_label("capture photo").click()
    page.wait_for_selector("#chat-box .thumbnail-item")
    assert page.input_value("#chat-box textarea") == "what do you see?"
    page.press("#chat-box textarea", "Enter")
    view.says("asked 'what do you see?' about image.png")
    view.tab("VQA")
    page.locator("#picture-0").get_by_label("Capture from camera").click()
    page.locator("#picture-0").get_by_text("Access Webcam").click()
    page.wait_for_function("document.querySelector('#picture-0 video').videoWidth > 0")
    page.locator("#picture-0").get_by_label("capture photo").click()
    page.wait_for_selector("#picture-0 .image-frame img")
    view.tab("Caption")
    page.wait_for_selector("#picture-1 .image-frame img")  # it has come along


def test_stop_and_clear(open_view: Callable[..., View], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "pause", 0.05)
    view = open_view()
    page = view.page
    view.send("count")
    view.says("0 1 2 3")
    page.locator("#chat-box .stop-button").click()
    view.says("stopped")
    monkeypatch.setattr(engine, "pause", 0.0)
    view.send("and?")
    view.says("after 1 turns")
    page.get_by_label("Clear").first.click()
    page.wait_for_function("document.querySelectorAll('#chat .message-row').length == 0")
    view.send("anew")
    view.says("asked 'anew' about nothing after 0 turns")


def test_questions_captions_and_reasons_about_one_picture(open_view: Callable[..., View], folder: Path) -> None:
    view = open_view()
    page = view.page
    view.tab("VQA")
    view.put_picture("#picture-0", folder / "green.png")
    page.fill("#questions textarea", "what?\nwhich colour? | green, red")
    page.press("#questions textarea", "Shift+Enter")
    view.says("asked 'what?' about green.png (40, 30) after 0 turns")
    assert page.locator("#answers .sure").nth(2).inner_text().strip() == "70%"
    assert "red 20%" in page.inner_text("#answers")

    view.tab("Caption")  # the picture has come along
    page.wait_for_selector("#picture-1 .image-frame img")
    page.get_by_label("Quick (greedy)").check()
    page.click("#caption-ask")
    page.wait_for_function("document.querySelector('#caption textarea').value == 'a caption (en) of green.png'")

    view.tab("Reason")
    assert "was not trained to give reasons" in page.inner_text("#reason-note")
    page.fill("#reason-question textarea", "what may it do?")
    page.press("#reason-question textarea", "Enter")
    page.locator("#thoughts").get_by_text("a ball").wait_for()
    page.locator("#thoughts").get_by_text("It is round, so it may roll.").wait_for()  # open until it is folded

    # another picture takes the old answers away, in every tab; a file that is none says so and leaves the page
    page.locator("#picture-2").get_by_label("Remove Image").or_(
        page.locator("#picture-2").get_by_label("Clear")
    ).first.click()
    page.wait_for_selector("#picture-2 input[type=file]", state="attached")
    view.upload("#picture-2", folder / "text.jpg")
    view.says("image 'text.jpg' is not a picture")
    page.wait_for_selector("#picture-2 input[type=file]", state="attached")
    view.tab("Caption")
    page.wait_for_function("document.querySelector('#caption textarea').value == ''")
    page.wait_for_selector("#picture-1 input[type=file]", state="attached")


def test_search_shows_small_copies(open_view: Callable[..., View], folder: Path) -> None:
    view = open_view()
    page = view.page
    view.tab("Search")
    page.fill("#search-text input, #search-text textarea", "a red square")
    page.press("#search-text input, #search-text textarea", "Enter")
    page.wait_for_function("document.querySelectorAll('#found .thumbnail-item img').length == 6")
    sources = page.eval_on_selector_all("#found .thumbnail-item img", "images => images.map(image => image.src)")

    assert all(str(folder / "mine") not in source for source in sources)
    page.get_by_label("Pictures that I upload").check()
    view.upload("#search-files", folder / "red.png", folder / "blue.png")
    page.wait_for_function("document.querySelector('#search-files').innerText.includes('blue')")
    page.click("#search-ask")
    page.wait_for_function("document.querySelectorAll('#found .thumbnail-item img').length == 2")

    # a file that is no picture is left out and named; what is found has its name to read
    page.locator("#search-files").get_by_label("Clear").or_(
        page.locator("#search-files").get_by_label("Remove")
    ).first.click()
    page.wait_for_selector("#search-files input[type=file]", state="attached")
    view.upload("#search-files", *(folder / name for name in ("red.png", "text.jpg", "blue.png", "green.png")))
    page.wait_for_function("document.querySelector('#search-files').innerText.includes('(4)')")
    page.click("#search-ask")
    view.says("1 file was left out")
    view.says("image 'text.jpg' is not a picture")
    page.wait_for_function("document.querySelectorAll('#found .thumbnail-item img').length == 3")
    captions = page.locator("#found .caption-label")
    assert "red.png" in " ".join(captions.all_inner_texts())
    assert captions.evaluate_all("all => all.every(one => one.scrollWidth <= one.clientWidth + 1)")


def test_look_draws_all_queries_and_each(open_view: Callable[..., View], folder: Path) -> None:
    view = open_view()
    page = view.page
    view.tab("Look")
    view.put_picture("#picture-3", folder / "red.png")
    page.click("#look-ask")
    view.says("All 3 glances together")
    view.says("Attention shows where the bridge reads, not why an answer comes out")
    page.wait_for_function("document.querySelectorAll('#queries .thumbnail-item').length == 3")
    before = page.get_attribute("#seen img", "src")
    page.locator("#queries .thumbnail-item").nth(1).click()
    view.says("Glance 2 of 3.")
    assert page.get_attribute("#seen img", "src") != before
    page.locator("#look-query input[type=range]").press("ArrowRight")
    view.says("Glance 3 of 3.")
    page.fill("#look-phrase input, #look-phrase textarea", "the red square")
    page.click("#look-ask")
    view.says("the red square: warmest at")  # no grounding head, so no box
    page.wait_for_selector("#queries", state="hidden")
    page.fill("#look-phrase input, #look-phrase textarea", "")
    page.click("#look-ask")
    page.wait_for_selector("#queries .thumbnail-item")
    page.locator("#picture-3").get_by_label("Remove Image").or_(
        page.locator("#picture-3").get_by_label("Clear")
    ).first.click()
    page.wait_for_selector("#queries", state="hidden")  # nothing is seen in another picture yet


def test_an_example_and_another_adapter(open_view: Callable[..., View]) -> None:
    view = open_view()
    page = view.page
    assert page.inner_text("#head h1") == "querybridge"
    assert "shapes & <colours>" in page.inner_text("#head")
    page.get_by_label("Select example 2: is it shape 1?").click()  # and it is asked
    view.says("asked 'is it shape 1?' about green.png (40, 30) after 0 turns")
    view.tab("VQA")
    page.locator("#examples-0 .gallery-item, #examples-0 button").nth(1).click()
    page.wait_for_selector("#picture-0 .image-frame img")
    assert page.input_value("#questions textarea") == "is it shape 1?\nwhat colour is it?"
    page.wait_for_function("document.querySelector('#answers').innerText.includes('about green.png')")  # and asked
    view.tab("Look")
    page.wait_for_selector("#picture-3 .image-frame img")  # an example goes from tab to tab too
    view.tab("Caption")
    page.locator("#examples-1 button").nth(2).click()
    page.wait_for_function("document.querySelector('#caption textarea').value == 'a caption (en) of blue.png'")
    view.tab("Reason")
    page.locator("#examples-2 button").nth(0).click()
    page.locator("#thoughts").get_by_text("a ball").wait_for()
    view.tab("Caption")
    page.wait_for_function("document.querySelector('#caption textarea').value == ''")  # that was of another picture
    view.tab("VQA")
    assert page.inner_text("#answers") == ""
    page.press("#questions textarea", "Shift+Enter")
    view.says("asked 'what colour is it?' about")
    view.tab("Search")
    page.fill("#search-text input, #search-text textarea", "a red square")
    page.press("#search-text input, #search-text textarea", "Enter")
    page.wait_for_function("document.querySelectorAll('#found .thumbnail-item img').length == 6")
    page.locator("#adapter input").click()
    page.get_by_role("option", name="other").click()
    page.wait_for_function("document.querySelector('#head .what').innerText == 'Another one.'")
    assert "was trained without its text side" in page.inner_text("#search-note")
    page.wait_for_function("document.querySelectorAll('#found .thumbnail-item img').length == 0")
    view.tab("VQA")
    assert "asked" not in page.inner_text("#answers")  # those were the other adapter's


def test_what_is_under_way_ends_with_its_picture(
    open_view: Callable[..., View], engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "pause", 0.02)
    view = open_view()
    page = view.page
    view.tab("VQA")
    view.put_picture("#picture-0", folder / "red.png")
    page.fill("#questions textarea", "what is it?\ncount")  # the second takes twenty seconds
    page.press("#questions textarea", "Shift+Enter")
    view.says("asked 'what is it?' about red.png")
    running = engine.pending[-1]
    page.locator("#picture-0").get_by_label("Clear").or_(
        page.locator("#picture-0").get_by_label("Remove")
    ).first.click()
    page.wait_for_function("document.querySelector('#answers').innerText == ''")
    assert running.result(10).finish == "stopped"
    view.tab("Caption")
    view.tab("VQA")
    assert page.inner_text("#answers") == ""


def test_a_question_outlives_the_slow_removal_of_the_answer_before(
    open_view: Callable[..., View], engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "pause", 0.02)
    view = open_view()
    page = view.page
    held: list[Any] = []
    page.route("**/run/predict", lambda route: held.append(route))  # a slow network
    view.tab("VQA")
    view.put_picture("#picture-0", folder / "red.png")
    page.fill("#questions textarea", "what is it?\ncount")
    page.press("#questions textarea", "Shift+Enter")
    view.says("asked 'what is it?' about red.png")
    running = engine.pending[-1]
    assert held
    for route in held:
        route.continue_()
    page.wait_for_timeout(1000)
    view.says("asked 'what is it?' about red.png")
    assert not running.stopped
    running.stop()
