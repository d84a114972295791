"""Dialogues whose second turn needs the first: what their questions and answers say, and where their pictures lie."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from data_rows import write_jsonl
from scripts_as_modules import load_script

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.reading import read_data


def answer_to(question: str, shape: str, color: str) -> str:
    """What is right of a thing."""
    if question.startswith("what"):
        return shape if "shape" in question else color
    return "yes" if question.removesuffix("?").split()[-1] in (shape, color) else "no"


def test_dialogues_need_their_first_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, rng = load_script("make_dialogues", monkeypatch), random.Random(0)
    images = [ImageRef(str(n), path=tmp_path / f"{n}.png") for n in range(4)]
    said = [
        (0, "what is the color of the circle?", "red"),
        (1, "what shape is present?", "triangle"), (1, "is there not a blue shape?", "no"),
        (2, "is there a red shape?", "no"), (2, "is there a circle?", "yes"),
        (3, "is there no teal shape?", "yes"), (3, "what is the gray shape?", "rectangle"),
    ]  # fmt: skip
    things = script.things_in(Example((images[n],), asked, (answer,), "", "") for n, asked, answer in said)
    assert things == {
        images[0].path: ("circle", "red"), images[1].path: ("triangle", "blue"), images[3].path: ("rectangle", "gray"),
    }  # fmt: skip
    for number, ref in enumerate(images):
        assert ref.path is not None
        ref.path.write_bytes(bytes([number]))
    of = {ref.digest(): things[ref.path] for ref in images if ref.path in things}
    made = [
        (path, script.about_a_thing(kind, *thing, rng))
        for path, thing in things.items() for _ in range(40) for kind in ("other", "wrong", "second")
    ]  # fmt: skip
    count = script.write_dialogues(tmp_path, "train", made)
    talks, alone = (read_data(tmp_path / f"{name}.jsonl").examples for name in ("train", "train_alone"))
    assert (count, len(talks), len(alone)) == (360, 720, 720)
    for talk, one in zip(talks, alone, strict=True):
        assert (talk.question, talk.answer, talk.kind) == (one.question, one.answer, one.kind)
    by_question: dict[object, set[str]] = {}
    for talk in talks:
        if talk.kind == "turn 2":
            by_question.setdefault((talk.images, talk.question), set()).add(talk.answer)
            shape, color = of[talk.images[0].digest()]
            first, reply = talk.history[0].text, talk.history[1].text
            if talk.question == "and the other one?":
                assert {reply, talk.answer} == {shape, color}
            elif talk.question == "and the second?":
                asked, other = first.removeprefix("first: ").removesuffix(" answer the first.").split(" second: ")
                assert (reply, talk.answer) == (answer_to(asked, shape, color), answer_to(other, shape, color))
            else:
                named = (shape in first, color in first)
                right = {"nothing": named == (True, True), "both": named == (False, False)}
                right |= {"the color": named == (True, False), "the shape": named == (False, True)}
                assert right[talk.answer] and sum(right.values()) == 1 and (reply == "yes") == right["nothing"]
    assert all(len(answers) > 1 for answers in by_question.values())  # the picture and the turn alone do not settle it


def test_dialogues_from_questions_of_any_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load_script("make_dialogues", monkeypatch)
    (tmp_path / "in").mkdir()
    asked = {"a.png": ["red", "red", "blue", "two"], "b.png": ["red", "red"], "c.png": ["one"]}
    rows = []
    for name, answers in asked.items():
        (tmp_path / "in" / name).write_bytes(name.encode())
        rows += [{"image": name, "question": f"{n} of {name}?", "answer": text} for n, text in enumerate(answers)]
    data = read_data(write_jsonl(tmp_path / "in" / "rows.jsonl", rows)).examples
    made = script.dialogues_from_questions(data, each=2, seed="0")
    assert made and all(path.name == "a.png" and first[1] != second[1] for path, (first, second) in made)
    script.write_dialogues(tmp_path / "out", "test", made)
    talks = read_data(tmp_path / "out" / "test.jsonl").examples  # the pictures came along
    assert len(talks) == 2 * len(made) and talks[0].images[0].path == tmp_path / "out" / "test" / "00000.png"
