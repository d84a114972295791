"""The page of a report: what it says, that it stands by itself, and how it looks in a browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from data_rows import write_jsonl
from PIL import Image

from adapters.data.examples import Example
from adapters.evaluation.report import Answered, Report, evaluation_page
from adapters.evaluation.verdicts import verdicts
from adapters.inference.request import Completion
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.evaluation.run import evaluate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<script>alert('1')</script> & \"quoted\" \ud83d"


class Reader:
    """It knows the answers by the names of the pictures, but for the first row's."""

    name = "runs/reader/best"

    def reply(self, examples: list[Example], task: str, **_: object) -> list[Completion]:
        def said(row: Example) -> str:
            return "<b>bold</b>" if row.row == 1 else row.images[0].label.split(".")[0]

        return [Completion(said(row), 2, True, -0.05 * row.row) for row in examples]

    def default_decoding(self, task: str) -> Decoding:
        return Decoding()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for name, rgb in {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}.items():
        Image.new("RGB", (300, 200), rgb).save(tmp_path / f"{name}.png")
        rows += [{"image": f"{name}.png", "question": f"which <i>colour</i> {n}?", "answer": name} for n in range(3)]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def report_of(data: Path, **options: Any) -> str:
    page = data.parent / "report.html"
    evaluate(cast(Any, Reader()), data, report=page, **options)
    return page.read_text(encoding="utf-8")


def test_the_page_says_what_was_scored(data: Path) -> None:
    text = report_of(data, controls=True)
    for part in (
        "<title>reader on data.jsonl</title>", "What the controls say", "The same questions on grey pictures would",
        "Calibration", "Which answer was taken for which", "By question", "Wrong, and the surest of it",
        "The least certain", "said: &lt;b&gt;bold&lt;/b&gt;", "which &lt;i&gt;colour&lt;/i&gt; 0?", "greedy, 32 tokens",
    ):  # fmt: skip
        assert part in text, part
    assert "<b>bold" not in text and "<i>colour" not in text


def test_the_page_stands_by_itself(data: Path) -> None:
    text = report_of(data)
    assert "default-src 'none'" in text and "<script" not in text
    assert not re.findall(r"""(?:src=|href=|url\()["']?(?!["']?data:)""", text)
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    assert len(pictures) == 1 + 9 and max(map(len, pictures)) < 20_000
    assert text.count("data:image/svg+xml;base64,") == 2
    assert len(text) < 400_000
    assert "--controls asks without them" in text


def test_whatever_is_in_a_row_is_escaped() -> None:
    example = Example((), NASTY, (NASTY, "no"), "", "1", context=NASTY, choices=(NASTY, "no"), kind=NASTY, row=3)
    scores = {
        "n": 1,
        "exact_match": 0.0,
        "by_kind": {NASTY: {"n": 2, "exact_match": 0.0}, "b": {"n": 2, "exact_match": 1}},
    }
    against = {
        "name": NASTY, "first": 0.0, "second": 1.0, "difference": 1.0, "difference_low": None, "difference_high": None,
        "both": 0, "first_only": 0, "second_only": 1, "neither": 0, "mcnemar_p": 1.0,
    }  # fmt: skip
    report = Report(
        NASTY, [(NASTY, NASTY)], "exact_match", scores | {"against": against}, [Answered(example, NASTY, 0.5, 0.0)]
    )
    text = evaluation_page(report)
    text.encode()
    assert "<script" not in text and '"quoted"' not in text and text.count("&lt;script&gt;") >= 10


def test_captions_and_probes_have_pages_too(data: Path) -> None:
    captions = [{"image": f"{name}.png", "caption": f"{name} all over"} for name in ("red", "green", "blue")]
    text = report_of(write_jsonl(data.parent / "captions.jsonl", captions), task="caption", controls=True)
    assert "The worst captions" in text and "CIDEr" in text and "Calibration" not in text
    probes = [{"image": "red.png", "question": f"is it {n}?", "answer": "yes"} for n in range(2)]
    text = report_of(write_jsonl(data.parent / "probes.jsonl", probes), task="probes")
    assert "F1 of yes" in text and "answered with yes" in text


def test_only_a_page_is_replaced(data: Path) -> None:
    report_of(data)
    report_of(data)  # an earlier page
    (data.parent / "mine.html").write_text("<html>my own</html>")
    for name, told in (
        ("mine.html", "another file stands there"),
        ("none/report.html", "there is no folder"),
        ("report.pdf", "name a file that ends in .html"),
    ):
        with pytest.raises(UserError, match=told):
            evaluate(cast(Any, Reader()), data, report=data.parent / name)
    assert (data.parent / "mine.html").read_text() == "<html>my own</html>"


def test_verdicts_follow_the_intervals() -> None:
    scores = {
        "n": 50, "pictures": 40, "in_training": 3, "exact_match": 0.8, "confidence": 0.95,
        "expected_calibration_error": 0.15, "commonest_answer": 0.85, "over_commonest": -0.05,
        "over_commonest_low": -0.1, "over_commonest_high": -0.01, "blank_exact_match": 0.5, "over_blank": 0.3,
        "over_blank_low": 0.2,
        "over_blank_high": 0.4, "shuffled_exact_match": 0.78, "over_shuffled": 0.02, "over_shuffled_low": -0.1,
        "over_shuffled_high": 0.1,
    }  # fmt: skip
    blank, shuffled, commonest, learned, sure = verdicts(scores, "exact_match")
    assert blank.endswith("is 30.0 points above that (95 % interval 20.0 to 40.0), which is more than chance.")
    assert "no more than chance: the answers may not come from these pictures" in shuffled
    assert commonest.endswith("5.0 points below that (95 % interval -10.0 to -1.0): a table of answers may do as well.")
    assert learned == "3 of the 40 pictures were learned from too, so the scores flatter."
    assert "it is surer than it is right" in sure
    right = verdicts({**scores, "confidence": 0.81}, "exact_match")[-1]
    assert "about as sure as it is right" in right
    assert "more often right than it is sure" in verdicts({**scores, "confidence": 0.5}, "exact_match")[-1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser_on_a_phone(data: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    report_of(data, controls=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked, said = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto((data.parent / "report.html").as_uri())
        assert [url for url in asked if not url.startswith(("data:", "file:"))] == [] and said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        sizes = page.evaluate("[...document.images].map(one => one.naturalWidth)")
        assert len(sizes) == 2 + 3 + 9 - 2 and min(sizes) > 0
        browser.close()
