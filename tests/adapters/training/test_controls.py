"""What a run's validation is compared with, how long a run takes, and what is said at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_data, tiny_values
from torch import Tensor, nn

from adapters.artefact.facts import read_facts
from adapters.data.examples import Example
from adapters.finetune import finetune, selection_score
from adapters.recipe import Recipe, parse_recipe
from adapters.training.controls import commonest_answers, describe_controls
from adapters.training.setup import held_out_share
from adapters.training.timing import FEWEST_STEPS, in_words, measure_step, steps_within
from qformer.errors import UserError


def row(question: str, *answers: str) -> Example:
    return Example((), question, answers=answers, where="row", id="1")


def test_each_question_gets_its_commonest_training_answer_and_a_new_one_the_commonest_of_all() -> None:
    train = [row("colour?", "Red"), row("colour?", "red"), row("colour?", "blue"), row("shape?", "circle")]
    assert commonest_answers(train, ["Colour?", "shape?", "size?"]) == ["red", "circle", "red"]
    assert commonest_answers([], ["colour?"]) == [""]


@pytest.mark.parametrize(("rows", "share"), [(40, 0.25), (400, 0.25), (1000, 0.1), (2000, 0.05), (10_000, 0.05)])
def test_a_hundred_rows_are_held_out_of_few(rows: int, share: float) -> None:
    assert held_out_share(rows) == pytest.approx(share)


def test_score_and_loss_choose_together() -> None:
    assert selection_score({"val_loss": 2.0, "val_exact_match": 0.5}) == pytest.approx(-0.5)
    assert selection_score({"val_loss": 2.0}) == pytest.approx(-1.0)
    assert selection_score({"val_loss": 2.0, "val_CIDEr": 0.7}) == 0.7


def told(**metrics: float) -> str:
    return "\n".join(describe_controls(metrics, step=30, total=40, stopped_early=metrics.pop("early", 0) > 0))


def test_the_end_of_a_run_in_words() -> None:
    good = {"val_exact_match": 0.8, "val_blank_images": 0.2, "val_commonest_answer": 0.3, "val_linear_probe": 0.75}
    text = told(**good, val_exact_match_low=0.7, val_exact_match_high=0.9, train_loss=0.3, val_loss=0.5)
    assert "step 30 of 40" in text and "95 % interval 70.0% to 90.0%" in text
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["20.0%", "30.0%", "75.0%"]
    assert "below the linear probe" in told(**(good | {"val_exact_match": 0.7}))
    assert "no better than without the pictures" in told(**(good | {"val_exact_match": 0.3}))
    assert "0.02 in training and 0.90 on the validation" in told(**good, train_loss=0.02, val_loss=0.9)
    assert "stopped early" in told(**good, early=1.0)
    assert told(val_loss=1.0) == ""


def test_steps_within_a_budget() -> None:
    assert steps_within(10, elapsed=80.0, step=2.0) == 200  # (0.8 * 600 - 80) / 2
    assert steps_within(1, elapsed=600.0, step=2.0) == FEWEST_STEPS
    assert in_words(40.4) == "40 s" and in_words(400) == "7 min"


def test_a_measured_step_leaves_no_trace() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.dropout = nn.Dropout(0.5)

        def forward(self, inputs: Tensor) -> tuple[Tensor, int]:
            return self.dropout(self.linear(inputs)).sum(), 1

    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert measure_step(model, [[], []], lambda rows: (torch.ones(3, 2),)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def recipe(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path, cache_here: None) -> Recipe:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"), max_steps=30)
    del values["train"]["validate_every"], values["data"]["val_fraction"]
    return parse_recipe(values, "test")


def test_a_run_validates_four_times_and_ends_with_its_controls(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(recipe, tmp_path / "run", device="cpu", dtype="float32")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [8, 16, 24, 30]
    metrics = read_facts(tmp_path / "run" / "best").metrics
    names = ("val_exact_match_low", "val_blank_images", "val_commonest_answer", "val_linear_probe", "train_loss")
    assert all(name in metrics for name in names)
    assert "val_linear_probe" in (tmp_path / "run" / "best" / "README.md").read_text()
    said = capsys.readouterr().err
    assert "30 steps of" in said and "a linear probe on the pooled features" in said
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {8, 16, 24, 30}
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_is_refused_where_it_would_have_no_effect(recipe: Recipe, tmp_path: Path) -> None:
    sampled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"minutes": 1.0, "self_critical": 2})})
    with pytest.raises(UserError, match=r"train.minutes=1 \(--budget\)"):
        finetune(sampled, tmp_path / "run", device="cpu", dtype="float32", quiet=True)


def test_a_budget_ends_a_run_early(recipe: Recipe, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"minutes": 1e-4})})
    result = finetune(short, tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    assert result.finished and result.steps == FEWEST_STEPS
