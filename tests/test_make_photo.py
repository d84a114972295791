"""What the photo adapter's runs learn from: made questions, answers spelt out, and every file there."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from data_rows import write_jsonl
from scripts_as_modules import load_script

from adapters.artefact.artefact import read_recipe
from adapters.data.photo_sets import chooses, read_lines
from adapters.data.reading import read_data
from adapters.loading.weight_deltas import read_weight_delta
from adapters.recipe import differing_keys, load_recipe


@pytest.fixture
def make_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("make_photo", monkeypatch)
    monkeypatch.setattr(module, "MADE", tmp_path / "made")
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for place in ("flickr8k/images", "daquar/images", "broad/images"):
        (folder / place).mkdir(parents=True)
        (folder / place / "a.jpg").write_bytes(b"a picture, which is looked for and not opened")
    for part in ("train", "val"):
        captions = {"image": "images/a.jpg", "captions": ["Two dogs run on the beach .", "Two white dogs ."]}
        write_jsonl(folder / f"flickr8k/captions_{part}.jsonl", [captions])
        write_jsonl(folder / f"flickr8k/captions_{part}.zh.jsonl", [captions | {"language": "zh"}])
        reason = {
            "image": "images/a.jpg",
            "question": "True?",
            "choices": ["yes", "no"],
            "rationale": "",
            "answer": "yes",
        }
        write_jsonl(folder / f"flickr8k/reasons_{part}.jsonl", [reason])
        room = {"image": "images/a.jpg", "question": "what is left of the door ?", "answer": "garbage_bin, floor_mat"}
        write_jsonl(folder / f"daquar/questions_{part}.jsonl", [room])
        box = {"image": "images/a.jpg", "phrase": "Two dogs", "boxes": [[0.1, 0.1, 0.4, 0.4]], "kind": "animals"}
        write_jsonl(folder / f"flickr8k/boxes_{part}.jsonl", [box])
        named = {"image": "images/a.jpg", "captions": ["A harp .", "A photo of a harp ."]}
        write_jsonl(folder / f"broad/captions_{part}.jsonl", [named])
        asked = {"What is in the picture?": "harp", "Is there a harp in the picture?": "yes"}
        rows = [{"image": "images/a.jpg", "question": text, "answer": answer} for text, answer in asked.items()]
        write_jsonl(folder / f"broad/questions_{part}.jsonl", rows)
    return folder


def test_every_run_finds_its_files(make_photo: ModuleType, data: Path) -> None:
    for part in ("train", "val"):
        make_photo.make_questions(data, part)
    picture = str(data / "flickr8k/images/a.jpg")
    own = {"image": picture, "question": "True?", "choices": ["yes", "no"], "rationale": "So.", "answer": "yes"}
    write_jsonl(make_photo.MADE / "own_train.jsonl", [own])
    for run in (*make_photo.RUNS_OF_STAGE2, make_photo.EVERYTHING, make_photo.CAPTIONS, make_photo.REBALANCED):
        for part, mixture in (("train", run.mixture), ("val", run.validation)):
            for source in make_photo.sources(data, part, mixture):
                how = {"task": source.get("task"), "limit": source["limit"], "allow_outside": True}
                assert read_data(source["file"], **how).examples
    first, *_, last = (make_photo.sources(data, "train", run.mixture) for run in make_photo.RUNS_OF_STAGE2)
    assert len(last) == len(first) + 1  # the first run has no made questions


def test_made_questions_are_answered_by_captions_and_rooms_are_spelt_out(make_photo: ModuleType, data: Path) -> None:
    make_photo.make_questions(data, "train")
    lines = (make_photo.MADE / "made_train.jsonl").read_text().splitlines()
    answers = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    assert answers["how many dogs are there?"] == "2" and answers["where are the dogs?"] == "on the beach"
    (room,) = read_data(make_photo.MADE / "rooms_train.jsonl", allow_outside=True).examples
    assert room.answers == ("garbage bin, floor mat",) and room.images[0].path == data / "daquar/images/a.jpg"


def test_every_run_has_a_recipe_and_starts_from_the_one_before(make_photo: ModuleType) -> None:
    before = make_photo.STAGE1
    recipes = {}
    for run in make_photo.RUNS_OF_STAGE2:
        recipe = load_recipe("photo_stage2", [*make_photo.FASTER, *run.overrides])
        assert before in (run.start, run.start.parent) and read_weight_delta(recipe.vision.towers[0].difference).ships
        before = run.out
        recipes[run.out / "last"] = recipe
    assert set(make_photo.SHARES) == set(list(recipes)[-2:])
    assert make_photo.EVERYTHING.start == make_photo.MEAN
    assert make_photo.CAPTIONS.start == make_photo.EVERYTHING.out / "last"
    last = load_recipe("photo_stage2", [*make_photo.FASTER, *make_photo.CAPTIONS.overrides])
    assert last.bridge.reader == "classes" and last.data.views == 1
    assert make_photo.REBALANCED.start == make_photo.CAPTIONS.out / "last"
    assert list(make_photo.SHARES_AT_LAST) == [run.out / "last" for run in (make_photo.CAPTIONS, make_photo.REBALANCED)]
    shipped = read_recipe(make_photo.SHIPPED)  # the mean has its first part's recipe
    assert differing_keys(last, shipped.model_copy(update={"data": last.data})) == []


def test_validation_photos_choose_or_report_and_wordings_differ(make_photo: ModuleType, data: Path) -> None:
    make_photo.make_questions(data, "val")
    rows = {name: list(read_lines(make_photo.MADE / f"broad_{name}.jsonl")) for name in ("chooses", "reports")}
    assert chooses("images/a.jpg") and not chooses("images/c.jpg")
    assert len(rows["chooses"]) == 2 and not rows["reports"]
    make_photo.make_questions(data, "train")
    worded = list(read_lines(make_photo.MADE / "broad_train.jsonl"))
    assert len(worded) == 6 and len({row["question"] for row in worded}) > 2  # three wordings of two questions
    assert {row["answer"] for row in worded} == {"harp", "yes"}
