"""The scripts around the command: a comparison trains each setting once and prints what it measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from reason_data import draw_reasons
from tiny import draw_captions, draw_data, save_tiny_bert, tiny_values

from adapters.artefact.facts import read_facts
from adapters.finetune import finetune
from adapters.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def plan(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Path:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_captions(tmp_path / "data"), max_steps=2)
    values["task"] = "caption"
    values["bridge"] |= {"start": str(save_tiny_bert(tmp_path / "bert")), "text_branch": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    settings = {"3 queries": [], "2 queries": ["bridge.num_queries=2"]}
    comparison = {"recipe": str(tmp_path / "recipe.yaml"), "stage": 1, "columns": ["i2t_R@1"], "settings": settings}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(comparison))
    return tmp_path / "plan.yaml"


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    return int(stopped.value.code or 0)


def compare(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    return run_script("compare.py", monkeypatch, *words)


def test_each_setting_is_trained_once(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert compare(monkeypatch, str(plan), "--out", str(out), "--seeds", "0,1") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| setting | i2t_R@1 | minutes |" and len(table) == 4
    done = sorted(out.glob("*/compared.json"))
    assert [path.parent.name for path in done] == ["2-queries-0", "2-queries-1", "3-queries-0", "3-queries-1"]
    values = [json.loads((out / f"3-queries-{seed}" / "compared.json").read_text())["i2t_R@1"] for seed in (0, 1)]
    (row,) = (line for line in table if line.startswith("| 3 queries |"))
    assert f"{sum(values) / 2:.3f} ({min(values):.3f}–{max(values):.3f})" in row
    times = {path: path.stat().st_mtime_ns for path in done}
    assert compare(monkeypatch, str(plan), "--out", str(out), "--seeds", "0,1") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert (
        compare(monkeypatch, str(plan), "--out", str(out), "--set", "train.max_steps=3") == 2
    )  # not what stands there


def test_settings_are_scored_on_test_data(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Direct answers against two stages, a row being one answer to learn or two: equally many steps."""
    file = draw_reasons(tmp_path / "data")
    recipe: Any = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"task": "reason"}
    recipe["data"]["train"] = str(file)
    recipe["train"] |= {"max_steps": None, "epochs": 1, "row_tokens": 16, "micro_batch_tokens": 1000}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = {
        "direct": ["reason.stages=[direct]", "train.batch_size=3"],
        "two-stage": ["train.batch_size=6", "reason.rationale_tokens=9"],
    }
    comparison = yaml.safe_load(plan.read_text()) | {"stage": 2, "settings": settings}
    comparison["columns"] = ["accuracy_multi_step", "ROUGE-L", "blank_images_accuracy"]
    comparison["evaluate"] = {"task": "reason", "data": "gone.jsonl", "controls": True}
    plan.write_text(yaml.safe_dump(comparison))
    out = tmp_path / "runs"
    assert compare(monkeypatch, str(plan), "--out", str(out)) == 2
    assert "gone.jsonl" in capsys.readouterr().err and not out.exists()  # told before anything is trained
    assert compare(monkeypatch, str(plan), "--out", str(out), "--test", str(file)) == 0
    direct, both = capsys.readouterr().out.splitlines()[-2:]
    found = {name: json.loads((out / f"{name}-0" / "compared.json").read_text()) for name in ("direct", "two-stage")}
    assert f"| direct | {found['direct']['accuracy_multi_step']:.3f} | – |" in direct
    assert f"| {found['two-stage']['ROUGE-L']:.3f} |" in both
    steps = [read_facts(out / f"{name}-0" / "last").steps for name in found]
    assert steps[0] == steps[1] > 1


def test_test_data_need_a_section(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(monkeypatch, str(plan), "--out", str(tmp_path / "runs"), "--test", "x.jsonl") == 2


@pytest.mark.parametrize("words", [["--seeds", "one"], ["--only", "5 queries"]])
def test_mistakes_are_told(words: list[str], plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(monkeypatch, str(plan), "--out", str(tmp_path / "runs"), *words) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"stage": "1"}, "stage is '1'; write 1 or 2"),
        ({"settings": ["a"]}, "settings are names, each with a list"),
        ({"settings": {"a": "data.limit=3"}}, "'a' is 'data.limit=3'; write a list of overrides"),
    ],
)
def test_a_wrong_plan_is_told(
    changed: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"recipe": "gone", "stage": 1, "columns": ["x"], "settings": {"plain": None}} | changed))
    assert compare(monkeypatch, str(plan), "--out", str(tmp_path / "runs")) == 2
    assert told in capsys.readouterr().err


def test_a_setting_without_overrides_may_stay_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"recipe": "gone", "stage": 1, "columns": ["x"], "settings": {"plain": None}}))
    assert compare(monkeypatch, str(plan), "--out", str(tmp_path / "runs")) == 2
    assert "gone" in capsys.readouterr().err  # it came as far as the recipe


def test_the_first_stage_is_measured(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "recipe.yaml"), "--set", "train.batch_size=4", "--steps", "2"]
    assert run_script("bench_pretraining.py", monkeypatch, *words, "--set", "train.contrastive_steps=1") == 0
    told = json.loads(capsys.readouterr().out)
    alone, together = told["ITC alone"], told["ITC, ITM and ITG"]
    assert alone["gflop_a_sample"] < together["gflop_a_sample"]
    for found in (alone, together):
        assert found["samples_per_second"] == pytest.approx(8 / found["seconds_a_step"], rel=0.05)
        share = found["gflop_per_second"] / found["peak_gflop_per_second"]
        assert found["share_of_peak"] == pytest.approx(share, abs=1e-3)
    assert run_script("bench_pretraining.py", monkeypatch, *words) == 0
    assert "ITC alone" not in json.loads(capsys.readouterr().out)


def test_the_engine_is_measured(
    vision_folder: Path,
    language_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_captions(tmp_path / "data"), max_steps=1)
    values["task"] = "caption"
    for name in ("one", "other"):
        finetune(parse_recipe(values, "test"), tmp_path / name, device="cpu", dtype="float32", quiet=True)
    folders = (str(tmp_path / "one"), str(tmp_path / "other"))
    assert run_script("bench_engine.py", monkeypatch, *folders, "--pictures", "3", "--dtype", "float32") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frozen language model shared"] is True
    assert 0 < found["second against first"] < 2


def test_what_a_setting_starts_from_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    later = {"set": [], "start_from": str(tmp_path / "gone")}
    plan.write_text(
        json.dumps({"recipe": "gone", "stage": 2, "columns": ["x"], "settings": {"now": [], "later": later}})
    )
    assert compare(monkeypatch, str(plan), "--out", str(tmp_path / "runs")) == 2
    assert f"'later' starts from {tmp_path / 'gone'}, which is no adapter" in capsys.readouterr().err
    assert compare(monkeypatch, str(plan), "--out", str(tmp_path / "runs"), "--only", "now") == 2
    assert "'later'" not in capsys.readouterr().err  # of another: its recipe is gone
    assert not (tmp_path / "runs").exists()


def test_a_learning_curve_has_a_run_a_size_and_seed(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = draw_data(tmp_path / "data")
    values = tiny_values(vision_folder, language_folders["llama"], data, max_steps=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    words = [str(data), str(data), "--out", str(tmp_path / "curve"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert run_script("learning_curve.py", monkeypatch, *words, "--sizes", "15,99", "--seeds", "0,1") == 0
    table = capsys.readouterr().out
    assert "| 16 | 2 |" in table and "| 24 | 2 |" in table
    lines = (tmp_path / "curve" / "results.jsonl").read_text().splitlines()
    assert [(row["size"], row["seed"]) for row in map(json.loads, lines)] == [(15, 0), (15, 1), (99, 0), (99, 1)]
    assert all({"exact_match", "blank_images", "linear_probe", "seconds"} <= json.loads(line).keys() for line in lines)
    assert (tmp_path / "curve" / "curve.png").stat().st_size > 0
    alone = (tmp_path / "curve" / "curve.png").read_bytes()
    beside = ["--title", "colours", "--beside", f"the same={tmp_path / 'curve'}"]
    assert run_script("learning_curve.py", monkeypatch, *words, "--sizes", "15", "--seeds", "1", *beside) == 0
    assert (tmp_path / "curve" / "curve.png").read_bytes() != alone
    nowhere = [*words, "--sizes", "15", "--seeds", "1", "--beside", f"other={tmp_path}"]
    assert run_script("learning_curve.py", monkeypatch, *nowhere) == 2
    assert (tmp_path / "curve" / "results.jsonl").read_text().splitlines() == lines
    assert run_script("learning_curve.py", monkeypatch, *words, "--sizes", "few") == 2
