"""Cross-validation: each picture is held out once, and the last adapter learns from all."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import draw_data, tiny_values

from adapters import finetune as finetune_module
from adapters.artefact.artefact import load_artefact
from adapters.artefact.facts import read_facts
from adapters.data.reading import read_data
from adapters.recipe import Recipe, parse_recipe
from adapters.training.cross_validation import SCORED, FoldScore, combine, cross_validate
from adapters.training.run_data import Result
from adapters.training.setup import read_split
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def recipe(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Recipe:
    data = draw_data(tmp_path / "data")
    values: Any = tiny_values(vision_folder, language_folders["llama"], data, max_steps=4, validate_every=2, patience=1)
    del values["data"]["val_fraction"]
    values["bridge"] |= {"reader": "answers", "hide_queries": 0.5}
    return parse_recipe(values, "test")


def run(recipe: Recipe, out: Path, say: Callable[[str], None] = lambda line: None) -> Result:
    def train(fold: str | None, folder: Path, **more: Any) -> Result:
        resume = (folder / "state").exists()
        return finetune_module.finetune(
            recipe.holding_out(fold), folder, resume=resume, device="cpu", dtype="float32", quiet=True, **more
        )

    return cross_validate(train, out, 3, say=say)


def test_every_picture_is_held_out_once_and_the_last_run_learns_all(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []
    result = run(recipe, tmp_path / "run", say=said.append)
    scores = [json.loads((tmp_path / "run" / "folds" / str(n) / SCORED).read_text()) for n in (1, 2, 3)]
    rows = read_data(str(recipe.data.train)).examples
    assert sorted(picture for score in scores for picture in score["pictures"]) == sorted(
        example.images[0].digest() for example in rows
    )
    hits = [hit for score in scores for hit in score["hits"]]
    assert result.finished and result.metrics["val_exact_match"] == pytest.approx(sum(hits) / 24)
    assert result.metrics["val_exact_match_low"] <= result.metrics["val_exact_match"]
    assert "val_linear_probe" in result.metrics
    facts = read_facts(tmp_path / "run" / "best")
    assert facts.metrics["val_exact_match"] == pytest.approx(sum(hits) / 24)
    assert facts.data["answers"] == 24 and facts.data["pictures"] == 12
    assembly, _ = load_artefact(tmp_path / "run" / "best")
    assert assembly.reader is not None and assembly.reader.answers is not None
    assert len(assembly.reader.answers.ridge.pictures) == 12
    for n in (1, 2, 3):  # a fold's reader has not seen what it is scored on
        fold, _ = load_artefact(tmp_path / "run" / "folds" / str(n) / "last")
        assert fold.reader is not None and fold.reader.answers is not None
        assert len(fold.reader.answers.ridge.pictures) == 8
    assert len(said) == 4 and said[0].startswith("fold 1 of 3: ") and "now one adapter on all pictures" in said[-1]


def test_it_goes_on_after_the_fold_that_was_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, calls = finetune_module.validate, []

    def press_ctrl_c(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 5:  # the second fold's first validation
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args, **options)

    monkeypatch.setattr(finetune_module, "validate", press_ctrl_c)
    assert not run(recipe, tmp_path / "run").finished
    monkeypatch.setattr(finetune_module, "validate", validate)
    folds = tmp_path / "run" / "folds"
    assert (folds / "1" / SCORED).is_file() and not (folds / "2" / SCORED).exists()
    first = (folds / "1" / SCORED).stat().st_mtime_ns
    assert run(recipe, tmp_path / "run").finished
    assert (folds / "1" / SCORED).stat().st_mtime_ns == first


def test_scores_of_folds_are_weighed_by_their_questions() -> None:
    scores = [
        FoldScore((1.0, 1.0, 0.0), ("a", "a", "b"), {"val_blank_images": 0.2}),
        FoldScore((0.0,), ("c",), {"val_blank_images": 0.6}),
    ]
    found = combine(scores)
    assert found["val_exact_match"] == 0.5
    assert found["val_blank_images"] == pytest.approx(0.3)
    assert "val_loss" not in found


def test_a_fold_without_its_score_is_run_again(recipe: Recipe, tmp_path: Path) -> None:
    first = run(recipe, tmp_path / "run")
    (tmp_path / "run" / "folds" / "2" / SCORED).unlink()
    assert run(recipe, tmp_path / "run").metrics["val_exact_match"] == first.metrics["val_exact_match"]


def test_what_cannot_be_cross_validated_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="the task is 'caption'"):
        recipe.model_copy(update={"task": "caption"}).holding_out("1/3")
    data = recipe.data.model_copy(update={"val": "other.jsonl"})
    with pytest.raises(UserError, match="--folds holds out pictures of the training data: leave data"):
        recipe.model_copy(update={"data": data}).holding_out("1/3")


@pytest.mark.parametrize(("fold", "message"), [("3/2", "data.fold=3/2"), ("1/1", "data.fold=1/1"), ("1/40", "12 pict")])
def test_a_fold_that_is_not_there_is_refused(recipe: Recipe, fold: str, message: str) -> None:
    data = recipe.data.model_copy(update={"fold": fold})
    with pytest.raises(UserError, match=message):
        read_split(recipe.model_copy(update={"data": data}))
