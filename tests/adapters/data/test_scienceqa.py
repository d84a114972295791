"""ScienceQA's files, as a test writes them, and its columns, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.data.scienceqa import ScienceProblem, read_scienceqa
from adapters.evaluation.scienceqa import COLUMNS, choice_of, score_scienceqa
from qformer.errors import UserError

NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"


def problem(question: str, answer: int, subject: str, grade: str, **fields: Any) -> dict[str, Any]:
    return {
        "question": question,
        "choices": ["the first", "the second", "the third"],
        "answer": answer,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": grade,
        "subject": subject,
        "topic": "some topic",
        "category": "Some category",
        "skill": "Some skill",
        "lecture": "",
        "solution": "",
        "split": "test",
    } | fields


PROBLEMS = {
    "3": problem("Which jar is warmest?", 0, NATURAL, "grade2", image="image.png", hint="Warm air rises.\nLook."),
    "14": problem("Which metal rusts?", 1, NATURAL, "grade7", lecture="Iron rusts.", solution="A nail is iron."),
    "15": problem("Which town is on the coast?", 2, SOCIAL, "grade6", image="image.png", solution="See the map."),
    "92": problem("Which word is a verb?", 0, LANGUAGE, "grade12", choices=["run", "red"], topic="grammar"),
    "65": problem("Where does it lead?", 1, LANGUAGE, "grade1", hint="The road to the mill.", lecture="Read it."),
    "653": problem("Which is a mammal?", 0, NATURAL, "grade3", split="train", image="image.png"),
}
SPLITS = {"train": ["653"], "val": [], "test": ["15", "3", "14", "92", "65"], "minitest": ["92", "3"]}


def write(folder: Path, problems: object = PROBLEMS, splits: object = SPLITS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write(tmp_path / "scienceqa")
    for name in ("test/3", "test/15", "train/653"):
        (root / "images" / name).mkdir(parents=True)
        (root / "images" / name / "image.png").write_bytes(b"a picture")
    return root


# -- reading ---------------------------------------------------------------------------------------------------------


def test_problems_of_a_split_in_its_order(folder: Path) -> None:
    found = read_scienceqa(folder, "test")
    assert [one.id for one in found] == ["15", "3", "14", "92", "65"]
    assert found[1] == ScienceProblem(
        id="3",
        question="Which jar is warmest?",
        context="Warm air rises.\nLook.",
        choices=("the first", "the second", "the third"),
        rationale="",
        answer_index=0,
        answer="the first",
        image=folder / "images" / "test" / "3" / "image.png",
        subject=NATURAL,
        grade="grade2",
        split="test",
        topic="some topic",
    )
    assert [one.rationale for one in found] == ["See the map.", "", "Iron rusts. A nail is iron.", "", "Read it."]
    assert [one.letter for one in found] == ["(C)", "(A)", "(B)", "(A)", "(B)"]
    assert (found[3].image, found[3].answer, found[3].topic) == (None, "run", "grammar")
    assert [one.id for one in read_scienceqa(str(folder), "minitest")] == ["92", "3"]
    assert read_scienceqa(folder, "val") == ()


def test_pictures_beside_the_files_or_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "images").rename(tmp_path / "elsewhere")
    (found,) = read_scienceqa(folder, "train", images=tmp_path / "elsewhere")
    assert found.image == tmp_path / "elsewhere" / "train" / "653" / "image.png"
    for part in ("train", "test"):
        (tmp_path / "elsewhere" / part).rename(folder / part)
    (found,) = read_scienceqa(folder, "train")
    assert found.image == folder / "train" / "653" / "image.png"


def test_a_missing_picture_is_an_error_unless_none_are_needed(folder: Path) -> None:
    (folder / "images" / "test" / "3" / "image.png").unlink()
    with pytest.raises(UserError, match=r"problems.json problem 3: its picture .*test/3/image.png is not there"):
        read_scienceqa(folder, "test")
    found = read_scienceqa(folder, "test", need_images=False)
    assert found[1].image == folder / "images" / "test" / "3" / "image.png"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": 3}, "'answer' is 3, of 3 choices: write 0 to 2"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": "B"}, "'answer' is text (B)"),
        ({"answer": True}, "'answer' is true or false"),
        ({"choices": "one, two"}, "'choices' is text (one, two): write a list of texts"),
        ({"choices": ["one", 2]}, "'choices' is a list"),
        ({"choices": ["one"]}, "1 'choices': give from 2 to 10"),
        ({"question": " "}, "'question' is empty: fill it in"),
        ({"hint": None}, "'hint' is null"),
        ({"image": 7}, "'image' is a number (7)"),
        ({"subject": "science"}, "'subject' is 'science': take one of natural science, social science"),
        ({"grade": "grade13"}, "'grade' is 'grade13': take one of grade1"),
        ({"split": "minitest"}, "'split' is 'minitest': take one of train, val, test"),
    ],
)
def test_a_bad_field_is_named(folder: Path, fields: dict[str, Any], said: str) -> None:
    write(folder, PROBLEMS | {"14": PROBLEMS["14"] | fields})
    with pytest.raises(UserError) as caught:
        read_scienceqa(folder, "test")
    assert str(caught.value).startswith(f"{folder / 'problems.json'} problem 14: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_scienceqa(folder, "train")  # another split is not disturbed


def test_files_that_are_missing_or_broken(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no list 'dev': take one of train, val, test, minitest"):
        read_scienceqa(folder, "dev")
    write(folder, splits=SPLITS | {"test": [15, 9]})  # ids as numbers are read; 9 is no problem
    with pytest.raises(UserError, match=r"pid_splits.json: 'test' names problem 9, which .*problems.json lacks"):
        read_scienceqa(folder, "test")
    write(folder, {name: fields for name, fields in PROBLEMS.items() if name != "3"} | {"3": "lost"})
    with pytest.raises(UserError, match=r"problem 3 is text \(lost\)"):
        read_scienceqa(folder, "test")
    write(folder, {"3": {name: value for name, value in PROBLEMS["3"].items() if name != "hint"}}, {"test": ["3"]})
    with pytest.raises(UserError, match=r"problem 3: field 'hint' is missing: add it"):
        read_scienceqa(folder, "test")
    write(folder, [])
    with pytest.raises(UserError, match=r"problems.json holds a list, not an object"):
        read_scienceqa(folder, "test")
    (folder / "problems.json").write_text('{"3": ')
    with pytest.raises(UserError, match=r"problems.json is broken \(Expecting value: line 1 column 7"):
        read_scienceqa(folder, "test")
    (folder / "problems.json").unlink()
    with pytest.raises(UserError, match=r"problems.json is not there"):
        read_scienceqa(folder, "test")


# -- scores ----------------------------------------------------------------------------------------------------------


def test_columns_as_the_authors_count_them(folder: Path) -> None:
    problems = read_scienceqa(folder, "test")
    # 15: social, picture, grade 6 | 3: natural, hint and picture, grade 2 | 14: natural, neither, grade 7
    # 92: language, neither, grade 12 | 65: language, hint, grade 1
    scores = score_scienceqa(["The answer is (C).", "(B)", "(B)", "(A)", "(A)"], problems)
    assert scores == {
        "n": 5,
        "no_choice": 0,
        "NAT": 50.0,  # 14 of 3 and 14
        "SOC": 100.0,
        "LAN": 50.0,  # 92 of 92 and 65
        "TXT": 0.0,  # of 3 and 65
        "IMG": 50.0,  # 15 of 15 and 3
        "NO": 100.0,  # 14 and 92
        "G1-6": 33.33,  # 15 of 15, 3 and 65
        "G7-12": 100.0,
        "Avg": 60.0,
    }
    assert list(scores)[2:] == list(COLUMNS)
    perfect = score_scienceqa([one.letter for one in problems], problems)
    assert {perfect[column] for column in COLUMNS} == {100.0}


def test_a_column_without_problems_is_absent(folder: Path) -> None:
    scores = score_scienceqa(["(A)"], read_scienceqa(folder, "train"))
    assert set(scores) == {"n", "no_choice", "NAT", "IMG", "G1-6", "Avg"}
    assert score_scienceqa([], []) == {"n": 0, "no_choice": 0}
    with pytest.raises(ValueError):
        score_scienceqa([], read_scienceqa(folder, "train"))


def test_what_names_no_choice_is_wrong_and_counted(folder: Path) -> None:
    problems = read_scienceqa(folder, "test")
    scores = score_scienceqa(["", "warm", "(A) or (B)", "(C)", "(B)"], problems)  # 92 has two choices only
    assert (scores["no_choice"], scores["Avg"]) == (4, 20.0)


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("(A)", 0),
        ("The answer is (B).", 1),
        ("The answer is (B). So (B) it is", 1),
        ("C", 2),
        ("c.", 2),
        ("(a)", None),
        ("The answer is B.", 1),
        ("the answer is b", 1),
        ("(D)", None),
        ("(A) (B)", None),
        ("A dog", None),
        ("Because", None),
        ("", None),
    ],
)
def test_letters(said: str, place: int | None) -> None:
    assert choice_of(said, 3) == place
