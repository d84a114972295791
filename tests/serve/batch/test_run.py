"""Batch jobs on a real, tiny adapter: rows in, rows out, stopped and gone on with, odd files, several pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_rows import borrowed, read_jsonl, write_jsonl

from adapters.data.examples import Example
from adapters.inference.request import Completion
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.batch.asking import Asking, Fields
from serve.batch.ordered_lines import BatchReport
from serve.batch.predictor import VQAPredictor
from serve.batch.run import run_batch


class Stopped(Exception):
    """Stands for whatever ends a job in the middle."""


def test_rows_in_rows_out(predictor: VQAPredictor, source: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "out.jsonl"

    report = run_batch(source, out, predictor)
    found = read_jsonl(out)

    assert report == BatchReport(answered=10, already=0, failed=0)
    assert [(line["row"], line["id"]) for line in found] == [(n, str(n)) for n in range(1, 11)]
    assert [{key: line[key] for key in ("image", "question")} for line in found] == rows
    assert [line["answer"] for line in found] == [
        predictor.engine.ask(row["image"], row["question"], decoding=predictor.decoding) for row in rows
    ]
    assert "reference" not in found[0]
    said = [predictor.engine.complete(row["image"], row["question"], decoding=predictor.decoding) for row in rows]
    assert [line["confidence"] for line in found] == pytest.approx([one.confidence for one in said], abs=1e-3)


def test_given_answers_are_kept_as_references_and_ids_too(
    predictor: VQAPredictor, data_file: Path, tmp_path: Path
) -> None:
    image = borrowed(data_file.parent / "0.png", tmp_path)
    source = write_jsonl(
        tmp_path / "rows.jsonl", [{"id": "q7", "image": image, "question": "what?", "answer": ["a", "b"]}]
    )

    run_batch(source, tmp_path / "out.jsonl", predictor)

    (line,) = read_jsonl(tmp_path / "out.jsonl")
    assert line["reference"] == ["a", "b"]
    assert line["id"] == "q7"


def test_pictures_alone_are_captioned(predictor: VQAPredictor, data_file: Path, tmp_path: Path) -> None:
    image = data_file.parent / "0.png"
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": borrowed(image, tmp_path)}])

    run_batch(source, tmp_path / "out.jsonl", predictor)

    (line,) = read_jsonl(tmp_path / "out.jsonl")
    assert line["answer"] == predictor.engine.caption(image, decoding=predictor.decoding)
    assert "question" not in line


def test_rows_are_decoded_as_their_task_and_the_adapter_want(
    predictor: VQAPredictor, source: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Decoding] = []

    def reply(examples: Sequence[Example], task: str, *, decoding: Decoding, batch_size: int) -> list[Completion]:
        used.append(decoding)
        return [Completion("x", 1, True, 0.0)] * len(examples)

    monkeypatch.setattr(predictor.engine, "reply", reply)
    predictor.batch_size = 64
    captions = write_jsonl(tmp_path / "captions.jsonl", [{"image": borrowed(data_file.parent / "0.png", tmp_path)}])
    beams = {"vqa": Decoding(num_beams=2), "caption": Decoding(num_beams=3)}
    for number, chosen in enumerate((None, beams, Decoding(num_beams=4))):
        predictor.decoding = chosen
        for file in (captions, source):
            run_batch(file, tmp_path / f"{file.stem}{number}.jsonl", predictor)

    greedy, usual_caption = Decoding(), Decoding.preset("caption")
    assert used == [usual_caption, greedy, beams["caption"], beams["vqa"], Decoding(num_beams=4), Decoding(num_beams=4)]

    assembly = predictor.engine.assembly
    monkeypatch.setattr(assembly, "recipe", assembly.recipe.model_copy(update={"decoding": "likeliest"}))
    predictor.decoding = None
    for file in (captions, source):
        run_batch(file, tmp_path / f"{file.stem} by recipe.jsonl", predictor)
    assert used[6:] == [usual_caption, Decoding.preset("likeliest")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows_of_several_pictures(predictor: VQAPredictor, data_file: Path, tmp_path: Path, suffix: str) -> None:
    names = [borrowed(data_file.parent / f"{number}.png", tmp_path) for number in range(3)]
    asked = [
        (names[:2], "<image> or <image>: which is red?"),
        (names, "which is a circle?"),
        (names[2:], "what colour is it?"),
    ]
    source = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        cells = [["images", "question"], *([json.dumps(images), question] for images, question in asked)]
        with source.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(cells)
    else:
        rows = [{"images": images, "question": question} for images, question in asked]
        write_jsonl(source, rows) if suffix == "jsonl" else source.write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "out.jsonl"

    run_batch(source, out, predictor, limit=1)
    assert run_batch(source, out, predictor) == BatchReport(answered=2, already=1, failed=0)

    found = read_jsonl(out)
    assert [line.get("images") for line in found] == [names[:2], names, None]
    assert [line.get("image") for line in found] == [None, None, names[2]]
    assert [line["answer"] for line in found] == [
        predictor.engine.ask(images, question, decoding=predictor.decoding) for images, question in asked
    ]


def test_a_job_that_was_cut_goes_on_where_it_was(
    predictor: VQAPredictor, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_batch(source, whole, predictor)

    def stop(done: int, total: int) -> None:
        assert total == 10
        if done >= 6:
            raise Stopped

    with pytest.raises(Stopped):
        run_batch(source, cut, predictor, chunk=3, write_every=0, on_progress=stop)
    assert len(read_jsonl(cut)) == 6
    cut.write_bytes(cut.read_bytes() + '{"row": 7, "id": "7", "image": "é'.encode()[:-1])  # killed within a letter
    asked: list[str] = []
    real = predictor.answer

    def answer(examples: Sequence[Example], asking: Asking) -> list[Fields]:
        asked.extend(example.id for example in examples)
        return real(examples, asking)

    monkeypatch.setattr(predictor, "answer", answer)
    report = run_batch(source, cut, predictor, chunk=3)

    assert report == BatchReport(answered=4, already=6, failed=0)
    assert asked == ["7", "8", "9", "10"]
    assert cut.read_bytes() == whole.read_bytes()
    assert run_batch(source, cut, predictor) == BatchReport(answered=0, already=10, failed=0)


def test_lines_are_written_after_each_batch_of_prompts(predictor: VQAPredictor, source: Path, tmp_path: Path) -> None:
    """Rows 1, 6, 2, 7 are about two pictures and asked together, then 3, 8, 4, 9, then 5 and 10."""
    out = tmp_path / "out.jsonl"
    seen: list[tuple[int, int]] = []

    def look(done: int, total: int) -> None:
        seen.append((done, len(read_jsonl(out))))

    run_batch(source, out, predictor, write_every=0, on_progress=look)
    assert seen == [(2, 2), (4, 4), (10, 10)]


def test_separators_within_a_question_do_not_break_a_line(
    predictor: VQAPredictor, data_file: Path, tmp_path: Path
) -> None:
    rows = [
        {"image": borrowed(data_file.parent / "0.png", tmp_path), "question": f"a{mark}b?"}
        for mark in "\u2028\x85\x0b\r"
    ]
    source, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    run_batch(source, out, predictor)

    assert run_batch(source, out, predictor) == BatchReport(answered=0, already=4, failed=0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("my notes, which have no line end", "its last line is not an answer"),
        ('{"row": 1}\n', "line 1: not an answer"),
        ('{"row": 11, "image": "x", "answer": "a"}\n', "line 1: not an answer"),
        ('{"row": 1, "image": "another.png", "question": "what?", "answer": "a"}\n', "answers another row"),
        ("[1, 2]\n", "line 1: not an answer"),
    ],
)
def test_a_file_that_holds_something_else_is_left_as_it_is(
    predictor: VQAPredictor, source: Path, tmp_path: Path, content: str, says: str
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(source, out, predictor)  # leaves its job beside it
    out.write_text(content, encoding="utf-8")

    with pytest.raises(UserError, match=f"--out .*{says}"):
        run_batch(source, out, predictor)

    assert out.read_text(encoding="utf-8") == content


def test_the_input_is_never_written_over(predictor: VQAPredictor, source: Path) -> None:
    before = source.read_bytes()

    with pytest.raises(UserError, match="name another file"):
        run_batch(source, source, predictor)

    assert source.read_bytes() == before


def test_an_out_that_cannot_be_written_is_told(predictor: VQAPredictor, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out .*: this is a folder"):
        run_batch(source, tmp_path, predictor)
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        run_batch(source, source / "out.jsonl", predictor)  # below a file


def test_windows_line_ends_a_mark_and_csv_read_alike(
    predictor: VQAPredictor, rows: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    lines = ["image,question", *(f'"{row["image"]}","{row["question"]}"' for row in rows)]
    table = tmp_path / "rows.csv"
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))

    for number, file in enumerate((source, table, windows)):
        run_batch(file, tmp_path / f"out{number}.jsonl", predictor)

    assert (tmp_path / "out1.jsonl").read_bytes() == (tmp_path / "out0.jsonl").read_bytes()
    assert (tmp_path / "out2.jsonl").read_bytes() == (tmp_path / "out0.jsonl").read_bytes()


def test_a_limit_takes_the_first_rows_and_the_rest_can_follow(
    predictor: VQAPredictor, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"

    assert run_batch(source, out, predictor, limit=4) == BatchReport(answered=4, already=0, failed=0)
    assert [line["row"] for line in read_jsonl(out)] == [1, 2, 3, 4]
    assert run_batch(source, out, predictor) == BatchReport(answered=6, already=4, failed=0)


def test_columns_in_columns_out(predictor: VQAPredictor, data_file: Path) -> None:
    picture = data_file.parent / "3.png"
    batch = {"image": [str(picture), picture.read_bytes()], "question": ["what?", "what?"], "page": [4, 5]}

    result = predictor(batch)

    assert {key: result[key] for key in batch} == batch
    assert result["answer"] == [predictor.engine.ask(picture, "what?", decoding=predictor.decoding)] * 2

    two = [str(picture), str(data_file.parent / "4.png")]
    result = predictor({"image": [two], "question": ["<image> or <image>?"]})
    assert result["answer"] == [predictor.engine.ask(two, "<image> or <image>?", decoding=predictor.decoding)]


def test_columns_that_are_wrong_are_told(predictor: VQAPredictor) -> None:
    with pytest.raises(UserError, match="there is no column 'question'"):
        predictor({"image": ["a.png"]})
    with pytest.raises(UserError, match="row 1: image 'picture' is not a picture"):
        predictor({"image": [b"P6\n1 1\n255\n\0\0\0", b"nothing"], "question": ["a?", "b?"]})
    with pytest.raises(UserError, match="a picture is NoneType"):
        predictor({"image": [None], "question": ["a?"]})


def test_a_predictor_loads_its_adapter_by_name(run_folder: Path, data_file: Path) -> None:
    predictor = VQAPredictor(
        run_folder, decoding=Decoding(max_new_tokens=2), batch_size=1, device="cpu", dtype="float32", offline=True
    )

    assert len(predictor({"image": [str(data_file.parent / "0.png")], "question": ["what?"]})["answer"]) == 1
