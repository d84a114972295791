"""Columns of other names: read as the fields that they are, and never beside one of the same name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from data_rows import VQA, complaint
from PIL import Image

from adapters.data.columns import parse_columns
from adapters.data.reading import read_data
from adapters.recipe import load_recipe, parse_recipe
from adapters.training.setup import read_split
from qformer.errors import UserError

THEIRS = {"photo": "a.png", "prompt": "What is it?", "answer": "a cat", "question": "unused"}
COLUMNS = {"image": "photo", "question": "prompt"}


def test_other_names_are_read(jsonl: Callable[..., Path]) -> None:
    row = {name: value for name, value in THEIRS.items() if name != "question"}
    (example,) = read_data(jsonl(row), columns=COLUMNS).examples
    (ours,) = read_data(jsonl(VQA)).examples
    assert (example.images, example.question, example.answers) == (ours.images, ours.question, ours.answers)
    swapped = {"question": "a cat", "answer": "What is it?", "image": "a.png"}
    (example,) = read_data(jsonl(swapped), columns={"question": "answer", "answer": "question"}).examples
    assert (example.question, example.answer) == ("What is it?", "a cat")


def test_what_is_wrong_with_names(jsonl: Callable[..., Path]) -> None:
    assert "has 'question' beside 'prompt', which --columns reads as it" in complaint(jsonl(THEIRS), columns=COLUMNS)
    message = complaint(jsonl(VQA), columns={"answer": "reply"})
    assert "no row has 'reply' (found: image, question, answer)" in message
    for text, words in (
        ("image", "write field=column pairs"),
        ("image=", "write field=column pairs"),
        ("image=a,image=b", "'image' is there twice"),
        ("imge=a", "no field is called 'imge'; did you mean 'image'?"),
        ("image=a,question=a", "reads one column as two fields"),
    ):
        with pytest.raises(UserError) as caught:
            parse_columns(text)
        assert words in str(caught.value)
    assert parse_columns("image = photo, question=prompt") == COLUMNS


def test_a_class_may_be_the_answer_to_a_question_of_the_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"]), "ask": datasets.Value("string")}
    )
    columns = {"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [1], "ask": ["is it?"]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    asked = read_data(path, columns={"question": "ask", "answer": "label"}).examples[0]
    assert (asked.question, asked.answer) == ("is it?", "yes")
    alone = read_data(path, columns={"answer": "label"}).examples[0]
    assert (alone.question, alone.answer) == ("What is this?", "yes")


def test_a_recipe_names_columns(jsonl: Callable[..., Path]) -> None:
    path = jsonl(*({"photo": f"{name}.png", "prompt": "?", "answer": "x"} for name in "abcd"))
    values = load_recipe("domain_cpu").model_dump()
    values["data"] |= {"train": str(path), "columns": COLUMNS, "val_fraction": 0.25}
    train, val = read_split(parse_recipe(values, "test"))
    assert (len(train.examples), len(val.examples)) == (3, 1)
    values["data"]["train"] = [
        {"file": str(path), "columns": {"image": "photo", "question": "answer", "answer": "prompt"}}
    ]
    train, _ = read_split(parse_recipe(values, "test"))
    assert train.examples[0].answers == ("?",)


def test_an_empty_cell_is_not_beside_another(folder: Path) -> None:
    (folder / "rows.csv").write_text("image,prompt,question,answer\na.png,What is it?,,a cat\n")
    (example,) = read_data(folder / "rows.csv", columns={"question": "prompt"}).examples
    assert example.question == "What is it?"


def test_a_column_that_is_nowhere_is_missed_though_only_the_first_rows_are_read(jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, VQA, VQA)
    with pytest.raises(UserError, match="no row has 'nix'"):
        read_data(path, columns={"question": "nix"}, limit=1)
    late = jsonl(VQA, {**VQA, "note": "x"})
    assert len(read_data(late, columns={"context": "note"}, limit=1).examples) == 1
