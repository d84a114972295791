"""The page that a finished run leaves: the best validation's answers, without asking again, whatever their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import draw_captions, draw_data, tiny_values

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.finetune import finetune
from adapters.recipe import parse_recipe
from adapters.training import run_report
from adapters.training.controls import ValidationAnswers
from adapters.training.run_report import MOST_ROWS, NAME, RunReport

pytestmark = pytest.mark.usefixtures("cache_here")


def test_the_best_validation_is_shown_and_nothing_is_asked_again(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "reply_to_examples", None)  # what validation answered is enough
    values = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"), max_steps=2)
    out = tmp_path / "run"
    result = finetune(parse_recipe(values, "test"), out, device="cpu", dtype="float32", quiet=True)
    text = (out / NAME).read_text(encoding="utf-8")
    exact = f"{result.metrics['val_exact_match']:.1%}".replace("%", " %")
    assert exact in text and "run: validation" in text and "of step 2, the best" in text
    for words in ("on grey pictures would score", "commonest answer in training", "Calibration",
                  "Wrong, and the surest of it", "The least certain", "linear probe", "data:image/"):  # fmt: skip
        assert words in text, words
    assert "http:" not in text and "https:" not in text  # nothing is fetched
    before = (out / NAME).read_bytes()
    finetune(parse_recipe(values, "test"), out, device="cpu", dtype="float32", quiet=True, resume=True)
    assert (out / NAME).read_bytes() == before  # a finished run has nothing new to say


def test_captions_are_written_for_it(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "MOST_CAPTIONS", 2)
    data = draw_captions(tmp_path / "data")
    values: Any = tiny_values(vision_folder, language_folders["llama"], data, max_steps=1)
    values["task"] = "caption"
    values["bridge"]["reader"] = None
    finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    text = (tmp_path / "run" / NAME).read_text(encoding="utf-8")
    assert "CIDEr" in text and "The worst captions" in text and "2 of " in text


def test_the_page_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = ImageRef("a", data=b"P6\n2 2\n255\n" + bytes(12))
    rows = [Example((picture,), f"what is {n}?", (str(n % 40),), "file row", str(n), row=n) for n in range(20_000)]
    report: Any = object.__new__(RunReport)
    recipe = type("R", (), {"task": "vqa", "data": type("D", (), {"match": "exact"})})
    data = type("S", (), {"examples": rows[:50], "name": "rows"})
    options = type("O", (), {"out": tmp_path})
    report._opened = type("Opened", (), {"recipe": recipe, "train": data, "val": data, "options": options})
    position: Any = type("P", (), {"step": 3, "best_step": 3})
    report._newest = report._kept = None
    report.take(ValidationAnswers(rows, ["7"] * 20_000, [0.5] * 20_000, ["7"] * 20_000))
    report.validated(position)
    out = report.write(position, {"val_linear_probe": 0.25})
    text = out.read_text(encoding="utf-8")
    assert f"{MOST_ROWS:,} of " in text and "25.0% exact answers" in text and len(text) < 2 * 2**20
