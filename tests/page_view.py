"""One visitor's view of the page in a real browser, and what must not have happened in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SIZES = {"desk": (1280, 900), "phone": (390, 844)}


class View:
    """One visitor's view of the page, and what must not have happened in it."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int], scheme: str) -> None:
        self.address, self.width = address, size[0]
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page.set_default_timeout(60_000)  # for a busy machine
        self.asked_for: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#chat-box textarea")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

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
    """What axe-core calls serious or critical in what is seen now."""
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
