"""Data sets that bring their pictures: Parquet, saved datasets, the hub, shards, folders, and official files."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import webdataset
from data_rows import complaint
from PIL import Image
from pyarrow import parquet

from adapters.data.check import check_data
from adapters.data.images import open_image
from adapters.data.readers import read_data, read_rows

COLOURS = ("red", "lime", "blue")


def encoded(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def hf_dataset() -> Any:
    """Three pictures with a question each; the answer is a class."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["stop", "go", "sea"]),
            "answers": datasets.List(datasets.ClassLabel(names=["no", "yes"])),
        }
    )
    columns = {
        "image": [Image.new("RGB", (8, 8), colour) for colour in COLOURS],
        "question": ["what is it?"] * 3,
        "answer": [0, 2, 1],
        "answers": [None, None, None],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def colours(source: Path | str, **options: Any) -> list[tuple[tuple[int, int, int], str]]:
    """The colour of each row's picture, as it is decoded, and the row's answer."""
    found = read_data(source, **options).examples
    return [(open_image(row.images[0]).getpixel((4, 4)), row.answer) for row in found]  # type: ignore[misc]


EXPECTED = [((255, 0, 0), "stop"), ((0, 255, 0), "sea"), ((0, 0, 255), "go")]


# -- Parquet and Arrow -------------------------------------------------------------------------------------------------


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    hf_dataset().to_parquet(path)
    assert colours(path) == EXPECTED
    assert read_rows(path).examples[1].where == f"{path} row 2"
    found = check_data(path)
    assert (found.rows, found.pictures, found.distinct_pictures, found.faults) == (3, 3, 3, ())
    assert read_data(path).fingerprint == read_data(path).fingerprint


@pytest.mark.parametrize("rows_a_group", [1, None])
def test_parquet_of_pandas(rows_a_group: int | None, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    frame = pandas.DataFrame({"question": ["what?"] * 3, "answer": ["stop", "sea", "go"]})
    path = tmp_path / "rows.parquet"
    for images in (
        [encoded(colour) for colour in COLOURS],
        [{"bytes": encoded(colour), "path": None} for colour in COLOURS],
        [{"bytes": None, "path": "red.png"}, *({"bytes": encoded(colour), "path": "x.png"} for colour in COLOURS[1:])],
    ):
        frame.assign(image=images).to_parquet(path, index=False, row_group_size=rows_a_group)
        assert colours(path) == EXPECTED
    frame.assign(image="red.png").to_parquet(path)
    assert colours(path)[2] == ((255, 0, 0), "go")


def test_a_picture_of_many_rows_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    frame = pandas.DataFrame({"image": [encoded("red")] * 5, "question": list("abcde"), "answer": list("vwxyz")})
    frame.to_parquet(path)
    images = {row.images for row in read_data(path).examples}
    assert len(images) == 1
    kept = images.pop()[0].part
    assert kept is not None and (kept.offset, kept.length) == (0, len(encoded("red")))
    assert kept.path.stat().st_size == kept.length


def test_a_parquet_file_that_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    hf_dataset().to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    message = complaint(path)
    assert str(path) in message and "cannot be read as Parquet" in message


def test_classes_become_names_and_an_unknown_one_is_a_bad_row(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.new("RGB", (8, 8), colour) for colour in COLOURS]
    made = datasets.Dataset.from_dict({"image": images, "label": [1, -1, 0]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet")
    assert [(row.question, row.answer) for row in found.examples] == [
        ("What is this?", "dog"),
        ("What is this?", "cat"),
    ]
    assert [fault.row for fault in found.faults] == [2]

    table = pyarrow.table({"image": [encoded("red")], "label": [7]})
    parquet.write_table(table.replace_schema_metadata(made.features.arrow_schema.metadata), tmp_path / "wrong.parquet")
    assert "row 1: 'label' is class 7, and there are 2" in complaint(tmp_path / "wrong.parquet")

    number = pandas.DataFrame({"image": [encoded("red")], "label": [1]})  # a number without names teaches nothing
    number.to_parquet(tmp_path / "number.parquet")
    assert "'question' or 'caption' is missing" in complaint(tmp_path / "number.parquet")


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"image": [encoded("red")] * 2, "question": ["a", "b"], "answer": [b"\xff\xfe", b"yes"]})
    frame.to_parquet(tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet")
    assert [row.answer for row in found.examples] == ["yes"]
    assert found.faults[0].message == "'answer' holds bytes that are no text: leave the column out"


def test_feather(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"image": [encoded("red")], "question": ["what?"], "answer": ["stop"]})
    frame.to_feather(tmp_path / "rows.arrow")
    assert colours(tmp_path / "rows.arrow") == EXPECTED[:1]


# -- datasets on disk and on the hub -----------------------------------------------------------------------------------


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    hf_dataset().save_to_disk(folder, num_shards=2)
    assert colours(folder) == EXPECTED
    assert [row.where for row in read_data(folder).examples] == [f"{folder} row {number}" for number in (1, 2, 3)]
    assert "this folder has no splits" in complaint(f"{folder}:train")

    hf_dataset().select([2, 0]).save_to_disk(tmp_path / "selected")
    assert colours(tmp_path / "selected") == [EXPECTED[2], EXPECTED[0]]

    (folder / "data-00001-of-00002.arrow").write_bytes(b"\x00" * 50)
    assert "cannot be read as Arrow" in complaint(folder)
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow" in complaint(folder)
    (folder / "state.json").write_text("{")
    assert "missing or damaged" in complaint(folder)


def test_a_saved_arrow_file_that_breaks_off(tmp_path: Path) -> None:
    hf_dataset().save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-40])
    message = complaint(tmp_path / "saved")
    assert "cannot be read as Arrow" in message or "breaks off" in message


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    both = datasets.DatasetDict({"train": hf_dataset(), "test": hf_dataset().select([1])})
    both.save_to_disk(folder)
    assert colours(f"{folder}:train") == EXPECTED
    assert colours(f"{folder}:test") == [EXPECTED[1]]
    assert f"name one of them, {folder}:train or {folder}:test" in complaint(folder)
    assert "name one of them" in complaint(f"{folder}:validation")


def test_a_folder_of_parquet_files_with_splits(tmp_path: Path) -> None:
    """As the hub keeps them."""
    data = hf_dataset()
    for name, rows in (("train-00000-of-00002", [0, 1]), ("train-00001-of-00002", [2]), ("test-00000-of-00001", [1])):
        data.select(rows).to_parquet(tmp_path / f"{name}.parquet")
    assert colours(f"{tmp_path}:train") == EXPECTED
    assert "several splits" in complaint(tmp_path)
    assert colours(tmp_path / "train-*.parquet") == EXPECTED


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network is asked: what the library would have fetched is put in its place."""
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str, download_config: Any) -> Any:
        asked.append((name, config, split, download_config.local_files_only))
        if name == "a/gone":
            raise FileNotFoundError("no such dataset\nat all")
        return hf_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert colours("hub:a/b") == EXPECTED
    assert colours("hub:a/b/easy:test", offline=True) == EXPECTED
    assert asked == [("a/b", None, "train", False), ("a/b", "easy", "test", True)]
    assert "cannot be had from the hub (FileNotFoundError: no such dataset)" in complaint("hub:a/gone")
    assert "write hub:OWNER/NAME" in complaint("hub:alone")
    assert "hub:nobody/nothing if it is on Hugging Face's hub" in complaint("nobody/nothing")


# -- WebDataset --------------------------------------------------------------------------------------------------------


def write_shard(path: Path, *samples: dict[str, Any]) -> Path:
    with webdataset.TarWriter(str(path)) as sink:
        for number, sample in enumerate(samples):
            sink.write({"__key__": f"{number:04d}", **sample})
    return path


def test_a_shard_of_questions(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.tar",
        {"png": encoded("red"), "json": {"question": "what?", "answer": "stop", "image": "0000.png"}},
        {"jpg": encoded("lime", "JPEG"), "question.txt": "what?", "answer.txt": "sea\n"},
        {"0.png": encoded("blue"), "1.png": encoded("red"), "json": {"question": "both?", "answer": "go"}},
    )
    found = read_data(path).examples
    assert [(row.question, row.answer, len(row.images)) for row in found] == [
        ("what?", "stop", 1), ("what?", "sea", 1), ("both?", "go", 2),
    ]  # fmt: skip
    assert open_image(found[2].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert found[0].images[0].label == "0000.png" and found[0].where == f"{path} sample 1 (0000)"
    assert colours(path)[0] == EXPECTED[0]
    assert (check_data(path).pictures, check_data(path).distinct_pictures) == (4, 3)


def test_shards_of_captions(tmp_path: Path) -> None:
    for number, colour in enumerate(COLOURS):
        write_shard(
            tmp_path / f"{number:06d}.tar",
            {"jpg": encoded(colour, "JPEG"), "txt": f"A {colour} square.", "json": {"caption": f"A {colour} square."}},
        )
    data = read_data(tmp_path)
    assert (data.task, [row.answer for row in data.examples]) == ("caption", [f"A {one} square." for one in COLOURS])
    assert len(read_data(tmp_path / "00000[12].tar").examples) == 2


def test_what_is_wrong_with_samples(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.tar",
        {"png": encoded("red"), "txt": "one", "json": {"caption": "another"}},
        {"txt": "no picture"},
        {"png": encoded("red"), "json": b"{"},
        {"png": encoded("red"), "json": b"[1]"},
        {"png": encoded("red"), "json": {"image": "other.png", "caption": "c"}},
        {"png": encoded("red"), "txt": b"\xff"},
        {"png": encoded("red"), "txt": "fine"},
    )
    found = read_rows(path)
    words = [
        "they differ", "field 'image' is missing", "0002.json is broken JSON", "holds a list",
        "'image' names other.png", "neither a picture nor text",
    ]  # fmt: skip
    assert [row.answer for row in found.examples] == ["fine"]
    for fault, word in zip(found.faults, words, strict=True):
        assert word in fault.message


def test_a_shard_that_breaks_off(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", *({"png": encoded(one), "txt": one} for one in COLOURS))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    for length in (1000, last.offset, last.offset + 100, last.offset_data + 1):
        path.write_bytes(whole[:length])
        message = complaint(path)
        assert str(path) in message and ("breaks off" in message or "cannot be read as a tar" in message)
    path.write_bytes(whole)
    gzipped = shutil.make_archive(str(tmp_path / "b"), "gztar", tmp_path, "a.tar")
    named = Path(gzipped).rename(tmp_path / "zipped.tar")
    assert "unpack .tar.gz first" in complaint(named)


def test_members_that_lie_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.png", encoded("red")), ("b.png", encoded("red")), ("a.txt", b"x"), ("b.txt", b"y")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert "members of sample 'a' lie apart" in complaint(path)


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
