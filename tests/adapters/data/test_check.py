"""A data file checked: every number counted by hand, every bad row named by its own number."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import CAPTION, VQA, write_jsonl
from PIL import Image

from adapters.data.check import check_data, check_pair
from qformer.errors import UserError


@pytest.fixture
def pictures(folder: Path) -> Path:
    """Real pictures a, b and c, of which c is b under another name; d.png stays what it is: no picture."""
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "b.png")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes())
    return folder


def test_a_good_file_is_counted(pictures: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(
        VQA | {"question": "What?", "answer": ["cat", "cat", "dog"]},
        VQA | {"image": "b.png", "question": "What is it now?", "language": "fr"},
        "",
        {"images": ["c.png", "a.png"], "question": "<image> <image>", "answer": "both"},
    )
    found = check_data(path)
    assert (found.name, found.task, found.rows, found.faults) == ("data.jsonl", "vqa", 3, ())
    assert (found.pictures, found.distinct_pictures) == (3, 2)
    assert found.answers == 5
    assert found.languages == {"en": 2, "fr": 1}
    assert (found.longest_question, found.longest_question_row) == (len("What is it now?"), 2)


def test_captions_have_no_question(pictures: Path, jsonl: Callable[..., Path]) -> None:
    found = check_data(jsonl(CAPTION, {"image": "a.png", "captions": ["x"], "language": "zh"}))
    assert (found.task, found.answers, found.languages) == ("caption", 2, {"en": 1, "zh": 1})
    assert (found.longest_question, found.longest_question_row) == (0, 0)


def test_every_bad_row_is_listed_in_order(pictures: Path, jsonl: Callable[..., Path]) -> None:
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:45])
    path = jsonl(
        VQA | {"image": "d.png"},
        "broken",
        VQA,
        {"images": ["a.png", "cut.png"], "question": "A longer question?", "answer": "x"},
        VQA | {"image": "gone.png"},
        VQA | {"image": "d.png", "question": "Again?"},
    )
    found = check_data(path)
    assert [fault.row for fault in found.faults] == [1, 2, 4, 5, 6]
    assert [fault.where for fault in found.faults] == [f"{path} row {n} (line {n})" for n in (1, 2, 4, 5, 6)]
    for fault, words in zip(
        found.faults,
        ["image 'd.png' is not a picture", "broken JSON", "'cut.png' is", "'gone.png' is not there", "image 'd.png'"],
        strict=True,
    ):
        assert words in fault.message and str(path) not in fault.message.removesuffix(f"{pictures / 'gone.png'}")
    assert (found.rows, found.answers, found.pictures, found.distinct_pictures) == (6, 1, 3, 1)
    assert found.longest_question == len("What is it?")  # of the good rows


def test_a_file_without_a_good_row_is_reported_not_raised(jsonl: Callable[..., Path]) -> None:
    found = check_data(jsonl("broken", VQA))  # a.png is no picture here
    assert (found.task, found.rows, len(found.faults), found.answers, found.languages) == (None, 2, 2, 0, {})


def test_questions_alone_are_good_where_no_answers_are_needed(pictures: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl({"image": "a.png", "question": "What?"})
    assert "'answer' is missing" in check_data(path).faults[0].message
    assert check_data(path, need_answers=False).faults == ()


def test_what_is_wrong_with_the_whole_file_is_raised(folder: Path, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        check_data(jsonl(""))
    with pytest.raises(UserError, match="is not there"):
        check_data(folder / "nowhere.jsonl")
    with pytest.raises(UserError, match="--task caption"):
        check_data(jsonl(VQA), task="caption")


def test_an_interruption_does_not_wait_for_the_rest(
    pictures: Path, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr("adapters.data.picture_scan.open_image", lambda ref: (time.sleep(0.005), opened.append(ref)))
    for number in range(95):
        (pictures / f"{number}.png").touch()
    path = jsonl(*(VQA | {"image": f"{number}.png"} for number in range(95)))

    def pressed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_data(path, on_progress=pressed)
    assert 10 <= len(opened) < 50


def test_progress_counts_the_pictures_a_few_times(pictures: Path, jsonl: Callable[..., Path]) -> None:
    for number in range(95):
        (pictures / f"{number}.png").write_bytes((pictures / "a.png").read_bytes())
    path = jsonl(*(VQA | {"image": f"{number}.png"} for number in range(95)))
    seen: list[tuple[int, int]] = []
    check_data(path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 95) for done in (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)]


def test_a_second_file_is_checked_and_searched_for_copies(
    pictures: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    train = jsonl(VQA, VQA | {"image": "b.png"}, VQA | {"image": "d.png"})
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.bmp")
    rows = [VQA | {"image": name} for name in ("c.png", "red.bmp", "d.png")]
    val = write_jsonl(tmp_path / "val.jsonl", rows)
    seen: list[tuple[int, int]] = []
    first, second, copies = check_pair(train, val, on_progress=lambda done, total: seen.append((done, total)))
    assert first == check_data(train) and second == check_data(val)
    assert [len(one.faults) for one in (first, second)] == [1, 1]
    assert [(pair.train, pair.test, pair.how) for pair in copies.pairs] == [
        ("b.png", "c.png", "bytes"),
        ("a.png", "red.bmp", "pixels"),
    ]
    assert copies.unreadable == () and seen[-1] == (3, 3)  # a.png, b.png and red.bmp
