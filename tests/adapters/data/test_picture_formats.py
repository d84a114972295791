"""Data sets that bring their pictures: Parquet, saved datasets, the hub, and shards."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import webdataset
from data_rows import COLOURS, EXPECTED, colours, complaint, encoded
from PIL import Image
from pyarrow import parquet

from adapters.data.check import check_data
from adapters.data.images import open_image
from adapters.data.reading import read_data, read_rows


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
        {
            "jpg": encoded("lime", "JPEG"),
            "question.txt": "what?",
            "answer.txt": "sea\n",
            "choices.json": ["sea", "go"],
        },
        {"0.png": encoded("blue"), "1.png": encoded("red"), "json": {"question": "both?", "answer": "go"}},
    )
    found = read_data(path).examples
    assert [(row.question, row.answer, len(row.images)) for row in found] == [
        ("what?", "stop", 1), ("what?", "sea", 1), ("both?", "go", 2),
    ]  # fmt: skip
    assert found[1].choices == ("sea", "go")
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
