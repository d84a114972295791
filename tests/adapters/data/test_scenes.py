"""Scenes as they are drawn; every answer and every sentence of every rationale, worked out anew; balance; the files."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_world import World, told

from adapters.data.reading import read_data
from adapters.data.scenes import drawing as drawn_scenes
from adapters.data.scenes import files as scene_files
from adapters.data.scenes.captions import captions_of
from adapters.data.scenes.drawing import COLOURS, GROUND, RADIUS, Scene, Thing, draw_scene, make_scenes
from adapters.data.scenes.files import write_scenes
from adapters.data.scenes.questions import KINDS, Balance, SceneQuestion, questions_of
from adapters.evaluation.rationales import language_control
from qformer.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SINGLE_STEP = {"colour", "shape", "size", "exists"}
CONTROL = 0.40  # what language alone may score; chance over the kinds is 0.36


@cache
def scenes() -> list[Scene]:
    return make_scenes(210, 3)


@cache
def everything() -> list[tuple[Scene, list[SceneQuestion]]]:
    """All that can be asked of some scenes."""
    return [(scene, [question for make in KINDS.values() for question in make(scene)]) for scene in scenes()[:36]]


@cache
def asked(first: int, last: int) -> list[SceneQuestion]:
    """Questions of some of the scenes, chosen in balance."""
    rng, balance = random.Random(first), Balance()
    return [question for scene in scenes()[first:last] for question in questions_of(scene, rng, balance)]


# -- scenes and their pictures ---------------------------------------------------------------------------------------


def test_no_two_scenes_are_alike_and_fewer_are_the_first_of_more() -> None:
    made = scenes()
    assert len({scene.key for scene in made}) == len(made) == 210
    assert make_scenes(40, 3) == made[:40]
    other = make_scenes(40, 4)
    assert other[:3] != made[:3] and not {scene.key for scene in other} & {scene.key for scene in made}


def test_a_scene_that_is_like_another_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"SHAPES": ("star", "cross"), "COLOURS": {"red": (214, 34, 40), "blue": (35, 80, 210)}}.items():
        monkeypatch.setattr(drawn_scenes, name, few)
    monkeypatch.setattr(drawn_scenes, "_CELL", 128)  # one cell: three things can be alike in 120 ways only
    assert len({scene.key for scene in make_scenes(150, 0)}) == 150


def test_a_key_tells_what_is_seen_and_not_the_order() -> None:
    things = (Thing("star", "red", "big", 40, 40), Thing("cross", "blue", "small", 90, 90))
    key = Scene(things).key
    assert Scene(things[::-1]).key == key
    assert Scene((things[0], Thing("cross", "blue", "small", 91, 91))).key == key  # too little to be another scene
    for other in (
        ("square", "blue", "small", 90, 90),
        ("cross", "red", "small", 90, 90),
        ("cross", "blue", "big", 90, 90),
    ):
        assert Scene((things[0], Thing(*other))).key != key
    assert Scene((things[0], Thing("cross", "blue", "small", 90, 20))).key != key


def test_scenes_are_as_promised() -> None:
    for scene in scenes():
        assert 3 <= len(scene.things) <= 7
        for index, thing in enumerate(scene.things):
            reach = {"big": 17, "small": 9}[thing.size]
            assert reach < thing.x < 128 - reach and reach < thing.y < 128 - reach
            for other in scene.things[:index]:
                assert math.dist((thing.x, thing.y), (other.x, other.y)) > reach + {"big": 17, "small": 9}[other.size]
    assert {len(scene.things) for scene in scenes()} == set(range(3, 8))
    assert {thing.colour for scene in scenes() for thing in scene.things} == set(COLOURS)


@pytest.mark.parametrize("size", ["big", "small"])
@pytest.mark.parametrize(
    ("shape", "area"),  # in squares of the radius
    [
        ("circle", math.pi * 0.88**2),
        ("square", 2.0),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("star", 5 * 0.42 * math.sin(math.radians(36))),
        ("cross", 8 * 0.94 * 0.32 - 4 * 0.32**2),
    ],
)
def test_each_shape_is_drawn_in_its_place_colour_and_size(shape: str, area: float, size: str) -> None:
    reach = {"big": 17, "small": 9}[size]
    picture = draw_scene(Scene((Thing(shape, "blue", size, 50, 70),)))
    assert (picture.size, picture.mode) == ((128, 128), "RGB")
    assert picture.getpixel((50, 70)) == COLOURS["blue"]
    ink = (np.asarray(picture, float) - GROUND)[..., 0] / (COLOURS["blue"][0] - GROUND[0])
    assert ink.sum() == pytest.approx(area * reach**2, rel=0.1)
    down, right = np.nonzero(ink)
    assert np.hypot(right + 0.5 - 50, down + 0.5 - 70).max() < reach + 1.5
    corner = ink[70 - round(0.6 * reach), 50 + round(0.6 * reach)]  # only these reach into it
    assert (corner > 0.5) == (shape in ("circle", "square"))
    assert ink[: 70 - reach // 2].sum() > 0.1 * reach**2
    assert (ink[70 + reach // 2 + 1 :].sum() < 1) == (shape == "triangle")  # it points up, so its side lies high


def test_colours_are_apart_from_each_other_and_from_the_ground() -> None:
    shades = [*COLOURS.values(), GROUND]
    for index, shade in enumerate(shades):
        assert all(math.dist(shade, other) > 70 for other in shades[:index])


# -- questions -------------------------------------------------------------------------------------------------------


def test_every_question_has_the_right_answer_to_the_only_thing_it_names() -> None:
    for scene, questions in everything():
        world = World(scene)
        for question in questions:
            assert world.answer(question.question) == question.answer, (question, scene)


def test_every_sentence_of_a_rationale_is_true_and_the_last_gives_the_answer() -> None:
    for scene, questions in everything():
        world = World(scene)
        for question in questions:
            sentences = re.findall(r"[^.]+\.", question.rationale)
            assert len(sentences) == question.steps
            assert (question.steps == 1) == (question.kind in SINGLE_STEP)
            for number, sentence in enumerate(sentences):
                world.check(sentence.strip(), "".join(sentences[:number]))
            assert told(question) == question.answer, question


def test_the_reference_notices_a_wrong_answer_and_a_false_step() -> None:
    world = World(Scene((Thing("star", "red", "big", 40, 40), Thing("cross", "blue", "small", 90, 90))))
    assert world.answer("Is the star left of the cross?") == "yes"
    assert world.answer("How many red shapes are there?") == "1"
    with pytest.raises(AssertionError):
        world.check("The red shapes are: star, cross.", "")
    with pytest.raises(AssertionError):
        world.check("That is 2.", "The red shapes are: star.")
    with pytest.raises(ValueError):  # there is no circle
        world.answer("What colour is the circle?")


def test_the_answer_is_among_choices_that_tell_nothing() -> None:
    choices: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for _, questions in everything():
        for question in questions:
            assert question.answer in question.choices
            choices[question.kind].add(question.choices)
    assert set(choices) == set(KINDS)
    assert all(len(found) == 1 for kind, found in choices.items() if kind != "larger")


def test_a_name_does_not_tell_what_is_asked() -> None:
    for _, questions in everything():
        for question in questions:
            words = set(re.findall(r"\w+", question.question))
            if question.kind in ("colour", "same_colour", "count_same_colour", "extreme"):
                assert not words & set(COLOURS)
            if question.kind == "larger":
                assert not words & set(RADIUS)


# -- balance ---------------------------------------------------------------------------------------------------------


def test_the_answers_of_a_kind_are_about_equally_many() -> None:
    places: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for question in asked(0, 140):
        places[question.kind][question.choices.index(question.answer)] += 1
        places[question.kind].update(dict.fromkeys(range(len(question.choices)), 0))
    assert set(places) == set(KINDS)
    for kind, counts in places.items():
        assert max(counts.values()) <= 1.25 * min(counts.values()) + 2, (kind, counts)
        assert counts.total() > 60, (kind, counts)
    for kind in ("exists", "compare_counts", "position"):
        assert 0.48 < places[kind][0] / places[kind].total() < 0.52


def test_unbalanced_choices_are_what_the_balance_mends() -> None:
    alone = [question for scene in scenes()[:140] for question in questions_of(scene, random.Random(0))]
    counts = Counter(question.answer for question in alone if question.kind == "count")
    assert max(counts.values()) > 1.25 * min(counts[str(number)] for number in range(6)) + 2


def test_language_alone_does_badly() -> None:
    scores = language_control(asked(140, 210), asked(0, 140))
    assert scores["accuracy"] < CONTROL
    kinds = {question.kind: len(question.choices) for question in asked(140, 210)}
    for kind, choices in kinds.items():
        assert scores[f"accuracy_{kind}"] < 1 / choices + 0.15, kind


# -- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_twice_the_same(tmp_path: Path) -> None:
    questions = write_scenes(tmp_path / "a", train=6, val=2, test=3, seed=5)
    write_scenes(tmp_path / "b" / "c", train=6, val=2, test=3, seed=5)
    files = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    again = {path.relative_to(tmp_path / "b/c"): path.read_bytes() for path in (tmp_path / "b/c").rglob("*.*")}
    assert files == again and len(files) == 11 + 6
    assert {part: len(rows) for part, rows in questions.items()} == {
        part: (tmp_path / "a" / f"{part}.jsonl").read_text().count("\n") for part in ("train", "val", "test")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing else is left


def test_rows_are_of_the_rationale_format_and_parts_share_no_picture(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=6, val=2, test=3, seed=5)
    made, pictures = make_scenes(11, 5), []
    for part, first, last in (("train", 0, 6), ("val", 6, 8), ("test", 8, 11)):
        lines = (tmp_path / "scenes" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert list(rows[0]) == ["image", "question", "choices", "rationale", "answer", "kind", "steps"]
        names = list(dict.fromkeys(row["image"] for row in rows))
        assert len(names) == last - first
        for name, scene in zip(names, made[first:last], strict=True):
            with Image.open(tmp_path / "scenes" / name) as picture:
                assert picture.format == "PNG" and np.array_equal(np.asarray(picture), np.asarray(draw_scene(scene)))
                pictures.append(picture.tobytes())
            for row in rows:
                if row["image"] == name:
                    assert World(scene).answer(row["question"]) == row["answer"]
        data = read_data(tmp_path / "scenes" / f"{part}.jsonl", task="vqa")
        assert [example.answers for example in data.examples] == [(row["answer"],) for row in rows]
    assert len(set(pictures)) == 11


def test_a_stopped_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(scene: Scene, left: list[int] = [2]) -> Image.Image:  # noqa: B006
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return draw_scene(scene)

    monkeypatch.setattr(scene_files, "draw_scene", drawn)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", train=3, val=1, test=1)
    assert list(tmp_path.iterdir()) == []


def test_what_a_user_may_get_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"full holds something already"):
        write_scenes(tmp_path / "full", train=1, val=1, test=1)
    monkeypatch.chdir(tmp_path / "full")
    with pytest.raises(UserError, match=r"full holds something already"):
        write_scenes(".", train=1, val=1, test=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]
    with pytest.raises(UserError, match=r"^--val 0: give a number of scenes from 1 on$"):
        write_scenes(tmp_path / "new", val=0)
    with pytest.raises(UserError, match=r"cannot write .*notes.txt/scenes"):
        write_scenes(tmp_path / "full" / "notes.txt" / "scenes", train=1, val=1, test=1)
    with pytest.raises(UserError, match=r"-1 scenes"):
        make_scenes(-1, 0)
    (tmp_path / "empty").mkdir()
    write_scenes(tmp_path / "empty", train=1, val=1, test=1)  # nothing to lose in it
    assert (tmp_path / "empty" / "train.jsonl").is_file()


def test_the_script(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_scenes.py"), str(tmp_path / "scenes")]
    numbers = ["--train", "3", "--val", "1", "--test", "2", "--seed", "7"]
    run = subprocess.run([*command, *numbers], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert f"{tmp_path / 'scenes' / 'train.jsonl'}: 3 scenes, " in run.stdout and "without the picture" in run.stdout
    again = subprocess.run([*command, *numbers], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "holds something already" in again.stderr


def test_captions_say_what_is_there() -> None:
    scene = Scene(
        (
            Thing("star", "red", "big", 20, 90),
            Thing("cross", "blue", "small", 60, 30),
            Thing("star", "blue", "small", 100, 60),
        )
    )
    assert captions_of(scene) == [
        "From left to right: big red star, small blue cross, small blue star.",
        "From top to bottom: blue cross, blue star, red star.",
        "By shape: star red blue; cross blue.",
        "By colour: red star; blue cross star.",
        "Two stars, one cross.",
    ]


def test_every_scene_has_its_captions_and_a_number_for_each_shape() -> None:
    for scene in scenes():
        across, down, *_, counts = captions_of(scene)
        for thing in scene.things:
            assert f"{thing.size} {thing.colour} {thing.shape}" in across and f"{thing.colour} {thing.shape}" in down
        assert counts.count(",") + 1 == len({thing.shape for thing in scene.things})


def test_captions_are_written_beside_the_questions(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=3, val=1, test=1)
    data = read_data(tmp_path / "scenes" / "captions_train.jsonl", task="caption")
    asked = read_data(tmp_path / "scenes" / "train.jsonl", task="reason")
    assert [len(example.answers) for example in data.examples] == [5, 5, 5]
    assert {row.images[0].path for row in asked.examples} <= {example.images[0].path for example in data.examples}
