"""The page on a desk and on a phone, in light and in dark, while others wait, and for who cannot see or point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from page_view import SIZES, View, faults_of
from PIL import Image, ImageStat

SENT_BY = {
    "Chat": "#chat-box", "VQA": "#vqa-ask", "Caption": "#caption-ask", "Reason": "#reason-ask",
    "Search": "#search-ask", "Look": "#look-ask", "Compare": "#compare-ask", "Batch": "#batch-ask",
    "Train": "#train-start",
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_both_screens_and_is_for_everybody(
    open_view: Callable[..., View], folder: Path, tmp_path: Path, scheme: str
) -> None:
    view = open_view("phone", scheme)
    page = view.page
    view.send("which?", folder / "red.png")
    view.says("after 0 turns")
    view.says("87% sure of its words")
    for name, sender in SENT_BY.items():
        view.tab(name)
        for size in SIZES:
            view.resize(size)
            page.wait_for_selector(sender)
            page.evaluate("window.scrollTo(0, 0)")
            placed = page.locator(sender).bounding_box()

            assert not view.scrolls_sideways(), (name, size)
            assert placed["y"] + placed["height"] <= SIZES[size][1], (name, size)
            assert faults_of(page) == [], (name, size)
    view.tab("Look")
    view.put_picture("#picture-3", folder / "red.png")
    page.click("#look-ask")
    view.says("glances together")
    page.wait_for_selector("#queries .thumbnail-item")
    view.open_settings()
    for size in SIZES:
        view.resize(size)
        assert not view.scrolls_sideways()
        assert faults_of(page) == []
    small = page.eval_on_selector_all(
        "button, input, textarea, select",
        """all => all.filter(one => one.getClientRects().length && one.type != "file" && one.type != "range")
          .map(one => [one, one.getBoundingClientRect(), parseFloat(getComputedStyle(one).fontSize)])
          .filter(([one, box, font]) => one.tagName == "BUTTON" ? Math.min(box.width, box.height) < 23.5
            : one.type != "checkbox" && one.type != "radio" && font < 16)
          .map(([one]) => one.outerHTML.slice(0, 160))""",
    )
    assert small == []  # on the phone, which comes last
    view.tab("Chat")
    page.screenshot(path=tmp_path / "page.png")
    brightness = ImageStat.Stat(Image.open(tmp_path / "page.png").convert("L")).mean[0]

    assert brightness < 70 if scheme == "dark" else brightness > 180


def test_a_question_is_seen_at_once_and_a_reload_keeps_the_conversation(
    open_view: Callable[..., View], engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "pause", 0.5)
    monkeypatch.setattr(engine, "ahead", 3)
    view = open_view()
    page = view.page
    monkeypatch.setattr(engine, "silent", True)
    view.send("what?")
    page.wait_for_selector("#chat .typing")
    assert "what?" in page.inner_text("#chat")
    page.wait_for_function("/3 ahead of you · \\d+ s/.test(document.querySelector('#chat-status').innerText)")
    view.says("asked 'what?' about nothing after 0 turns")
    monkeypatch.setattr(engine, "pause", 0.0)
    view.reload()
    view.says("asked 'what?' about nothing after 0 turns")
    view.send("and?")
    view.says("after 1 turns")
    with page.expect_download() as download:
        page.locator("#chat").get_by_role("button", name="Markdown").click()
    assert "> asked 'and?' about nothing after 1 turns" in Path(download.value.path()).read_text(encoding="utf-8")


def test_who_writes_before_the_page_is_ready_is_answered(open_view: Callable[..., View]) -> None:
    view = open_view()
    page = view.page
    view.send("one")
    view.says("asked 'one' about nothing after 0 turns")
    held: list[Any] = []
    ready = False
    # by which the page opens what was said before
    page.route("**/run/predict", lambda route: route.continue_() if ready else held.append(route))
    page.reload()
    page.wait_for_selector("#chat-box textarea")
    view.send("two")
    view.says("asked 'two' about nothing after 1 turns")
    ready = True
    for route in held:
        route.continue_()
    view.ready()
    assert held
    for number, text in enumerate(("one", "two")):
        view.says(f"asked '{text}' about nothing after {number} turns")
    view.send("three")
    view.says("asked 'three' about nothing after 2 turns")


def test_nothing_moves_by_itself(open_view: Callable[..., View], folder: Path) -> None:
    """What web vitals call layout shift: of what is seen, the share that moves, and how far, without being asked to."""
    view = open_view("phone")
    page = view.page
    page.evaluate(
        """window.shifts = [];
        new PerformanceObserver(list => shifts.push(...list.getEntries().filter(one => !one.hadRecentInput)
          .map(one => [one.value, one.sources.map(it => it.node?.id || it.node?.className || "").join(" ")])))
          .observe({ type: "layout-shift" })"""
    )
    for number in range(5):
        view.send(f"question {number}", *([folder / "red.png"] if number == 1 else []))
        view.says(f"asked 'question {number}'")
    for name in SENT_BY:
        view.tab(name)
        page.wait_for_selector(SENT_BY[name])
    view.tab("VQA")
    for number in range(3):
        page.locator("#examples-0 button").nth(number).click()
        view.says(f"asked 'is it shape {number}?'" if number else "asked 'what colour is it?'")
    view.tab("Caption")
    for style in ("Quick (greedy)", "Varied (three, sampled)"):
        page.get_by_label(style).check()
        page.click("#caption-ask")
        page.wait_for_function("document.querySelector('#caption textarea').value.includes('of blue.png')")
    view.tab("Reason")
    page.fill("#reason-question textarea", "why?")
    page.press("#reason-question textarea", "Enter")
    view.says("a ball")
    view.tab("Search")
    page.get_by_label("Pictures that I upload").check()
    view.upload("#search-files", folder / "red.png", folder / "blue.png")
    page.fill("#search-text input, #search-text textarea", "red")
    page.click("#search-ask")
    page.wait_for_selector("#found .thumbnail-item img")
    view.tab("Compare")
    page.fill("#compare-question textarea", "which?")
    page.press("#compare-question textarea", "Enter")
    page.wait_for_selector("#votes button:enabled")
    view.open_settings()
    view.tab("Chat")
    page.wait_for_timeout(700)  # input excuses what moves within half a second of it
    shifts = page.evaluate("shifts")
    moved = "\n".join(f"{value:.3f} {what}" for value, what in sorted(shifts, reverse=True))
    assert sum(value for value, _ in shifts) <= 0.1, f"\n{moved}"


def test_clear_clears_while_something_is_written(
    open_view: Callable[..., View], engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "pause", 0.05)
    view = open_view()
    page = view.page
    view.send("count")
    view.says("0 1 2 3")
    page.locator("#chat").get_by_label("Clear").first.click()
    page.wait_for_function("document.querySelectorAll('#chat .message-row').length == 0")
    view.tab("Reason")
    view.put_picture("#picture-2", folder / "red.png")
    page.fill("#reason-question textarea", "why?")
    page.press("#reason-question textarea", "Enter")
    view.says("It is round")
    page.locator("#thoughts").get_by_label("Clear").first.click()
    page.wait_for_function("document.querySelectorAll('#thoughts .message-row').length == 0")
    view.tab("Chat")
    assert page.locator("#chat .message-row").count() == 0  # and nothing of either came back meanwhile
    assert page.locator("#thoughts .message-row").count() == 0
    assert all(pending.stopped for pending in engine.pending[-2:])


def test_a_picture_may_be_dropped_anywhere(open_view: Callable[..., View]) -> None:
    view = open_view()
    page = view.page
    for name, target, placed in (
        ("Chat", "#chat", "#chat-box .thumbnail-item"), ("VQA", "#questions", "#picture-0 .image-frame img"),
    ):  # fmt: skip
        view.tab(name)
        page.evaluate(
            """async target => {
              const canvas = new OffscreenCanvas(8, 8);
              canvas.getContext("2d").fillRect(0, 0, 8, 8);
              const given = new DataTransfer();
              given.items.add(new File([await canvas.convertToBlob()], "dropped.png", { type: "image/png" }));
              const happens = { bubbles: true, cancelable: true, dataTransfer: given };
              document.querySelector(target).dispatchEvent(new DragEvent("drop", happens));
            }""",
            target,
        )
        page.wait_for_selector(placed)


def test_settings_that_contradict_each_other_cannot_be_made(open_view: Callable[..., View]) -> None:
    view = open_view()
    page = view.page
    view.open_settings()
    page.fill("#temperature input[type=number]", "0.5")
    page.press("#temperature input[type=number]", "Tab")
    page.wait_for_selector("#beams input[type=number]:disabled")
    page.fill("#temperature input[type=number]", "0")
    page.press("#temperature input[type=number]", "Tab")
    page.wait_for_selector("#beams input[type=number]:enabled")
    page.fill("#beams input[type=number]", "3")
    page.press("#beams input[type=number]", "Tab")
    page.wait_for_selector("#temperature input[type=number]:disabled")


def test_a_message_has_a_title_and_covers_no_button(open_view: Callable[..., View]) -> None:
    view = open_view("phone")
    page = view.page
    view.tab("VQA")
    page.click("#vqa-ask")
    view.says("That didn't work")
    view.says("There is no question yet")
    page.click("#vqa-ask", trial=True)
    page.get_by_role("tab", name="VQA", exact=True).focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#caption-ask")  # arrow keys go from tab to tab


def test_two_are_compared_and_a_vote_is_kept(
    open_view: Callable[..., View], folder: Path, votes: Path, engine: FakeEngine
) -> None:
    view = open_view()
    page = view.page
    view.tab("Compare")
    view.put_picture("#picture-4", folder / "red.png")
    page.fill("#compare-question textarea", "which?")
    page.press("#compare-question textarea", "Enter")
    page.wait_for_selector("#votes button:enabled")
    assert page.inner_text("#compared").count("87% sure of its words") == 2
    page.get_by_role("button", name="Left is better").click()
    view.says("Left is better: 1")
    (line,) = map(json.loads, votes.read_text(encoding="utf-8").splitlines())
    assert (line["vote"], line["left"]["adapter"], line["right"]["adapter"]) == ("left", "quickstart", "other")
    page.wait_for_selector("#votes button:disabled")  # one vote for one comparison


def test_a_data_file_is_answered_in_the_batch_tab(open_view: Callable[..., View], folder: Path) -> None:
    view = open_view("phone")
    page = view.page
    view.tab("Batch")
    view.upload("#batch-files", *(folder / name for name in ("shapes.jsonl", "red.png", "green.png", "blue.png")))
    page.wait_for_function("document.querySelector('#batch-files').innerText.includes('blue')")
    page.click("#batch-ask")
    view.says("6 of 6 answered")
    assert page.locator("#batch-table img").count() == 6
    assert not view.scrolls_sideways() and faults_of(page) == []
    for kind, first in (("CSV", "row,id,image,question,answer,confidence"), ("JSONL", '{"row": 1,')):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {kind}").click()
        assert Path(download.value.path()).read_text(encoding="utf-8").startswith(first)
