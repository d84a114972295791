"""Pictures that a data file names outside its own folder: refused with row, value and flag, unless they are allowed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_rows import VQA, write_jsonl
from PIL import Image

from adapters.data.check import check_data
from adapters.data.convert import convert_data
from adapters.data.preview_page import preview_page
from adapters.data.reading import read_data, read_rows
from qformer.errors import UserError
from serve.batch.rows import BatchRows
from serve.evaluation.grounding import read_phrases

FLAG = r"lies outside the data's own folder, .*: put it there, or add --allow-outside \(in a recipe, data\.allow_outs"


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder of data, with a picture in it and one beside it, by which it is reached in each way."""
    data = tmp_path / "data"
    (tmp_path / "private").mkdir()
    (data / "pictures").mkdir(parents=True)
    for place in (tmp_path / "private" / "secret.png", data / "pictures" / "own.png"):
        Image.new("RGB", (8, 8), "red").save(place)
    (data / "link.png").symlink_to(tmp_path / "private" / "secret.png")
    (data / "linked").symlink_to(tmp_path / "private")
    return data


def ways_out(places: Path) -> list[str]:
    return [
        "../private/secret.png",
        str(places.parent / "private" / "secret.png"),
        "pictures/../../private/secret.png",
        "link.png",
        "linked/secret.png",
        "../private/not_there.png",
        "/etc/hostname",
    ]


@pytest.mark.parametrize("way", range(7))
def test_a_row_that_leads_out_is_bad(way: int, places: Path) -> None:
    named = ways_out(places)[way]
    path = write_jsonl(places / "rows.jsonl", [VQA | {"image": "pictures/own.png"}, VQA | {"image": named}])
    found = read_rows(path)
    (fault,) = found.faults
    assert fault.row == 2 and str(fault).startswith(f"{path} row 2 (line 2): image '{named}' ")
    with pytest.raises(UserError, match=FLAG):
        read_data(path)
    if "link" in named:
        assert "a link to" in fault.message
    if way < 5:
        assert len(read_data(path, allow_outside=True).examples) == 2


def test_inside_is_whatever_way_it_is_written(places: Path) -> None:
    inside = ["pictures/own.png", str(places / "pictures" / "own.png"), "pictures/../pictures/own.png"]
    path = write_jsonl(places / "rows.jsonl", [VQA | {"image": one} for one in inside])
    assert len(read_data(path).examples) == 3
    shutil.move(places, places.with_name("moved"))
    places.symlink_to("moved")  # the folder itself may be a link
    assert len(read_data(path).examples) == 3


def test_a_link_to_the_data_file_may_lead_to_its_pictures(places: Path, tmp_path: Path) -> None:
    """As in the hub's cache: both the table and the pictures are links, into one folder."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    write_jsonl(places / "pictures" / "blob", [{"file_name": "a.png", "caption": "red"}])
    (snapshot / "metadata.jsonl").symlink_to(places / "pictures" / "blob")
    (snapshot / "a.png").symlink_to(places / "pictures" / "own.png")
    assert len(read_data(snapshot).examples) == len(read_data(snapshot / "metadata.jsonl").examples) == 1
    (snapshot / "a.png").unlink()
    (snapshot / "a.png").symlink_to(tmp_path / "private" / "secret.png")
    with pytest.raises(UserError, match=FLAG):
        read_data(snapshot)


def test_a_known_layout_is_no_way_out(places: Path) -> None:
    """COCO's captions lie in a folder beside that of the pictures; a name in them that leads further does not pass."""
    (places / "annotations").mkdir()
    (places / "train2014").mkdir()
    shutil.copy(places / "pictures" / "own.png", places / "train2014" / "own.png")
    path = places / "annotations" / "captions_train2014.json"

    def write(name: str) -> None:
        images = [{"id": 1, "file_name": "own.png"}, {"id": 2, "file_name": name}]
        captions = [{"image_id": 1, "caption": "red"}, {"image_id": 2, "caption": "red"}]
        path.write_text(json.dumps({"images": images, "annotations": captions}))

    write("own.png")
    assert len(read_data(path).examples) == 2
    write("../../private/secret.png")
    with pytest.raises(UserError, match=FLAG):
        read_data(path)


def test_pictures_in_the_parts_of_a_conversation(places: Path) -> None:
    part: Any = {"type": "image_url", "image_url": {"url": "../private/secret.png"}}
    turns = [
        {"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "red"},
    ]
    path = write_jsonl(places / "rows.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match=FLAG):
        read_data(path)
    assert len(read_data(path, allow_outside=True).examples) == 1


def test_each_way_to_read_data_knows_it(places: Path, tmp_path: Path) -> None:
    path = write_jsonl(places / "rows.jsonl", [VQA | {"image": "../private/secret.png"}])
    boxes = write_jsonl(
        places / "boxes.jsonl", [{"image": "../private/secret.png", "phrase": "it", "boxes": [[0, 0, 1, 1]]}]
    )
    assert len(check_data(path).faults) == 1 and not check_data(path, allow_outside=True).faults
    for read in (
        lambda **how: convert_data(path, tmp_path / f"new{len(how)}.parquet", **how),
        lambda **how: preview_page(path, tmp_path / "page.html", **how),
        lambda **how: read_phrases(boxes, **how),
    ):
        with pytest.raises(UserError, match=FLAG):
            read()
        read(allow_outside=True)
    for allowed in (False, True):
        ((asked,),) = (row.asked for row in BatchRows(path, allow_outside=allowed))
        assert hasattr(asked.asked, "message") is not allowed


def test_nothing_is_looked_for_outside(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not tell whether a file is there."""
    looked: list[str] = []
    real = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *rest, **more: (looked.append(str(path)), real(path, *rest, **more))[1]
    )
    there, missing = (
        str(read_rows(write_jsonl(places / f"{n}.jsonl", [VQA | {"image": name}])).faults[0].message)
        for n, name in enumerate(("../private/secret.png", "../private/no.png"))
    )
    assert there.replace("secret", "no") == missing
    assert not any("private" in path for path in looked)
