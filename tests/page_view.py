"""One visitor's view of the page in a real browser, and what must not have happened in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SIZES = {"desk": (1280, 900), "phone": (390, 844)}


class View:
    """One visitor's view of the page, and what must not have happened in it."""

    def __init__(self, context: Any, address: str, size: str, scheme: str) -> None:
        self.address = address
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)  # for a busy machine
        self.page.emulate_media(color_scheme=scheme)
        self.resize(size)
        self.asked_for: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.ready()

    def ready(self) -> None:
        """Wait until the page has what it was kept, and its events are wired."""
        self.page.wait_for_selector("body[data-ready] #chat-box textarea")

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    def resize(self, size: str) -> None:
        self.width, height = SIZES[size]
        self.page.set_viewport_size({"width": self.width, "height": height})

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()

    def open_settings(self) -> None:
        self.page.locator("#settings button").first.click()
        for control in ("longest", "temperature", "top-p", "beams"):
            self.page.wait_for_selector(f"#{control} input[type=number]")

    def says(self, text: str) -> None:
        self.page.get_by_text(text, exact=False).first.wait_for()

    def upload(self, slot: str, *files: Path) -> None:
        self.page.set_input_files(f"{slot} input[type=file]", [str(file) for file in files])

    def put_picture(self, slot: str, file: Path) -> None:
        self.upload(slot, file)
        self.page.wait_for_selector(f"{slot} .image-frame img")

    def send(self, text: str, *files: Path) -> None:
        if files:
            self.upload("#chat-box", *files)
            self.page.wait_for_function(
                f"document.querySelectorAll('#chat-box .thumbnail-item').length == {len(files)}"
            )
        self.page.fill("#chat-box textarea", text)
        self.page.press("#chat-box textarea", "Enter")

    def scrolls_sideways(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth") > self.width)

    def close(self) -> None:
        assert [url for url in self.asked_for if not url.startswith((self.address, "data:", "blob:"))] == []
        assert self.faults == []
        self.page.close()


def faults_of(page: Any) -> list[str]:
    """What axe-core calls serious or critical in what is seen now, once nothing fades in any more."""
    page.evaluate(
        """Promise.all(document.getAnimations().filter(one => one.effect.getComputedTiming().iterations < Infinity)
          .map(one => one.finished.catch(() => null)))"""
    )
    if not page.evaluate("!!window.axe"):
        axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
        page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['html'][:200]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
