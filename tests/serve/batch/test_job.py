"""The job beside a file of answers: answers of two kinds never come into one file, and what may go on does."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command import FAST, Call
from data_rows import borrowed, read_jsonl, write_jsonl

from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, load_adapter
from serve.batch.job import job_file
from serve.batch.ordered_lines import BatchReport
from serve.batch.predictor import VQAPredictor
from serve.batch.run import run_batch


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def begun(predictor: VQAPredictor, source: Path, out: Path) -> Path:
    """A job that has answered the first four of ten rows."""
    assert run_batch(source, out, predictor, limit=4) == BatchReport(4, 0, 0)
    return out


def refusal(source: Path, out: Path, predictor: VQAPredictor, **options: Any) -> str:
    """What is said of a job that may not go on; it leaves everything as it was."""
    before = {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
    with pytest.raises(UserError) as caught:
        run_batch(source, out, predictor, **options)
    assert {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()} == before
    said = str(caught.value)
    assert said.startswith(f"--out {out}: ") and "\n" not in said
    return said.removeprefix(f"--out {out}: ")


@contextmanager
def changed(parameter: torch.Tensor) -> Iterator[None]:
    """A parameter of the session's engine with other numbers, for a while."""
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter += 0.5
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


def test_the_job_says_what_the_answers_were_made_by(begun: Path, predictor: VQAPredictor) -> None:
    assert job_file(begun) == begun.parent / "out.jsonl.job.json"
    job = json.loads(job_file(begun).read_text(encoding="utf-8"))
    assert (job["format"], job["source"], job["rows"], job["task"]) == (2, "rows.jsonl", 4, "vqa")
    assert job["adapter"] == predictor.engine.name
    assert job["adapter_fingerprint"].startswith("sha256:") and job["rows_digest"].startswith("sha256:")
    assert job["decoding"]["max_new_tokens"] == 5 and job["decoding"]["num_beams"] == 1


@pytest.mark.parametrize(
    ("fields", "flags", "beams"),
    [
        ({}, [], 5),  # a picture alone asks for a caption: BLIP-2's beams
        ({"question": "what?"}, [], 1),
        ({}, ["--decoding", "greedy"], 1),
        ({}, ["--beams", "2"], 2),
    ],
)
def test_the_command_decodes_as_the_rows_ask(
    call: Call, run_folder: Path, data_file: Path, out: Path, fields: dict[str, str], flags: list[str], beams: int
) -> None:
    source = write_jsonl(
        out.parent / "rows.jsonl", [{"image": borrowed(data_file.parent / "0.png", out.parent), **fields}]
    )

    call("batch", source, "--out", out, "--adapter", run_folder, "--max-new-tokens", 2, "--json", *flags, *FAST)

    job = json.loads(job_file(out).read_text(encoding="utf-8"))
    assert (job["task"], job["decoding"]["max_new_tokens"]) == ("vqa" if fields else "caption", 2)
    assert job["decoding"]["num_beams"] == beams


def test_another_decoding_is_refused(begun: Path, source: Path, predictor: VQAPredictor) -> None:
    predictor.decoding = Decoding(max_new_tokens=5, num_beams=3, length_penalty=-1.0)

    said = refusal(source, begun, predictor)

    assert said == (
        "its answers were made otherwise (length_penalty is -1.0, was 1.0; num_beams is 3, was 1);"
        f" name another file, or delete both {begun} and out.jsonl.job.json"
    )


def test_another_adapter_is_refused_whatever_it_is_called(
    begun: Path, source: Path, predictor: VQAPredictor, engine: LoadedAdapter
) -> None:
    model = engine.assembly.model
    lora = next(p for name, p in model.language.model.named_parameters() if "lora_B" in name)
    for parameter in (model.projection.bias, lora):
        with changed(parameter):
            assert f"the adapter is {engine.name}, was another of this name" in refusal(source, begun, predictor)
            predictor.engine = LoadedAdapter(engine.assembly, engine.facts, "other")
            assert f"the adapter is other, was {engine.name}" in refusal(source, begun, predictor)
            predictor.engine = engine
    assert run_batch(source, begun, predictor) == BatchReport(6, 4, 0)


def test_the_same_adapter_in_another_place_goes_on(
    begun: Path, source: Path, predictor: VQAPredictor, run_folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(run_folder / "best", tmp_path / "moved" / "adapter")
    predictor.engine = load_adapter(moved, device="cpu", dtype="float32", offline=True)

    assert run_batch(source, begun, predictor) == BatchReport(6, 4, 0)


def test_other_words_around_the_question_are_another_adapter(
    begun: Path, source: Path, predictor: VQAPredictor, engine: LoadedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = engine.assembly.recipe
    prompt = recipe.prompt.model_copy(update={"question": "Tell me: {question}"})
    monkeypatch.setattr(engine.assembly, "recipe", recipe.model_copy(update={"prompt": prompt}))

    assert "was another of this name" in refusal(source, begun, predictor)


def test_another_task_is_refused(predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [row | {"caption": "a shape"} for row in rows])
    out = tmp_path / "out.jsonl"
    run_batch(source, out, predictor, task="vqa", limit=2)

    said = refusal(source, out, predictor, task="caption")

    assert said.startswith("its answers were made otherwise (the task is caption, was vqa); ")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_an_input_that_has_grown_at_its_end_goes_on(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path, suffix: str
) -> None:
    source = tmp_path / f"rows.{suffix}"

    def put(count: int) -> None:
        if suffix == "csv":
            with source.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([list(rows[0]), *(list(row.values()) for row in rows[:count])])
        elif suffix == "json":
            source.write_text(json.dumps(rows[:count]), encoding="utf-8")
        else:
            source.write_text("\n".join(json.dumps(row) for row in rows[:count]), encoding="utf-8")

    for count, report in ((4, BatchReport(4, 0, 0)), (7, BatchReport(3, 4, 0)), (10, BatchReport(3, 7, 0))):
        put(count)
        assert run_batch(source, out, predictor) == report
        assert json.loads(job_file(out).read_text(encoding="utf-8"))["rows"] == count
    assert [line["row"] for line in read_jsonl(out)] == list(range(1, 11))
    put(9)
    assert f"rows.{suffix} has 9 rows, had 10" in refusal(source, out, predictor)


def test_an_input_that_has_changed_is_refused(
    predictor: VQAPredictor, rows: list[dict[str, Any]], source: Path, out: Path
) -> None:
    run_batch(source, out, predictor, limit=4)
    run_batch(source, out, predictor, limit=6)
    others = {
        "a row before": [{**rows[0], "question": "new?"}, *rows],
        "another question": [*rows[:5], {**rows[5], "question": "new?"}, *rows[6:]],
        "another picture": [*rows[:2], {**rows[2], "image": rows[3]["image"]}, *rows[3:]],
        "another language": [{**rows[0], "language": "zh"}, *rows[1:]],
        "a row less": [*rows[:1], *rows[2:]],
    }
    for change, changed_rows in others.items():
        write_jsonl(source, changed_rows)
        said = refusal(source, out, predictor)
        assert "(the first 6 rows of rows.jsonl are not those of then); " in said, change
        assert refusal(source, out, predictor, limit=2) == said, change  # however few rows are asked for
    write_jsonl(source, [*rows[:6], {**rows[6], "question": "new?"}, *rows[7:]])  # not read so far
    assert run_batch(source, out, predictor) == BatchReport(4, 6, 0)


def test_a_smaller_limit_after_a_larger_one_finds_its_rows_done(
    begun: Path, predictor: VQAPredictor, source: Path
) -> None:
    assert run_batch(source, begun, predictor, limit=2) == BatchReport(0, 2, 0)
    assert run_batch(source, begun, predictor, limit=5) == BatchReport(1, 4, 0)


def test_all_that_differs_stands_in_one_line(
    begun: Path, source: Path, predictor: VQAPredictor, rows: list[dict[str, Any]]
) -> None:
    predictor.decoding = Decoding(max_new_tokens=9)
    write_jsonl(source, rows[1:])

    said = refusal(source, begun, predictor)

    assert "the first 4 rows of rows.jsonl are not those of then; max_new_tokens is 9, was 5" in said


def test_answers_without_their_job_are_refused(begun: Path, source: Path, predictor: VQAPredictor) -> None:
    job_file(begun).unlink()

    said = refusal(source, begun, predictor)

    assert said == (
        "it holds something already, and no out.jsonl.job.json beside it says what wrote that;"
        " name another file, or delete it"
    )


@pytest.mark.parametrize("left", [None, b""])
def test_a_job_without_answers_holds_nobody_to_anything(
    begun: Path, source: Path, predictor: VQAPredictor, left: bytes | None
) -> None:
    begun.unlink()
    if left is not None:
        begun.write_bytes(left)
    predictor.decoding = Decoding(max_new_tokens=6)

    assert run_batch(source, begun, predictor, limit=3) == BatchReport(3, 0, 0)
    assert json.loads(job_file(begun).read_text(encoding="utf-8"))["decoding"]["max_new_tokens"] == 6


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 2}', "is damaged"),
        ('{"format": 1}', "is of another version of querybridge"),
    ],
)
def test_a_job_that_cannot_be_read_is_refused(
    begun: Path, source: Path, predictor: VQAPredictor, content: str, says: str
) -> None:
    job_file(begun).write_text(content, encoding="utf-8")

    said = refusal(source, begun, predictor)

    assert said == f"out.jsonl.job.json {says}; name another file, or delete both {begun} and out.jsonl.job.json"
