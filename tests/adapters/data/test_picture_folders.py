"""Folders of pictures, with a table or a folder for each class, and the official files of VQAv2 and COCO."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pandas
import pytest
from data_rows import COLOURS, EXPECTED, colours, complaint, encoded

from adapters.data.reading import read_data, read_rows

# -- folders of pictures -----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(encoded(colour))
    return folder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_folder_with_a_table(name: str, photos: Path) -> None:
    frame = pandas.DataFrame(
        {"file_name": [f"{one}.png" for one in COLOURS], "question": "what?", "answer": ["stop", "sea", "go"]}
    )
    write = {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(name.rpartition(".")[2])
    if write is not None:
        write(photos / name, index=False)
    else:
        frame.to_json(photos / name, orient="records", lines=True)
    assert colours(photos) == EXPECTED
    theirs = datasets.load_dataset("imagefolder", data_dir=str(photos), cache_dir=str(photos.parent / "cache"))["train"]
    assert [row["image"].getpixel((4, 4)) for row in theirs] == [colour for colour, _ in colours(photos)]
    (photos / ("metadata.csv" if name != "metadata.csv" else "metadata.jsonl")).write_text("x")
    assert "keep one of them" in complaint(photos)


def test_a_folder_with_a_table_for_each_split(photos: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(photos, photos.parent / "set" / split)
        (photos.parent / "set" / split / "metadata.jsonl").write_text(
            json.dumps({"file_name": "lime.png", "caption": f"For {split}."})
        )
    folder = photos.parent / "set"
    assert read_data(f"{folder}:test").examples[0].answer == "For test."
    assert f"{folder}:train or {folder}:test" in complaint(folder)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    folder = tmp_path / "signs"
    for name, colour in (("stop", "red"), ("sea", "blue"), ("sea", "lime")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{colour}.JPG").write_bytes(encoded(colour, "JPEG"))
    found = read_data(folder)
    assert [(row.images[0].label, row.question, row.answer) for row in found.examples] == [
        ("sea/blue.JPG", "What is this?", "sea"),
        ("sea/lime.JPG", "What is this?", "sea"),
        ("stop/red.JPG", "What is this?", "stop"),
    ]
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert theirs.features["label"].names == ["sea", "stop"] and len(theirs) == 3
    (folder / "sea" / "phone.heic").write_bytes(b"x")
    (folder / "sea" / ".hidden").write_bytes(b"x")
    (folder / "loose.png").write_bytes(b"x")
    faults = [fault.message for fault in read_rows(folder).faults]
    assert faults == [
        "'loose.png' lies in no folder of a class: move it into one",
        "'sea/phone.heic' is no picture that is read: save it as JPEG, or take it out",
    ]


# -- well-known files --------------------------------------------------------------------------------------------------


@pytest.fixture
def vqav2(tmp_path: Path) -> Path:
    """The official pair, as it is published, with one picture."""
    part = "val2014"
    questions = [
        {"image_id": 42, "question": "What?", "question_id": 420},
        {"image_id": 7, "question": "Is it?", "question_id": 70},
    ]
    said = {70: ["yes"] * 10, 420: ["cat"] * 8 + ["dog"] * 2}
    kinds = {70: "yes/no", 420: "other"}
    answers = [
        {
            "question_id": number, "image_id": number // 10, "answer_type": kinds[number], "question_type": "what",
            "multiple_choice_answer": texts[0],
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts)],
        }
        for number, texts in said.items()
    ]  # fmt: skip
    head = {"info": {}, "data_type": "mscoco", "data_subtype": part, "license": {}}
    path = tmp_path / f"v2_OpenEnded_mscoco_{part}_questions.json"
    path.write_text(json.dumps({**head, "task_type": "Open-Ended", "questions": questions}))
    (tmp_path / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({**head, "annotations": answers}))
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({**head, "annotations": []}))
    (tmp_path / part).mkdir()
    for image in (42, 7):
        (tmp_path / part / f"COCO_{part}_{image:012d}.jpg").write_bytes(encoded("red", "JPEG"))
    return path


def test_vqav2(vqav2: Path) -> None:
    for path in (vqav2, vqav2.parent / "v2_mscoco_val2014_annotations.json"):
        first, second = read_data(path).examples
        assert first.answers == ("cat",) * 8 + ("dog",) * 2
        assert (first.id, first.kind, first.images[0].label) == (
            "420", "other", "val2014/COCO_val2014_000000000042.jpg",
        )  # fmt: skip
        assert (second.question, second.answers) == ("Is it?", ("yes",) * 10)
    (vqav2.parent / "v2_mscoco_val2014_annotations.json").unlink()
    assert len(read_data(vqav2, need_answers=False).examples) == 2
    assert "'answer' is missing" in complaint(vqav2)


def test_halves_of_vqav2_that_do_not_fit(vqav2: Path) -> None:
    answers = vqav2.parent / "v2_mscoco_val2014_annotations.json"
    held = json.loads(answers.read_text())
    held["annotations"][0]["question_id"] = 1
    answers.write_text(json.dumps(held))
    assert "1 of 2 answers are to questions that it does not hold" in complaint(vqav2)
    vqav2.unlink()
    assert "put the file of their questions beside it" in complaint(answers)


def test_coco_captions_and_boxes(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "000000000009.jpg").write_bytes(encoded("red", "JPEG"))
    images = [{"id": 9, "file_name": "000000000009.jpg", "width": 8, "height": 8}]
    captions = [{"id": n, "image_id": 9, "caption": text} for n, text in enumerate(("One .", "Two"))]
    path = folder / "captions_train2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    (example,) = read_data(path).examples
    assert (example.answers, example.id) == (("One.", "Two"), "9")
    assert example.images[0].read() == encoded("red", "JPEG")
    stray = [*captions, {"id": 5, "image_id": 10, "caption": "Three"}]
    path.write_text(json.dumps({"images": images, "annotations": stray}))
    assert "1 captions are of pictures that it does not list (the first: image_id 10)" in complaint(path)
    boxes = [{"id": 1, "image_id": 9, "bbox": [0, 0, 1, 1], "category_id": 1}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": []}))
    assert "no task learns boxes" in complaint(path)


def test_rows_with_boxes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("red"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png", "phrase": "a dog", "boxes": [[0, 0, 1, 1]]}))
    assert "'question' or 'caption' is missing" in complaint(path)
