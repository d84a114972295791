"""Scores with what explains them: groups, mistakes, predictions, and what training already knew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from command import FAST, Call
from data_rows import borrowed, read_jsonl, write_jsonl
from PIL import Image

from adapters.artefact.facts import read_facts
from adapters.data.examples import Example
from adapters.inference.request import Completion
from serve.adapter import load_adapter
from serve.cli.scores import describe_scores
from serve.evaluation.run import evaluate
from serve.evaluation.training_rows import training_rows

NOT_HERE = "the adapter's training data are not here as they were"


@pytest.fixture
def test_file(data_file: Path, tmp_path: Path) -> Path:
    """Three pictures of training (its bytes, its pixels, a near copy) and a new one."""
    shutil.copy(data_file.parent / "0.png", tmp_path / "copied.png")
    with Image.open(data_file.parent / "1.png") as picture:
        picture.save(tmp_path / "pixels.bmp")
    with Image.open(data_file.parent / "2.png") as picture:
        picture.resize((80, 80)).save(tmp_path / "near.png")
    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "new.png")
    names = ["copied.png", "pixels.bmp", "near.png", "new.png"]
    rows = [{"image": name, "question": "is it a circle?", "answer": "no", "kind": "shape"} for name in names]
    rows += [{"image": "new.png", "question": "how many?", "answer": ["one", "one", "two"]}]
    return write_jsonl(tmp_path / "test.jsonl", rows)


@pytest.fixture
def taught(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, with every picture of the file learned from: none is held out."""
    from adapters.artefact.artefact import read_recipe
    from adapters.artefact.facts import read_facts, save_facts
    from adapters.recipe import parse_recipe
    from adapters.training.setup import read_split

    folder = tmp_path / "taught"
    shutil.copytree(run_folder / "best", folder)
    values = read_recipe(folder).model_dump(mode="json")
    values["data"]["val"] = values["data"]["train"]
    recipe = parse_recipe(values, "test")
    (folder / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    facts = read_facts(folder)
    facts.data["fingerprint"] = read_split(recipe)[0].fingerprint  # type: ignore[index]
    save_facts(folder, facts)
    return folder


def test_pictures_of_training_are_counted_and_named(call: Call, taught: Path, test_file: Path) -> None:
    scored = call("evaluate", test_file, "--adapter", taught, "--json", *FAST)
    assert scored.values["in_training"] == 3 and scored.values["pictures"] == 4
    (warning,) = [line for line in scored.err.splitlines() if line.startswith("warning")]
    assert warning == (
        "warning: 3 of the pictures are in the training data too, so the scores flatter: copied.png is 0.png (the same"
        " bytes); pixels.bmp is 1.png (the same pixels); near.png is 2.png (a near copy)"
    )
    assert call("evaluate", test_file, "--adapter", taught, "--json", "--quiet", *FAST).err == ""


def test_the_commonest_answer_is_trainings(call: Call, taught: Path, test_file: Path) -> None:
    """Training says "no" and "yes" six times each to the question, "no" first; "how many?" is never asked there."""
    found = call("evaluate", test_file, "--adapter", taught, "--json", "--quiet", *FAST).values
    assert found["commonest_answer_from"] == "training"
    assert found["commonest_answer"] == pytest.approx(4 / 5)


def test_without_the_training_data_the_tests_answers_count(call: Call, taught: Path, test_file: Path) -> None:
    recipe = (taught / "recipe.yaml").read_text(encoding="utf-8")
    train = next(line.split(": ", 1)[1] for line in recipe.splitlines() if line.strip().startswith("train: "))
    (taught / "recipe.yaml").write_text(recipe.replace(train, "gone.jsonl"), encoding="utf-8")
    scored = call("evaluate", test_file, "--adapter", taught, "--json", *FAST)
    assert NOT_HERE in scored.err
    found = scored.values
    assert (found["commonest_answer_from"], found["commonest_answer"], found["in_training"]) == ("test", 1.0, None)
    plain = call("evaluate", test_file, "--adapter", taught, "--quiet", *FAST).out
    assert "in_training                 unknown\n" in plain


def test_data_that_have_changed_are_not_the_trainings(taught: Path, test_file: Path) -> None:
    engine = load_adapter(taught, device="cpu", dtype="float32", offline=True)
    rows = training_rows(engine)
    assert rows is not None and len(rows.examples) == 24
    engine.facts.data["fingerprint"] = "sha256:0"  # type: ignore[index]
    assert training_rows(engine) is None


def test_what_was_held_out_was_not_learned_from(call: Call, run_folder: Path, data_file: Path) -> None:
    """A fifth of twelve pictures is held out: two."""
    found = call("evaluate", data_file, "--adapter", run_folder, "--json", "--quiet", *FAST).values
    assert (found["pictures"], found["in_training"]) == (12, 10)


def test_groups_and_mistakes_are_counted(call: Call, taught: Path, test_file: Path) -> None:
    found = call("evaluate", test_file, "--adapter", taught, "--json", "--quiet", *FAST).values
    assert {name: group["n"] for name, group in found["by_kind"].items()} == {"shape": 4}
    assert {name: group["n"] for name, group in found["by_question"].items()} == {"is it a circle": 4, "how many": 1}
    assert {name: group["n"] for name, group in found["by_answer"].items()} == {"no": 4, "one": 1}
    wrong = round((1 - found["exact_match"]) * 5)
    assert sum(pair["n"] for pair in found["confusions"]) == wrong
    right = sum(group["n"] * group["exact_match"] for group in found["by_answer"].values())
    assert right == pytest.approx(5 - wrong)


def test_predictions_are_kept_a_line_a_row(call: Call, taught: Path, test_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "predictions.jsonl"
    found = call("evaluate", test_file, "--adapter", taught, "--json", "--predictions", out, *FAST).values
    lines, asked = read_jsonl(out), read_jsonl(test_file)
    kept = ("image", "question", "answer", "kind")
    assert [{name: line[name] for name in kept if name in line} for line in lines] == asked
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(0 < line["confidence"] <= 1 for line in lines)
    assert sum(line["right"] for line in lines) == round(5 * found["exact_match"])
    single = call("ask", test_file.parent / "new.png", "how many?", "--adapter", taught, "--json", *FAST).values
    assert lines[4]["prediction"] == single["answer"]


def test_commas_make_sets_where_that_is_asked_for(data_file: Path, tmp_path: Path) -> None:
    class Parrot:
        name = "parrot"

        def reply(self, examples: list[Example], task: str, **_: object) -> list[Completion]:
            return [Completion("12,34", 3, True, -0.1) for _ in examples]

    image = borrowed(data_file.parent / "0.png", tmp_path)
    rows = [{"image": image, "question": "where?", "answer": answer} for answer in ("34,12", "12,34", "12")]
    data, out, told = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", list[str]()
    engine = cast(Any, Parrot())
    assert evaluate(engine, data, tell=told.append)["exact_match"] == pytest.approx(1 / 3)
    assert told[-1] == "1 more answers would be right as lists in any order, which --match set is for"
    found = evaluate(engine, data, match="set", predictions=out)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert [line["right"] for line in read_jsonl(out)] == [True, True, False]
    assert [pair["right"] for pair in found["confusions"]] == ["12"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--match", "set", "--task", "caption"], "--match goes with --task vqa, not caption"),
        (["--match", "sets"], "--match sets: take exact or set"),
    ],
)
def test_a_way_of_comparing_that_there_is_not(words: list[str], told: str, call: Call, test_file: Path) -> None:
    assert told in call("evaluate", test_file, *words).mistake()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--predictions", "out.jsonl", "--task", "retrieval"],
            "--save-predictions goes with --task vqa",
        ),
        (["--predictions", "FILE"], "this is the data file itself; name another file"),
        (["--predictions", "."], "this is a folder; name another file"),
        (["--predictions", "FILE/out.jsonl"], "cannot be written"),
        (["--predictions", "out.html", "--report", "./out.html"], "the report is to be written there too"),
    ],
)
def test_a_file_that_cannot_take_predictions_is_refused(
    words: list[str], told: str, call: Call, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(test_file.parent)
    before = test_file.read_bytes()
    assert told in call("evaluate", test_file, *(word.replace("FILE", str(test_file)) for word in words)).mistake()
    assert test_file.read_bytes() == before


def test_predictions_from_python_and_several_pictures(taught: Path, data_file: Path, tmp_path: Path) -> None:
    images = [borrowed(data_file.parent / "0.png", tmp_path), borrowed(data_file.parent / "1.png", tmp_path)]
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"images": images, "question": "which?", "answer": "both"}])
    engine = load_adapter(taught, device="cpu", dtype="float32", offline=True)
    scores = evaluate(engine, data, predictions=tmp_path / "out.jsonl", blank_images=True)
    (line,) = read_jsonl(tmp_path / "out.jsonl")
    assert line["images"] == images and "kind" not in line
    assert "exact_match_low" not in scores["by_question"]["which"]
    json.dumps(scores)


def test_tables_are_written_for_people() -> None:
    group = {"n": 12, "exact_match": 0.5, "exact_match_low": 0.25, "exact_match_high": 0.75}
    scores = {
        "n": 20,
        "commonest_answer_from": "training",
        "in_training": None,
        "by_kind": {"closed": group, "open": {"n": 8, "exact_match": 1.0}},
        "by_question": {"is it": group, "once": {"n": 1, "exact_match": 1.0}},  # one group of several rows: no table
        "by_answer": {f"{number}": {"n": 2, "exact_match": 0.0} for number in range(10)},
        "confusions": [{"right": "yes", "given": "no", "n": 4, "of": 9}],
    }
    text = describe_scores(scores)
    single, kind, answers, mistakes = text.split("\n\n")
    assert [line.split() for line in single.splitlines()] == [
        ["n", "20"],
        ["commonest_answer_from", "training"],
        ["in_training", "unknown"],
    ]
    assert [line.split() for line in kind.splitlines()] == [
        ["by", "kind", "n", "exact_match", "interval"],
        ["closed", "12", "0.500", "0.250–0.750"],
        ["open", "8", "1.000"],
    ]
    assert len(answers.splitlines()) == 10 and answers.endswith("\n… and 2 more; --json lists them")
    assert [line.split() for line in mistakes.splitlines()] == [
        ["right", "answer", "→", "given", "n", "of"],
        ["yes", "→", "no", "4", "9"],
    ]


def test_a_temperature_is_fitted_and_kept_in_the_adapter(call: Call, taught: Path, data_file: Path) -> None:
    rows = read_jsonl(data_file)
    many = write_jsonl(
        data_file.with_name("many.jsonl"),
        [row | {"question": f"{row['question']} {turn}?"} for turn in range(6) for row in rows],
    )
    before = call("ask", data_file.parent / "0.png", "how many?", "--adapter", taught, "--json", *FAST).values
    found = call("evaluate", many, "--adapter", taught, "--calibrate", "--json", "--quiet", *FAST).values
    assert 0.05 <= found["temperature"] <= 20 and 0 <= found["calibrated_error"] <= 1
    assert read_facts(taught).temperature == found["temperature"]
    after = call("ask", data_file.parent / "0.png", "how many?", "--adapter", taught, "--json", *FAST).values
    assert after["answer"] == before["answer"]
    assert after["confidence"] == pytest.approx(before["confidence"] ** (1 / found["temperature"]), rel=1e-3)
    again = call("evaluate", many, "--adapter", taught, "--calibrate", "--json", "--quiet", *FAST).values
    assert again["temperature"] == pytest.approx(found["temperature"], rel=0.01)  # of the same probabilities
    few = call("evaluate", data_file, "--adapter", taught, "--calibrate", "--limit", 20, "--quiet", *FAST)
    assert "a temperature is fitted to 50 or more" in few.mistake()
    assert "--calibrate" in call("evaluate", data_file, "--task", "caption", "--calibrate", *FAST).mistake()
