"""The training loop on tiny models: it learns, resumes as if unbroken, stops on NaN, keeps best and last."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import draw_data, tiny_values

from adapters import finetune as finetune_module
from adapters.artefact.artefact import load_artefact
from adapters.artefact.facts import read_facts
from adapters.finetune import finetune
from adapters.recipe import Recipe, parse_recipe
from adapters.training.run_data import Result
from qformer.errors import UserError
from qformer.file_lock import lock

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def recipe_of(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Any:
    def make(kind: str = "llama", quantize: str = "none", dropout: float = 0.1, **train: object) -> Recipe:
        data = draw_data(tmp_path / "data")
        values: Any = tiny_values(vision_folder, language_folders[kind], data, **train)
        values["language"]["quantize"] = quantize
        values["bridge"]["dropout"] = values["language"]["lora"]["dropout"] = dropout
        return parse_recipe(values, "test")

    return make


def run(recipe: Recipe, out: Path, **options: Any) -> Result:
    return finetune(recipe, out, device="cpu", dtype="float32", quiet=True, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state" / "weights.safetensors")


def test_a_run_learns_and_leaves_all_that_is_promised(recipe_of: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(recipe_of(max_steps=60, validate_every=30, learning_rate=5e-3, warmup_steps=3, dropout=0.0), out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert result.finished and result.steps == 60
    assert {p.name for p in out.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "samples.jsonl", "samples.png", "tensorboard", "loss.png", "best", "last",
        "state", "report.html",
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())
    facts = read_facts(out / "best")
    assert facts.metrics["val_exact_match"] == result.metrics["val_exact_match"]
    assert facts.data["pictures"] == 9 and facts.data["answers"] == 18  # a quarter of the pictures is held out


@pytest.mark.parametrize(("kind", "quantize"), [("llama", "nf4"), ("t5", "none")])
def test_resume_equals_the_unbroken_run(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, quantize: str
) -> None:
    """Ctrl-C in the middle of an epoch, with dropout, then --resume: the very same weights."""
    recipe = recipe_of(kind, quantize, dropout=0.2)
    whole = run(recipe, tmp_path / "whole")
    validate = finetune_module.validate
    calls = []

    def press_ctrl_c(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:  # the first call is the check before training
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args, **options)

    monkeypatch.setattr(finetune_module, "validate", press_ctrl_c)
    broken = run(recipe, tmp_path / "broken")
    assert not broken.finished and broken.steps == 3
    monkeypatch.setattr(finetune_module, "validate", validate)
    resumed = run(recipe, tmp_path / "broken", resume=True)
    assert resumed.finished and resumed.steps == whole.steps == 6
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


def test_targets_are_smoothed_in_training_and_not_in_validation(recipe_of: Any, tmp_path: Path) -> None:
    found = {}
    for smoothing in (0.0, 0.5):
        out = tmp_path / f"run{smoothing}"
        # a rate of nothing: both runs stand where they began
        run(recipe_of(max_steps=1, learning_rate=1e-12, label_smoothing=smoothing, dropout=0.0), out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found[smoothing] = {key: value for line in lines for key, value in line.items()}
    assert abs(found[0.5]["loss"] - found[0.0]["loss"]) > 0.01
    assert found[0.5]["val_loss"] == pytest.approx(found[0.0]["val_loss"], abs=1e-5)
    with pytest.raises(UserError, match=r"label_smoothing=0\.5: samples are weighed"):
        run(recipe_of(label_smoothing=0.5, self_critical=2), tmp_path / "weighed")


def test_accumulation_weighs_every_token_the_same(recipe_of: Any, tmp_path: Path) -> None:
    """Micro-batches of one row or of all: the same steps."""
    small = run(recipe_of(micro_batch_tokens=96, row_tokens=90, dropout=0.0, max_steps=3), tmp_path / "small")
    large = run(recipe_of(micro_batch_tokens=4000, row_tokens=90, dropout=0.0, max_steps=3), tmp_path / "large")
    assert small.steps == large.steps
    first, second = weights(tmp_path / "small"), weights(tmp_path / "large")
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-5), name


def test_nothing_frozen_moves(recipe_of: Any, tmp_path: Path, language_folders: dict[str, Path]) -> None:
    run(recipe_of(), tmp_path / "run")
    names = set(weights(tmp_path / "run"))
    assert all(n.split(".")[0] in ("feature_norm", "bridge", "projection") or "lora_" in n for n in names)
    assembly, _ = load_artefact(tmp_path / "run", dtype="float32")
    reference = load_file(language_folders["llama"] / "model.safetensors")
    state = assembly.model.language.base.state_dict()
    for name, tensor in reference.items():
        inside = name if name in state else name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(state[inside], tensor), name


def test_nan_stops_with_what_to_try(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qformer.model import VisionLanguageModel

    forward = VisionLanguageModel.forward

    def poisoned(self: VisionLanguageModel, *args: Any) -> Any:
        loss, count = forward(self, *args)
        return (loss * float("nan") if self.training else loss), count

    monkeypatch.setattr(VisionLanguageModel, "forward", poisoned)
    with pytest.raises(UserError, match=r"loss is nan at step 1; try --set train.learning_rate=3.3e-04"):
        run(recipe_of(), tmp_path / "run")


def test_a_row_that_is_too_long_is_left_out_and_named_if_bad_rows_are(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(max_steps=2)
    data = Path(str(recipe.data.train))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["question"] = "what colour is " + "very " * 200 + "big?"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"data.jsonl row 1 .*more than train.micro_batch_tokens \(320\)"):
        run(recipe, tmp_path / "run")
    skipping = recipe.model_copy(update={"data": recipe.data.model_copy(update={"skip_bad_rows": True})})
    result = finetune(skipping, tmp_path / "run", device="cpu", dtype="float32")
    assert "left out: " in (said := capsys.readouterr().err) and "data.jsonl row 1 " in said
    facts = read_facts(result.best)
    assert facts.data["bad rows left out"] == 1 and facts.data["answers"] in (17, 18)  # of 24, a quarter held out


def test_early_stopping_keeps_the_best(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 0.5, 0.1, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(
        finetune_module, "validate", lambda *_, **__: {"val_loss": next(losses), "val_exact_match": 0.5}
    )
    result = run(recipe_of(max_steps=50, validate_every=2, patience=2), tmp_path / "run")
    assert result.finished and result.steps == 8
    assert read_facts(tmp_path / "run" / "best").steps == 4
    assert read_facts(tmp_path / "run" / "last").steps == 8


def test_a_broken_evaluation_fails_before_training(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> dict[str, float]:
        raise RuntimeError("evaluation")

    monkeypatch.setattr(finetune_module, "validate", broken)
    with pytest.raises(RuntimeError, match="evaluation"):
        run(recipe_of(), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_second_run_does_not_encode_again(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qformer.image_encoders import ImageEncoder

    seen = []
    forward = ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels))
    run(recipe_of(max_steps=6), tmp_path / "one")
    # five tell the costs; then each distinct picture once, over all epochs and validations, and the blank one
    assert sum(seen) == 5 + 13
    run(recipe_of(max_steps=6), tmp_path / "two")
    assert sum(seen) == 5 + 13


def test_starting_from_an_adapter_inherits_its_terms(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of()
    run(recipe, tmp_path / "first")
    facts_file = tmp_path / "first" / "best" / "artefact.json"
    facts = json.loads(facts_file.read_text())
    facts_file.write_text(json.dumps(facts | {"terms": ["research only"]}))
    run(recipe, tmp_path / "second", start_from=str(tmp_path / "first"))
    second = read_facts(tmp_path / "second" / "best")
    assert second.terms == ("research only",)
    assert second.started_from == str(tmp_path / "first")
    other = recipe.model_copy(update={"bridge": recipe.bridge.model_copy(update={"num_queries": 5})})
    with pytest.raises(UserError, match="'bridge' differs"):
        run(other, tmp_path / "third", start_from=str(tmp_path / "first"))


def test_a_run_may_start_with_another_dropout_of_lora(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=2)
    run(recipe, tmp_path / "first")

    def with_lora(**changes: Any) -> Recipe:
        assert recipe.language.lora is not None
        lora = recipe.language.lora.model_copy(update=changes)
        return recipe.model_copy(update={"language": recipe.language.model_copy(update={"lora": lora})})

    run(with_lora(dropout=0.25), tmp_path / "second", start_from=str(tmp_path / "first"))
    kept = tmp_path / "second" / "last"
    assert json.loads((kept / "lora" / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    model = load_artefact(kept, dtype="float32")[0].model
    assert {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")} == {0.25}
    with pytest.raises(UserError, match=r"'language\.lora' differs"):
        run(with_lora(rank=3), tmp_path / "third", start_from=str(tmp_path / "first"))


def test_a_run_goes_on_with_its_own_validation_data_alone(recipe_of: Any, tmp_path: Path) -> None:
    """`best` is chosen by them; the state of an older version names none."""
    recipe = recipe_of(max_steps=2)
    val = draw_data(tmp_path / "val", questions=("what colour?",))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": str(val)})})
    run(recipe, tmp_path / "run")
    position = tmp_path / "run" / "state" / "position.json"
    written = json.loads(position.read_text())
    assert written["val"].startswith("sha256:") and written["val"] != written["data"]
    assert run(recipe, tmp_path / "run", resume=True).steps == 2
    draw_data(tmp_path / "val", questions=("is it red?",))
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / 'run'))}: .* validated on other data than .*val"):
        run(recipe, tmp_path / "run", resume=True)
    position.write_text(json.dumps({name: value for name, value in written.items() if name != "val"}))
    assert run(recipe, tmp_path / "run", resume=True).steps == 2


def test_a_second_run_on_one_folder_is_refused(recipe_of: Any, tmp_path: Path) -> None:
    recipe, out = recipe_of(max_steps=1), tmp_path / "run"
    out.mkdir()
    with (out / "run.lock").open("a") as other:
        assert lock(other)
        with pytest.raises(UserError, match=rf"--out {re.escape(str(out))}: another run is writing there"):
            run(recipe, out)
    assert run(recipe, out).finished  # what a killed run leaves is no lock
    assert not (out / "run.lock").exists()


def test_a_run_that_comes_to_nothing_leaves_no_folder(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        run(recipe_of(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_run_folders_are_not_overwritten(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of(max_steps=3)
    with pytest.raises(UserError, match=r"--resume: .* holds no run"):
        run(recipe, tmp_path / "run", resume=True)
    run(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="a run of 3 steps stands there; add --resume"):
        run(recipe, tmp_path / "run")
    draw_data(tmp_path / "data", questions=("what colour?",))
    with pytest.raises(UserError, match="other data than"):
        run(recipe, tmp_path / "run", resume=True)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="this is a file"):
        run(recipe, file)
