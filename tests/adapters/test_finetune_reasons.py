"""Training tiny models on rows with reasons: both stages in one adapter, each stage alone, beside other tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reason_data import draw_reasons
from tiny import draw_data, tiny_values

from adapters.artefact.artefact import load_artefact
from adapters.artefact.facts import read_facts
from adapters.data.reading import read_data
from adapters.finetune import finetune
from adapters.inference.reasoning import reason_examples
from adapters.recipe import Recipe, parse_recipe
from adapters.training.run_data import Result

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def recipe_of(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Any:
    def make(*stages: str, kind: str = "llama", data: dict[str, Any] | None = None, **train: Any) -> Recipe:
        file = draw_reasons(tmp_path / "data")
        options = {"row_tokens": 400, "micro_batch_tokens": 1200, "max_steps": 2, "validate_every": 2, **train}
        values: Any = tiny_values(vision_folder, language_folders[kind], file, **options)
        values["task"] = "reason"
        values["reason"] = {"stages": list(stages or ("rationale", "answer")), "rationale_tokens": 40}
        if data is not None:
            values["task"], values["data"] = "mixed", {**values["data"], **data}
        return parse_recipe(values, "test")

    return make


def run(recipe: Recipe, out: Path) -> Result:
    return finetune(recipe, out, device="cpu", dtype="float32", quiet=True)


def test_both_stages_are_learned_and_come_back_from_the_artefact(recipe_of: Any, tmp_path: Path) -> None:
    result = run(recipe_of(max_steps=60, validate_every=60, learning_rate=5e-3, warmup_steps=3), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    facts = read_facts(tmp_path / "run" / "best")
    assert facts.data["answers"] == 2 * 18 and facts.data["pictures"] == 9  # a quarter of the pictures is held out
    ends = ("", "_single_step", "_multi_step")
    assert {f"val_{name}{end}" for name in ("accuracy", "rationale_ROUGE-L") for end in ends} <= set(result.metrics)
    assert result.metrics["val_rationale_ROUGE-L"] > 0.3  # it has learned to write "It is …"
    assembly, _ = load_artefact(tmp_path / "run", dtype="float32")
    rows = read_data(tmp_path / "data" / "reasons.jsonl").examples[:4]
    thoughts = reason_examples(assembly, rows)
    assert all(thought.rationale and thought.rationale.startswith("It") for thought in thoughts)
    alone = [reason_examples(assembly, [one])[0] for one in rows]  # whatever else is in the batch
    assert [(one.rationale, one.answer) for one in thoughts] == [(one.rationale, one.answer) for one in alone]
    assert [one.choices for one in thoughts] == [pytest.approx(one.choices, abs=1e-6) for one in alone]


@pytest.mark.parametrize(
    ("stages", "answers", "figures"),
    [
        (("rationale",), 18, {"val_rationale_ROUGE-L"}),
        (("answer",), 18, {"val_accuracy"}),
        (("direct",), 18, {"val_accuracy"}),
        (("direct", "rationale", "answer"), 54, {"val_accuracy", "val_rationale_ROUGE-L"}),
    ],
)
def test_stages_are_chosen_by_the_recipe(
    recipe_of: Any, tmp_path: Path, stages: tuple[str, ...], answers: int, figures: set[str]
) -> None:
    result = run(recipe_of(*stages), tmp_path / "run")
    assert read_facts(tmp_path / "run" / "best").data["answers"] == answers
    assert {name for name in result.metrics if name in ("val_accuracy", "val_rationale_ROUGE-L")} == figures


@pytest.mark.parametrize("kind", ["t5", "opt"])
def test_other_kinds_of_language_models(recipe_of: Any, tmp_path: Path, kind: str) -> None:
    assert "val_accuracy" in run(recipe_of(kind=kind), tmp_path / "run").metrics


def test_reasons_beside_other_tasks(recipe_of: Any, tmp_path: Path) -> None:
    """A file of questions, one with reasons, and one with reasons read for its answers alone."""
    plain, reasons = draw_data(tmp_path / "data"), draw_reasons(tmp_path / "data")
    files = [{"file": str(plain)}, {"file": str(reasons)}, {"file": str(reasons), "task": "vqa"}]
    result = run(recipe_of(data={"train": files}), tmp_path / "run")
    assert read_facts(tmp_path / "run" / "best").data["answers"] == 18 + 2 * 18 + 18
    assert {"val_exact_match", "val_accuracy"} <= set(result.metrics)
