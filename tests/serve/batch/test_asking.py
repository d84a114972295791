"""What a batch job may ask: questions for all rows, choices, reasons, embeddings; and the tables that it writes."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
import pytest
import torch
from command import FAST, Call
from data_rows import borrowed, read_jsonl, write_jsonl
from reason_data import draw_reasons
from tiny import draw_captions, save_tiny_bert, tiny_values

from adapters.finetune import finetune
from adapters.pretrain import pretrain
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import load_adapter
from serve.batch.ordered_lines import BatchReport
from serve.batch.predictor import EmbeddingPredictor, VQAPredictor
from serve.batch.run import run_batch
from serve.reasoning import reason
from serve.retrieval import load_retriever


@pytest.fixture
def folder(tmp_path: Path, data_file: Path) -> Path:
    """Three pictures, one of them in a folder within."""
    (tmp_path / "pictures" / "b").mkdir(parents=True)
    for number, name in enumerate(("c.png", "b/a.PNG", "a.png")):
        shutil.copy(data_file.parent / f"{number}.png", tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture
def parts(tmp_path: Path, data_file: Path) -> Path:
    """Rows with columns of their own."""
    image = borrowed(data_file.parent / "0.png", tmp_path)
    rows = [
        {"image": image, "part": "bolt", "price": 3, "answer": "yes", "ok": True},
        {"image": image, "part": '=nut, "M4"', "price": 2.5, "ok": None, "sizes": [1, 2]},
    ]
    return write_jsonl(tmp_path / "parts.jsonl", rows)


# -- questions -------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_folder_is_asked_every_question(
    predictor: VQAPredictor, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    questions = ["is it red?", "what colour is it?"]
    assert run_batch(folder, out, predictor, questions=questions, limit=2) == BatchReport(4, 0, 0)
    assert run_batch(folder, out, predictor, questions=questions) == BatchReport(2, 4, 0)
    found = read_jsonl(out)
    assert [(line["row"], line["question_number"], line["image"], line["question"]) for line in found] == [
        (row, number, name, question)
        for row, name in enumerate(("a.png", "c.png", "b/a.PNG"), start=1)
        for number, question in enumerate(questions, start=1)
    ]
    assert [line["answer"] for line in found] == [
        predictor.engine.ask(folder / line["image"], line["question"], decoding=predictor.decoding) for line in found
    ]
    with pytest.raises(UserError, match=r"--question is \['is it red\?'\], was \['is it red\?', 'what"):
        run_batch(folder, out, predictor, questions=questions[:1])


def test_columns_go_into_the_question_and_through_to_the_answers(
    predictor: VQAPredictor, parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(parts, out, predictor, questions=["is there a {part} {{so}}?"])
    first, second = read_jsonl(out)
    assert (first["question"], second["question"]) == ("is there a bolt {so}?", 'is there a =nut, "M4" {so}?')
    assert list(first)[:3] == ["row", "id", "image"] and "question_number" not in first
    assert first["reference"] == ["yes"]
    assert {name: first[name] for name in ("part", "price", "ok")} == {"part": "bolt", "price": 3, "ok": True}
    assert second["sizes"] == [1, 2] and second["ok"] is None


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("", "--question: it is empty"),
        ("is there {}?", "a column's name goes between the braces"),
        ("is there {part!r}?", "a column's name goes between the braces"),
        ("is there {part?", "write {{ and }} for braces themselves"),
        ("is there {colour}?", r"row 1 \(line 1\): column 'colour', which --question names, is missing"),
        ("is there {sizes}?", r"row 1 \(line 1\): column 'sizes', which --question names, is missing"),
    ],
)
def test_a_question_that_cannot_be_put_is_told(
    predictor: VQAPredictor, parts: Path, tmp_path: Path, question: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run_batch(parts, tmp_path / "out.jsonl", predictor, questions=[question])
    assert not (tmp_path / "out.jsonl").exists()


def test_questions_of_the_rows_are_not_passed_over(predictor: VQAPredictor, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 1 .* has a question of its own; write {question} within --question"):
        run_batch(source, tmp_path / "out.jsonl", predictor, questions=["is it big?"])
    run_batch(source, tmp_path / "out.jsonl", predictor, questions=["{question} In one word."], limit=1)
    assert read_jsonl(tmp_path / "out.jsonl")[0]["question"] == "what colour is it? In one word."


def test_a_column_with_one_of_our_names_keeps_its_value_under_another(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [rows[0] | {"confidence": "high", "error": "none", "row": 7}])
    run_batch(source, tmp_path / "out.jsonl", predictor)
    (line,) = read_jsonl(tmp_path / "out.jsonl")
    assert (line["input_confidence"], line["input_error"], line["input_row"], line["row"]) == ("high", "none", 7, 1)
    source = write_jsonl(tmp_path / "both.jsonl", [rows[0] | {"input_row": 1, "row": 7}])
    with pytest.raises(UserError, match="columns 'row' and 'input_row' would have one name"):
        run_batch(source, tmp_path / "both_out.jsonl", predictor)


def test_a_column_that_is_nowhere_is_missed_before_anything_is_answered(
    predictor: VQAPredictor, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no row has 'nix'"):
        run_batch(source, tmp_path / "out.jsonl", predictor, columns={"question": "nix"}, limit=1)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_earlier_job_s_findings_never_stand_beside_another_answer(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    earlier = {
        "logprobs": [{"token": "no", "logprob": -0.1}],
        "embedding": [0.1, 0.2],
        "withheld": 3,
    }
    source = write_jsonl(tmp_path / "rows.jsonl", [rows[0] | earlier, rows[0]])
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        run_batch(source, tmp_path / name, predictor)
    line = read_jsonl(tmp_path / "out.jsonl")[0]
    assert not {"logprobs", "embedding", "withheld"} & line.keys()
    assert (line["input_logprobs"], line["input_embedding"], line["input_withheld"]) == (
        earlier["logprobs"], earlier["embedding"], 3
    )  # fmt: skip
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert json.loads(table[0]["input_embedding"]) == [0.1, 0.2] and table[1]["input_embedding"] is None


# -- what is found out -----------------------------------------------------------------------------------------------


def test_choices_for_all_rows_are_weighed_as_ask_weighs_them(
    predictor: VQAPredictor, rows: list[dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    out, choices = tmp_path / "out.jsonl", ["red", "a, b", "blue"]
    run_batch(source, out, predictor, choices=choices)
    for line, row in zip(read_jsonl(out), rows, strict=True):
        wanted = predictor.engine.choose(row["image"], row["question"], choices)
        assert line["choices"] == pytest.approx(wanted, abs=2e-4)
        assert (line["answer"], line["confidence"]) == (next(iter(wanted)), line["choices"][line["answer"]])
    own = write_jsonl(tmp_path / "own.jsonl", [rows[0] | {"choices": ["yes", "no"], "context": "At noon."}])
    run_batch(own, tmp_path / "own_out.jsonl", predictor)
    (line,) = read_jsonl(tmp_path / "own_out.jsonl")
    assert line["answer"] in line["choices"] and set(line["choices"]) == {"yes", "no"}
    assert line["context"] == "At noon."
    with pytest.raises(UserError, match=r"--choices: .*row 1 .*has choices of its own"):
        run_batch(own, tmp_path / "no.jsonl", predictor, choices=choices)


def test_log_probabilities_of_tokens_make_up_the_confidence(
    predictor: VQAPredictor, source: Path, tmp_path: Path
) -> None:
    run_batch(source, tmp_path / "out.jsonl", predictor, logprobs=True)
    for line in read_jsonl(tmp_path / "out.jsonl"):
        values = [one["logprob"] for one in line["logprobs"]]
        assert math.exp(sum(values) / len(values)) == pytest.approx(line["confidence"], abs=2e-3)
        written = "".join(one["token"] for one in line["logprobs"])
        assert written.startswith(line["answer"])


def test_an_answer_of_low_confidence_is_withheld(predictor: VQAPredictor, source: Path, tmp_path: Path) -> None:
    run_batch(source, tmp_path / "all.jsonl", predictor)
    found = read_jsonl(tmp_path / "all.jsonl")
    bar = sorted(line["confidence"] for line in found)[5]
    run_batch(source, tmp_path / "sure.jsonl", predictor, min_confidence=bar)
    for line, one in zip(read_jsonl(tmp_path / "sure.jsonl"), found, strict=True):
        if one["confidence"] >= bar:
            assert line == one
        else:
            assert (line["answer"], line["confidence"]) == ("", one["confidence"])
            assert line["withheld"] == f"confidence {one['confidence']} is below {bar}"


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("caption", {"questions": ["what?"]}, "--task caption asks no question"),
        ("caption", {"choices": ["a", "b"]}, "--choices: --task caption has no answer to choose"),
        ("vqa", {"choices": ["a", "b"], "logprobs": True}, "--logprobs: with --choices nothing is written"),
        ("vqa", {"choices": ["a"]}, "choices: 1 given"),
        ("vqa", {"rationale_tokens": 9}, "--rationale-tokens: --task vqa gives no reasons"),
        ("vqa", {"votes": 3}, "--votes: --task vqa gives no reasons"),
        ("reason", {"votes": 3, "logprobs": True}, "--logprobs: with --votes"),
        ("vqa", {"min_confidence": 50}, "--min-confidence 50: give a number between 0 and 1"),
        ("embed", {"min_confidence": 0.5}, "--min-confidence: --task embed has no confidence"),
        ("essay", {}, "--task 'essay': take one of vqa, caption, reason, embed"),
    ],
)
def test_settings_without_effect_are_refused(
    predictor: VQAPredictor, source: Path, tmp_path: Path, task: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        run_batch(source, tmp_path / "out.jsonl", predictor, task=task, **options)


def test_reasons_are_those_that_reason_gives(
    clip_folder: Path, language_folders: dict[str, Path], tmp_path: Path, cache_folder: Path
) -> None:
    reasons = draw_reasons(tmp_path / "data")
    train = {"max_steps": 2, "validate_every": 2, "row_tokens": 500, "micro_batch_tokens": 2000}
    values = tiny_values(clip_folder, language_folders["llama"], reasons, **train)
    values |= {"task": "reason", "reason": {"stages": ["rationale", "answer"], "rationale_tokens": 6}}
    finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    engine = load_adapter(tmp_path / "run", device="cpu", dtype="float32", offline=True)
    predictor = object.__new__(VQAPredictor)
    predictor.engine, predictor.decoding, predictor.batch_size = engine, Decoding(max_new_tokens=5), 4
    asked = [json.loads(line) for line in reasons.read_text(encoding="utf-8").splitlines()][:5]
    del asked[1]["choices"]
    source = write_jsonl(reasons.parent / "asked.jsonl", asked)

    for votes in (1, 3):
        out = tmp_path / f"{votes}.jsonl"
        run_batch(source, out, predictor, task="reason", rationale_tokens=7, votes=votes)
        for line, row in zip(read_jsonl(out), asked, strict=True):
            thought = reason(
                engine, source.parent / row["image"], row["question"], choices=row.get("choices", ()), votes=votes,
                decoding=Decoding(max_new_tokens=5), rationale_tokens=7,
            )  # fmt: skip
            assert (line["rationale"], line["answer"]) == (thought.rationale, thought.answer)
            assert line["confidence"] == pytest.approx(thought.confidence, abs=1e-3)
            assert line["input_rationale"] == row["rationale"] and line["reference"] == [row["answer"]]
            assert line["steps"] == row["steps"]
    with pytest.raises(UserError, match="rows with reasons; --task reason gives reasons too, --task vqa"):
        run_batch(source, tmp_path / "none.jsonl", predictor)


def test_embeddings_are_those_that_search_compares(
    clip_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    data = draw_captions(tmp_path / "data")
    values: Any = tiny_values(clip_folder, language_folders["llama"], data, max_steps=2, validate_every=2)
    values["task"] = "caption"
    values["bridge"] |= {"start": str(save_tiny_bert(tmp_path / "bert")), "dropout": 0.0, "text_branch": True}
    pretrain(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    adapter = tmp_path / "run" / "last"
    predictor = EmbeddingPredictor(adapter, batch_size=5, device="cpu")

    for name in ("out.jsonl", "out.parquet"):
        assert run_batch(data.parent, tmp_path / name, predictor, task="embed") == BatchReport(12, 0, 0)

    retriever, _ = load_retriever(adapter, device="cpu")
    from serve.adapter import picture_ref

    lines = read_jsonl(tmp_path / "out.jsonl")
    wanted = retriever.embed_images([picture_ref(data.parent / line["image"]) for line in lines])
    torch.testing.assert_close(torch.tensor([line["embedding"] for line in lines]), wanted, atol=1e-5, rtol=0)
    table = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(table["embedding"][0][0]) == pytest.approx(lines[0]["embedding"][0])


# -- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_holds_what_the_lines_hold(predictor: VQAPredictor, parts: Path, tmp_path: Path) -> None:
    ask: dict[str, Any] = {"questions": ["a {part}?", "{part}?"], "logprobs": True}
    for ending in ("jsonl", "csv", "parquet"):
        run_batch(parts, tmp_path / f"out.{ending}", predictor, **ask)
    lines = read_jsonl(tmp_path / "out.jsonl")

    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    names = ["row", "question_number", "id", "image", "question", "answer", "confidence", "logprobs", "reference"]
    assert list(cells[0]) == [*names, "part", "price", "ok", "sizes"]
    for cell, line in zip(cells, lines, strict=True):
        assert cell["part"] == line["part"] and float(cell["price"]) == line["price"]
        assert int(cell["row"]) == line["row"] and cell["answer"] == line["answer"]
        assert json.loads(cell["logprobs"]) == line["logprobs"]
        assert json.loads(cell["sizes"] or "null") == line.get("sizes")

    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == list(cells[0])
    assert [str(table.schema.field(name).type) for name in ("row", "confidence", "price", "ok", "sizes")] == [
        "int64", "double", "double", "bool", "string",
    ]  # fmt: skip
    for found, line in zip(table.to_pylist(), lines, strict=True):
        assert found["sizes"] == (json.dumps(line["sizes"]) if "sizes" in line else None)
        assert {name: found[name] for name in line if name != "sizes"} == {
            name: line[name] for name in line if name != "sizes"
        }


def test_a_table_goes_on_too_and_never_covers_another_file(
    predictor: VQAPredictor, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    assert run_batch(source, out, predictor, limit=4) == BatchReport(4, 0, 0)
    assert list(pandas.read_csv(out, dtype=str)["row"]) == ["1", "2", "3", "4"]
    assert run_batch(source, out, predictor) == BatchReport(6, 4, 0)
    assert list(pandas.read_csv(out)["row"]) == list(range(1, 11))
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"it is there, and no mine\.parquet\.rows\.jsonl beside it says"):
        run_batch(source, mine, predictor)
    assert mine.read_bytes() == b"mine"


def test_parquet_in_and_out(predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    table = pandas.DataFrame(rows).assign(when=pandas.Timestamp("2024-05-01"), price=[1.5, float("nan"), *range(8)])
    table.to_parquet(tmp_path / "rows.parquet")
    run_batch(tmp_path / "rows.parquet", tmp_path / "out.parquet", predictor)
    found = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(found["question"]) == list(table["question"])
    assert list(found["when"]) == ["2024-05-01T00:00:00"] * 10
    assert found["price"].isna().tolist() == table["price"].isna().tolist()


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_asks_a_folder_and_writes_a_table(
    call: Call, run_folder: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    asked = ["batch", folder, "--question", "is it red?", "--adapter", run_folder, "--out", out, "--quiet", *FAST]
    assert call(*asked, "--choices", '["yes", "no, not red"]', "--json").values == {
        "out": str(out), "answered": 3, "already": 0, "failed": 0,
    }  # fmt: skip
    assert "no, not red" in out.read_text(encoding="utf-8")
    for words, says in (
        (["--choices", "yes,no", "--beams", "2"], "--choices gives each its probability and writes nothing"),
        (["--engine", "spark"], "--engine 'spark': take local or ray"),
    ):
        assert says in call(*asked, *words).mistake()


def test_progress_tells_the_speed_and_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve.cli import batch

    now = [0.0]
    monkeypatch.setattr(batch.time, "monotonic", lambda: now[0])
    tell = batch.Progress()
    for at, done in ((100.0, 40), (101.0, 50), (110.0, 60), (120.0, 1000)):
        now[0] = at
        tell(done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "answered 40/1000",
        "answered 60/1000 (2.0 rows/s, 8 min left)",
        "answered 1000/1000 (48.0 rows/s)",
    ]
    assert [batch.in_words(seconds) for seconds in (0.2, 45, 600, 7500, 200_000)] == [
        "1 s", "45 s", "10 min", "2 h 05 min", "2 d 08 h",
    ]  # fmt: skip
