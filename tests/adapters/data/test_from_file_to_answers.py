"""Formats that bring their pictures, all the way: trained on, answered in a batch that is resumed, and scored."""

from __future__ import annotations

from pathlib import Path

from data_rows import read_jsonl
from tiny import draw_data, tiny_values

from adapters.data.convert import convert_data
from adapters.finetune import finetune
from adapters.recipe import parse_recipe
from serve.batch.predictor import VQAPredictor
from serve.batch.run import run_batch
from serve.evaluation.run import evaluate


def test_parquet_is_trained_answered_and_scored_as_its_source_is(
    tmp_path: Path, vision_folder: Path, language_folders: dict[str, Path]
) -> None:
    rows = draw_data(tmp_path)
    table = tmp_path / "rows.parquet"
    convert_data(rows, table)
    values = tiny_values(vision_folder, language_folders["llama"], table, max_steps=2)
    assert finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True).finished

    predictor = VQAPredictor(tmp_path / "run", device="cpu")
    for data in (rows, table):
        run_batch(data, tmp_path / f"{data.suffix[1:]}.out.jsonl", predictor)
    whole, ours = (read_jsonl(tmp_path / f"{name}.out.jsonl") for name in ("jsonl", "parquet"))
    assert [line["answer"] for line in ours] == [line["answer"] for line in whole] and len(ours) == 24
    part = tmp_path / "part.jsonl"
    run_batch(table, part, predictor, limit=5)
    assert run_batch(table, part, predictor).already == 5
    assert part.read_bytes() == (tmp_path / "parquet.out.jsonl").read_bytes()
    assert evaluate(predictor.engine, table)["exact_match"] == evaluate(predictor.engine, rows)["exact_match"]
