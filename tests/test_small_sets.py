"""The small data sets that fine-tuning is measured on, and the probe of an adapter's stages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from scripts_as_modules import load_script
from tiny import draw_data, tiny_values

from adapters.data.reading import read_data
from adapters.finetune import finetune
from adapters.recipe import parse_recipe


def make(patch: pytest.MonkeyPatch, *words: str) -> None:
    script = load_script("make_small_sets", patch)
    patch.setattr("sys.argv", ["make_small_sets.py", *words])
    script.main()


def test_gauges_are_drawn_alike_and_their_answers_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(monkeypatch, "gauges", "--train", "6", "--test", "2", "--out", str(tmp_path / name))
    rows = [json.loads(line) for line in (tmp_path / "one" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and read_data(tmp_path / "one" / "test.jsonl").task == "vqa"
    for file in ("train.jsonl", "test.jsonl", "images/0000.png", "images/0007.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    script = load_script("make_small_sets", monkeypatch)
    for row in rows:
        pixels = Image.open(tmp_path / "one" / row["image"]).convert("RGB")
        if row["kind"] == "tallest colour":  # the first coloured row of the chart, from its top
            colours = {rgb: name for name, rgb in script.COLOURS.items()}
            seen = (pixels.getpixel((x, y)) for y in range(256) for x in range(256))
            assert next(colours[rgb] for rgb in seen if rgb in colours) == row["answer"]
        elif row["kind"] == "count":
            found = {pixels.getpixel((x, y)) for x in range(256) for y in range(26, 215)} & set(script.COLOURS.values())
            assert str(len(found)) == row["answer"]


def test_kinds_come_from_captions_and_no_picture_is_in_both_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for part, names in (("train", ["A cup .", "A pair of shorts ."] * 6), ("val", ["An ant ."] * 3)):
        rows = [{"image": f"{part}{number}.png", "captions": [name]} for number, name in enumerate(names)]
        for row in rows:
            (tmp_path / str(row["image"])).write_bytes(b"x")
        (tmp_path / f"captions_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(
        monkeypatch, "kinds", str(tmp_path), "--kinds", "cup", "Shorts", "--per-kind", "5", "--out", str(tmp_path / "k")
    )
    parts = {
        part: [json.loads(line) for line in (tmp_path / "k" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    }
    assert [len(rows) for rows in parts.values()] == [6, 4]  # of five each, 30 % and rounded
    assert {row["answer"] for row in parts["train"]} == {"cup", "shorts"}
    assert not {row["image"] for row in parts["train"]} & {row["image"] for row in parts["test"]}
    with pytest.raises(SystemExit, match="no pictures of zebra"):
        make(monkeypatch, "kinds", str(tmp_path), "--kinds", "zebra", "--out", str(tmp_path / "k"))


@pytest.mark.usefixtures("cache_here")
def test_every_stage_of_an_adapter_is_probed(
    vision_folder: Path,
    language_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = draw_data(tmp_path / "data")
    values = tiny_values(vision_folder, language_folders["llama"], data, max_steps=2)
    finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    script = load_script("probe_stages", monkeypatch)
    words = ["probe_stages.py", str(tmp_path / "run"), "--train", str(data), "--test", str(data)]
    monkeypatch.setattr("sys.argv", words)
    assert script.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].strip() for line in lines] == [
        "features of the first tower", "features of all towers", "after the norm", "queries", "projection",
        "the adapter",
    ]  # fmt: skip
    first = re.fullmatch(r".*? (\d+\.\d)%", lines[0])
    assert first is not None and float(first[1]) > 80  # plain colours, and the probe has seen them
    monkeypatch.setattr("sys.argv", [*words[:1], "nowhere", *words[2:]])
    assert script.main() == 2
    assert "nowhere" in capsys.readouterr().err
