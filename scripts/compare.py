"""Train one recipe under several settings, as short and as long each, and print a table of what came out.

    .venv/bin/python scripts/compare.py docs/comparisons/encoders.yaml --out runs/encoders --set data.train=my.jsonl

The YAML names the recipe, the command's stage, what all runs have in common, and the settings, each a list of
overrides; or, if some start from a trained first stage, `set` and `start_from`:

    recipe: photo_stage1
    stage: 1                       # 1; or 2, which is finetune
    common: [train.max_steps=400]
    columns: [i2t_R@1, t2i_R@1]    # of the best validation
    settings:
      16 queries: []
      8 queries: [bridge.num_queries=8]
      from a trained one: {set: [], start_from: runs/stage1}
    evaluate: {task: reason, data: test.jsonl, controls: true}   # if the best adapter's scores are wanted; controls
                                                                 # go with reason, other tasks are vqa and caption

A run that is finished is not run again; one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> int:
    """Read the flags, train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparison", type=Path, help="the YAML file that names recipe and settings")
    parser.add_argument("--out", type=Path, required=True, help="the folder of all runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every run")
    parser.add_argument("--test", metavar="FILE", help="the data to evaluate on, in place of the one in the YAML")
    parser.add_argument("--seeds", default="0", help="seeds with commas between them (default 0)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only this setting; may be repeated"
    )
    options = parser.parse_args()
    import yaml

    from serve.cli.command import hush_libraries

    hush_libraries()
    try:
        plan = yaml.safe_load(options.comparison.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{options.comparison}: cannot be read ({error.strerror})")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{options.comparison}: this is not YAML ({getattr(error, 'problem', None) or error})")
    if not isinstance(plan, dict):
        parser.error(f"{options.comparison}: a comparison is a mapping of recipe, stage, columns and settings")
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds}: write whole numbers with commas between them")
    for key in ("recipe", "stage", "columns", "settings"):
        if key not in plan:
            parser.error(f"{options.comparison}: '{key}' is missing")
    if plan["stage"] not in (1, 2):
        parser.error(f"{options.comparison}: stage is {plan['stage']!r}; write 1 or 2")
    if not isinstance(plan["settings"], dict):
        parser.error(f"{options.comparison}: settings are names, each with a list of overrides behind it")
    for name, setting in plan["settings"].items():
        overrides = setting.get("set") if isinstance(setting, dict) else setting
        if not isinstance(overrides, list | None):
            parser.error(f"{options.comparison}: '{name}' is {overrides!r}; write a list of overrides")
    if unknown := set(options.only) - plan["settings"].keys():
        parser.error(f"--only {min(unknown)}: no such setting; known: {', '.join(plan['settings'])}")
    if options.test and "evaluate" not in plan:
        parser.error(f"--test {options.test}: {options.comparison} has no 'evaluate' section")
    if options.test:
        plan["evaluate"]["data"] = options.test
    check_evaluation(plan)
    check_starts(plan, options.only)
    rows = {}
    for name, setting in plan["settings"].items():
        if options.only and name not in options.only:
            continue
        given = setting if isinstance(setting, dict) else {"set": setting}
        every, start = [*plan.get("common", []), *(given.get("set") or []), *options.set], given.get("start_from")
        rows[name] = [train(plan, every, options.out / folder_of(name, seed), seed, start) for seed in seeds]
    print(table(plan["columns"], rows))
    return 0


def folder_of(name: str, seed: int) -> str:
    """A folder's name for a setting and a seed."""
    words = re.sub(r"\W+", "-", name.lower()).strip("-")
    return f"{words or 'setting'}-{seed}"


def train(
    plan: Mapping[str, Any], overrides: list[str], out: Path, seed: int, start_from: str | None
) -> dict[str, float]:
    """Train one setting, unless that is done; the best validation's figures, and the seconds it took."""
    from adapters.finetune import finetune
    from adapters.pretrain import pretrain
    from adapters.recipe import load_recipe
    from adapters.training.checkpoint import find_state
    from qformer.errors import UserError

    recipe = load_recipe(plan["recipe"], [*overrides, f"train.seed={seed}"])
    asked = {"recipe": recipe.model_dump(mode="json"), "start_from": start_from}
    if "evaluate" in plan:
        asked["evaluate"] = plan["evaluate"]
    done = out / "compared.json"
    if done.exists():
        found = json.loads(done.read_text(encoding="utf-8"))
        if found.pop("asked") != asked:
            raise UserError(f"{out}: it was trained by other settings than are asked now; move the folder away")
        return dict(found)
    run = pretrain if plan["stage"] == 1 else finetune
    began = time.monotonic()
    resume = find_state(out / "state") is not None
    print(f"{out.name}: {' '.join(overrides)}", file=sys.stderr, flush=True)
    result = run(recipe, out, resume=resume, start_from=None if resume else start_from)
    if not result.finished:
        raise KeyboardInterrupt
    figures = {**result.metrics, "seconds": time.monotonic() - began}  # of the last sitting
    figures |= evaluation(plan, result.best)
    done.write_text(json.dumps({**figures, "asked": asked}), encoding="utf-8")
    return figures


def check_evaluation(plan: Mapping[str, Any]) -> None:
    """Read what is evaluated on before anything is trained: a mistake in it is reported at once."""
    from adapters.data.reading import read_data

    if "evaluate" in plan:
        read_data(plan["evaluate"]["data"], task=plan["evaluate"]["task"])


def check_starts(plan: Mapping[str, Any], only: list[str]) -> None:
    """Look for what settings start from before anything is trained."""
    from adapters.artefact.artefact import find_artefact
    from qformer.errors import UserError

    for name, setting in plan["settings"].items():
        start = setting.get("start_from") if isinstance(setting, dict) else None
        if start is not None and (not only or name in only):
            try:
                find_artefact(start)
            except UserError as error:
                raise UserError(f"'{name}' starts from {start}, which is no adapter; train it first") from error


def evaluation(plan: Mapping[str, Any], best: Path) -> dict[str, float]:
    """Scores of an adapter on the plan's test data; none if the plan has no such data."""
    from serve.adapter import load_adapter
    from serve.evaluation.reasons import evaluate_reasons
    from serve.evaluation.run import evaluate

    if "evaluate" not in plan:
        return {}
    task, data = plan["evaluate"]["task"], plan["evaluate"]["data"]
    print(f"scoring {best} on {data}", file=sys.stderr, flush=True)
    adapter = load_adapter(best)
    if task == "reason":
        return evaluate_reasons(adapter, data, controls=plan["evaluate"].get("controls", False))
    return evaluate(adapter, data, task=task)


def table(columns: list[str], rows: Mapping[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a setting, the mean over seeds, and the range if there are several."""
    lines = [f"| setting | {' | '.join(columns)} | minutes |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            if not values:
                cells.append("–")
            elif len(values) == 1:
                cells.append(f"{values[0]:.3f}")
            else:
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        minutes = statistics.mean(run["seconds"] for run in runs) / 60
        lines.append(f"| {name} | {' | '.join(cells)} | {minutes:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("compare: stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
