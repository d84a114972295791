"""Probes, captions, controls and comparisons, with adapters that say what the test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from command import Call
from data_rows import read_jsonl, write_jsonl
from PIL import Image

from adapters.data.examples import Example
from adapters.data.image_ref import blank_image
from adapters.data.images import open_image
from adapters.inference.request import Completion
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.evaluation.predictions import compare_predictions
from serve.evaluation.run import evaluate

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "black": (5, 5, 5)}
SURE, UNSURE = -0.1, -1.0


class Stub:
    """Answers by a function of the row; it is unsure of everything about grey pictures."""

    def __init__(self, says: Callable[[Example], str], name: str = "stub") -> None:
        self.says, self.name = says, name

    def reply(self, examples: list[Example], task: str, **_: object) -> list[Completion]:
        grey = blank_image().digest()
        return [
            Completion(self.says(row), 2, True, UNSURE if row.images[0].digest() == grey else SURE) for row in examples
        ]

    def default_decoding(self, task: str) -> Decoding:
        return Decoding()


def colour_of(example: Example) -> str:
    """The colour of the picture's corner; "red" of a grey one."""
    pixel = open_image(example.images[0]).getpixel((0, 0))
    return next((name for name, rgb in COLOURS.items() if rgb == pixel), "red")


SEES = Stub(colour_of)
BLIND = Stub(lambda example: "red", "blind")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Two questions on each of four plain pictures."""
    rows = []
    for name, rgb in COLOURS.items():
        Image.new("RGB", (20, 20), rgb).save(tmp_path / f"{name}.png")
        rows += [{"image": f"{name}.png", "question": question, "answer": name} for question in ("what?", "which?")]
    return write_jsonl(tmp_path / "colours.jsonl", rows)


def score(adapter: Stub, data: Path, **options: Any) -> dict[str, Any]:
    return evaluate(cast(Any, adapter), data, **options)


def test_controls_tell_seeing_from_guessing(colours: Path) -> None:
    seeing = score(SEES, colours, controls=True)
    assert (seeing["exact_match"], seeing["blank_exact_match"], seeing["shuffled_exact_match"]) == (1.0, 0.25, 0.0)
    assert seeing["over_blank"] == 0.75 and 0.25 <= seeing["over_blank_low"] <= seeing["over_blank_high"] == 1.0
    assert (seeing["over_shuffled"], seeing["over_shuffled_low"], seeing["over_shuffled_high"]) == (1.0, 1.0, 1.0)
    blind = score(BLIND, colours, controls=True)
    assert (blind["exact_match"], blind["over_blank"], blind["over_shuffled"]) == (0.25, 0.0, 0.0)
    assert "over_commonest" not in blind  # the training's answers are not here
    assert seeing["anls"] == 1.0 and seeing["confidence"] == pytest.approx(0.9048, abs=1e-4)
    assert seeing["expected_calibration_error"] == pytest.approx(1 - 0.9048, abs=1e-4)


def test_one_picture_cannot_be_shuffled(colours: Path) -> None:
    with pytest.raises(UserError, match="there is one picture"):
        score(SEES, colours, controls=True, limit=2)


def test_an_answer_that_all_gave_is_compared_as_written(colours: Path) -> None:
    data = write_jsonl(colours.parent / "ten.jsonl", [{"image": "red.png", "question": "?", "answer": ["red"] * 10}])
    told: list[str] = []
    found = score(Stub(lambda example: "Red"), data, tell=told.append)
    assert (found["exact_match"], found["vqa_accuracy"]) == (1.0, 0.0)
    assert any(line.startswith("vqa_accuracy counts 1 answers as wrong") for line in told)


def test_two_adapters_on_the_same_rows(colours: Path) -> None:
    found = score(SEES, colours, against=BLIND)["against"]
    assert (found["name"], found["first"], found["second"]) == ("blind", 1.0, 0.25)
    assert (found["both"], found["first_only"], found["second_only"], found["neither"]) == (2, 6, 0, 0)
    assert found["difference"] == -0.75 and found["difference_high"] <= -0.25
    assert found["mcnemar_p"] == pytest.approx(2 / 2**6)


def test_files_of_predictions_are_compared(colours: Path, call: Call) -> None:
    folder = colours.parent
    score(SEES, colours, predictions=folder / "a.jsonl")
    score(BLIND, colours, predictions=folder / "b.jsonl")
    compared = call("compare", folder / "a.jsonl", folder / "b.jsonl", "--json").values
    assert (compared["measure"], compared["n"], compared["pictures"]) == ("exact_match", 8, 4)
    inside = {key: value for key, value in score(SEES, colours, against=BLIND)["against"].items() if key != "name"}
    assert {key: compared[key] for key in inside} == pytest.approx(inside)
    assert compared["vqa_accuracy_difference"] == -0.75
    text = call("compare", folder / "a.jsonl", folder / "b.jsonl").out
    assert "75.0 points fewer" in text and "p = 0.0312 (McNemar's exact test" in text and "more than chance." in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[:-1], "a.jsonl has 8 rows and"),
        (lambda rows: [{**rows[0], "question": "why?"}, *rows[1:]], "line 1: 'question' is 'why?', but 'what?' in"),
        (lambda rows: [{**rows[0], "image": "x.png"}, *rows[1:]], "line 1: 'image' is 'x.png'"),
        (lambda rows: [{**row, "right": None} for row in rows], "line 1: 'right' is None; write the file with"),
        (lambda rows: [{"image": "red.png"}], "line 1: this is no prediction"),
        (lambda rows: [], "holds no predictions"),
    ],
)
def test_predictions_that_cannot_be_compared(change: Any, told: str, colours: Path, call: Call) -> None:
    folder = colours.parent
    score(SEES, colours, predictions=folder / "a.jsonl")
    write_jsonl(folder / "b.jsonl", change(read_jsonl(folder / "a.jsonl")))
    assert told in call("compare", folder / "a.jsonl", folder / "b.jsonl").mistake()
    assert "cannot be read" in call("compare", folder / "a.jsonl", folder / "none.jsonl").mistake()


@pytest.fixture
def probes(colours: Path) -> Path:
    """Is each picture red, is it blue: of the eight, two are right with yes."""
    rows = [
        {"image": f"{name}.png", "question": f"is it {asked}?", "answer": "yes" if asked == name else "no",
         "kind": "random" if asked == "red" else "popular"}
        for name in COLOURS
        for asked in ("red", "blue")
    ]  # fmt: skip
    return write_jsonl(colours.parent / "probes.jsonl", rows)


def test_probes_by_hand(probes: Path, tmp_path: Path) -> None:
    def says(example: Example) -> str:
        if "red" in example.question:
            return "yes"  # four times, once right
        return "yes" if colour_of(example) == "blue" else "No, it is not."

    found = score(Stub(says), probes, task="probes", predictions=tmp_path / "p.jsonl", controls=True)
    assert (found["n"], found["accuracy"], found["precision"], found["recall"]) == (8, 5 / 8, 2 / 5, 1.0)
    assert (found["F1"], found["yes_rate"], found["unclear"]) == (pytest.approx(4 / 7), 5 / 8, 0)
    assert found["by_kind"]["popular"]["accuracy"] == 1.0 and found["by_kind"]["random"]["precision"] == 0.25
    assert (found["blank_accuracy"], found["blank_yes_rate"]) == (0.5, 0.5)  # grey is "red": "yes", and never blue
    assert found["over_blank"] == 1 / 8
    assert [line["right"] for line in read_jsonl(tmp_path / "p.jsonl")] == [True, True, False, True] + [False, True] * 2


def test_probes_take_yes_and_no_alone(colours: Path, probes: Path) -> None:
    with pytest.raises(UserError, match=r"row 1 .*the answer is 'red', and probes take yes or no"):
        score(SEES, colours, task="probes")
    told: list[str] = []
    found = score(Stub(lambda example: "perhaps"), probes, task="probes", tell=told.append)
    assert (found["unclear"], found["yes_rate"]) == (8, 1.0)
    assert "8 answers say neither yes nor no, such as 'perhaps'; as in POPE, they count as yes" in told


def test_captions_with_controls_and_predictions(colours: Path, tmp_path: Path, call: Call) -> None:
    rows = [{"image": f"{name}.png", "captions": [f"a {name} square", f"one {name} thing here"]} for name in COLOURS]
    data = write_jsonl(colours.parent / "captions.jsonl", rows)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    sees = Stub(lambda example: f"a {colour_of(example)} square")
    found = score(sees, data, task="caption", controls=True, predictions=paths[0])
    assert found["CIDEr_low"] <= found["CIDEr"] <= found["CIDEr_high"]
    assert found["over_blank"] == pytest.approx(found["CIDEr"] - found["blank_CIDEr"])
    lines = read_jsonl(paths[0])
    assert sum(line["CIDEr"] for line in lines) / 4 == pytest.approx(found["CIDEr"], abs=1e-5)
    assert lines[0]["answer"] == ["a red square", "one red thing here"] and "question" not in lines[0]
    score(Stub(lambda example: "a red square"), data, task="caption", predictions=paths[1])
    compared = compare_predictions(*paths)
    assert compared["measure"] == "CIDEr" and compared["difference"] < 0 and "mcnemar_p" not in compared
    assert call("compare", *paths).out.startswith("measure                     CIDEr\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--controls", "--blank-images"], "--blank-images is one of the --controls"),
        (["--task", "caption", "--against", "x"], "--against goes with --task vqa, probes, not caption"),
        (
            ["--task", "retrieval", "--report", "r.html"],
            "--report goes with --task vqa, probes, caption, reason, not",
        ),
        (["--task", "probes", "--match", "set"], "--match goes with --task vqa, not probes"),
        (
            ["--task", "retrieval", "--controls"],
            "--controls goes with --task vqa, probes, caption, reason, grounding, not",
        ),
        (["--boxes", "b.jsonl"], "--boxes goes with --task grounding, not vqa"),
        (["--task", "grounding", "--adapter", "x", "--boxes", "b.jsonl"], "--boxes: the file is scored as it is"),
        (["--wordnet", "."], "--wordnet .: index.noun cannot be read"),
        (["--report", "r.txt"], "--report r.txt: name a file that ends in .html"),
        (["--task", "pope"], "take vqa, probes, caption, reason, retrieval or grounding"),
    ],
)
def test_flags_that_do_not_go_together(words: list[str], told: str, colours: Path, call: Call) -> None:
    assert told in call("evaluate", colours, *words).mistake()


BOXES = [
    {"image": "red.png", "phrase": "the left", "boxes": [[0, 0, 0.5, 1]], "kind": "scene"},
    {"image": "blue.png", "phrase": "corners", "boxes": [[0, 0, 0.2, 0.2], [0.8, 0.8, 1, 1]]},
]


def test_boxes_of_some_model_are_scored(colours: Path, call: Call) -> None:
    data = write_jsonl(colours.parent / "boxes.jsonl", BOXES)
    given = [{"row": 2, "box": [0, 0, 1, 1], "point": [0.9, 0.9]}, {"row": 1, "box": [0.0, 0.0, 0.2, 1]}]
    boxes = write_jsonl(colours.parent / "given.jsonl", given)
    found = call("evaluate", data, "--task", "grounding", "--boxes", boxes, "--json").values
    assert (found["n"], found["pointing"], found["iou_0.5"]) == (2, 1.0, 0.5)
    assert (found["centre_pointing"], found["whole_iou_0.5"]) == (0.5, 1.0)
    assert list(found["by_kind"]) == ["scene"] and found["skipped"] == 0


@pytest.mark.parametrize(
    ("row", "box", "told"),
    [
        ({"boxes": [[10, 10, 50, 60]]}, {}, "the box [10, 10, 50, 60] is not four fractions"),
        ({"boxes": [[0.5, 0, 0.5, 1]]}, {}, "is empty: give four fractions"),
        ({"boxes": []}, {}, "field 'boxes' is []"),
        ({"phrase": " "}, {}, "field 'phrase' is missing or empty"),
        ({"image": "none.png"}, {}, "none.png"),
        ({}, {"row": 7}, "no box for row 1"),
        ({}, {"row": True}, "'row' is True"),
        ({}, {"box": [0, 0, 2, 2]}, "line 1: the box [0, 0, 2, 2] is not four fractions"),
        ({}, {"point": [0.5]}, "line 1: the point [0.5] is not two fractions"),
    ],
)
def test_bad_boxes_are_named(row: dict[str, Any], box: dict[str, Any], told: str, colours: Path, call: Call) -> None:
    data = write_jsonl(colours.parent / "boxes.jsonl", [BOXES[0] | row])
    boxes = write_jsonl(colours.parent / "given.jsonl", [{"row": 1, "box": [0, 0, 1, 1]} | box])
    assert told in call("evaluate", data, "--task", "grounding", "--boxes", boxes).mistake()


def test_wups_is_scored_with_a_wordnet(colours: Path, tmp_path: Path) -> None:
    from adapters.evaluation.wordnet import WordNet

    (tmp_path / "index.noun").write_text(
        "blue n 1 1 @ 1 0 00000002\ncolour n 1 0 1 0 00000001\nred n 1 1 @ 1 0 00000003\n"
    )
    (tmp_path / "data.noun").write_text(
        "00000001 03 n 01 colour 0 000 | x\n00000002 03 n 01 blue 0 001 @ 00000001 n 0000 | x\n"
        "00000003 03 n 01 red 0 001 @ 00000001 n 0000 | x\n"
    )
    told: list[str] = []
    found = score(BLIND, colours, wordnet=WordNet(tmp_path), match="set", tell=told.append)
    # right twice in eight; blue is half like red (2 · 1 / (2 + 2)); green and black have no meaning
    assert found["wups_0.0"] == pytest.approx((2 + 2 * 0.5) / 8)
    assert found["wups_0.9"] == pytest.approx((2 + 2 * 0.05) / 8)
    score(BLIND, colours, match="set", tell=told.append)
    assert told[-1] == "WUPS, DAQUAR's other score, is left out: it needs --wordnet with a folder of WordNet"
    json.dumps(found)
