"""`querybridge finetune` and `querybridge pretrain`: the commands that train."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qformer.errors import UserError
from serve.cli.common import (
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OfflineOption,
    OutsideOption,
    QuietOption,
    SeedOption,
    columns_of,
    report,
)

OutOption = Annotated[Path | None, typer.Option("--out", help="The run's folder; left out, runs/RECIPE.")]
StartOption = Annotated[
    str | None, typer.Option("--start-from", help="Start from this adapter's weights; its terms are inherited.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe's key, such as train.epochs=2; may be repeated.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run in --out.")]


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe (file or shipped name), or a data file to learn from.")],
    out: OutOption = None,
    task: Annotated[
        str | None, typer.Option("--task", help="vqa, caption or reason; the recipe's, or inferred from the data.")
    ] = None,
    columns: ColumnsOption = None,
    start_from: StartOption = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for the whole run, such as 10m: as many steps as fit.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds", min=2, help="Hold each picture out once, in so many runs, and train one more on everything."
        ),
    ] = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    allow_outside: OutsideOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on a data set."""
    from adapters.finetune import finetune as train
    from adapters.training.cross_validation import cross_validate

    given = _overrides(set_, task=task, seed=seed, allow_outside=allow_outside)
    if (named := columns_of(columns)) is not None:
        given.append(f"data.columns={json.dumps(named)}")
    if budget is not None and folds is not None:
        raise UserError("--budget and --folds: a budget is for one run; leave one of the two out")
    if budget is not None:
        from adapters.choice import minutes_of

        given.append(f"train.minutes={minutes_of(budget):g}")
    chosen, name = _recipe_for(recipe, given, offline=offline, start_from=start_from, quiet=quiet)
    folder = out or Path("runs") / name
    how: Any = {"start_from": start_from, "device": device, "dtype": dtype, "offline": offline, "quiet": quiet}
    if folds is None:
        result = train(chosen, folder, resume=resume, **how)
    else:
        chosen.holding_out(None)  # what does not suit is reported before anything is made
        if not resume and (folder / "folds").exists():
            raise UserError(f"--out {folder}: folds were run there; add --resume to go on, or name another folder")

        def run_fold(fold: str | None, out: Path, **more: Any) -> Any:
            going_on = resume and (out / "state").exists()
            return train(chosen.holding_out(fold), out, resume=going_on, **how, **more)

        say = (lambda line: None) if quiet else partial(typer.echo, err=True)
        result = cross_validate(run_fold, folder, folds, sets=chosen.data.match == "set", say=say)
    if not result.finished:
        raise KeyboardInterrupt
    verb = "reason" if chosen.task == "reason" else "ask"
    report(
        {"out": str(folder), "best": str(result.best), "steps": result.steps, **result.metrics},
        as_json,
        f"done: {result.steps} steps; the adapter is {result.best}\n"
        f'ask it: querybridge {verb} PICTURE "QUESTION" --adapter {folder}',
    )


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe (file or shipped name), or a file of captions.")],
    stage: Annotated[
        int, typer.Option("--stage", min=1, max=2, help="1: ITC, ITM and ITG without an LLM; 2: with it.")
    ],
    out: OutOption = None,
    start_from: StartOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    allow_outside: OutsideOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """BLIP-2's two stages: what captions say about pictures, then captions through the frozen LLM."""
    from adapters.finetune import finetune as second
    from adapters.pretrain import pretrain as first

    if stage == 2 and start_from is None and not resume:
        raise UserError("--stage 2 goes on from the first stage: add --start-from RUN (finetune starts without one)")
    task = "caption" if stage == 1 else None
    given = _overrides(set_, task=task, seed=seed, allow_outside=allow_outside)
    first_recipe = "captions_stage1" if stage == 1 else None
    theirs = start_from if stage == 2 else None
    chosen, name = _recipe_for(recipe, given, offline=offline, start_from=theirs, base=first_recipe)
    folder = out or Path("runs") / name
    run = first if stage == 1 else second
    result = run(
        chosen, folder, resume=resume, start_from=start_from, device=device, dtype=dtype, offline=offline, quiet=quiet
    )
    if not result.finished:
        raise KeyboardInterrupt
    then = (
        f'search with it: querybridge search FOLDER "TEXT" --adapter {folder}\n'
        f"go on: querybridge pretrain RECIPE --stage 2 --start-from {folder}"
        if stage == 1
        else f"caption with it: querybridge caption PICTURE --adapter {folder}"
    )
    report(
        {"out": str(folder), "best": str(result.best), "steps": result.steps, **result.metrics},
        as_json,
        f"done: {result.steps} steps; the adapter is {result.best}\n{then}",
    )


def _overrides(set_: list[str] | None, *, task: str | None, seed: int | None, allow_outside: bool) -> list[str]:
    given = list(set_ or [])
    if task is not None:
        given.append(f"task={task}")
    if seed is not None:
        given.append(f"train.seed={seed}")
    if allow_outside:
        given.append("data.allow_outside=true")
    return given


def _recipe_for(
    name: str,
    overrides: Sequence[str],
    *,
    offline: bool,
    start_from: str | None = None,
    base: str | None = None,
    quiet: bool = True,
) -> tuple[Any, str]:
    """A recipe and the name of its run.

    A data file is learned from by the recipe `base`, or the default one of its rows' task, and on the models of the
    adapter that the run starts from, if there is one. By how many questions and pictures there are, `choose_settings`
    sets what was not set, and says why. ScienceQA has its own rows to choose on, and is answered by
    letters.
    """
    from adapters.catalogue import shipped_recipes
    from adapters.choice import WITHOUT_READER, choose_settings
    from adapters.data.reading import read_data
    from adapters.data.scienceqa import scienceqa_folder
    from adapters.data.sources import is_data
    from adapters.recipe import find_recipe, load_recipe
    from adapters.training.start import is_published, sections_of

    path = Path(name)
    science = scienceqa_folder(name)
    if name in shipped_recipes() or not is_data(name):
        return load_recipe(name, overrides), find_recipe(name).stem
    source = name if name.startswith(("easy-vqa:", "hub:")) else str(path.resolve())
    given = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}
    data_section = load_recipe("domain_cpu", overrides).data
    rows = read_data(
        source, task=given.get("task"), skip_bad_rows=data_section.skip_bad_rows, columns=data_section.columns,
        allow_outside=data_section.allow_outside, offline=offline,
    )  # fmt: skip
    task = rows.task
    held_out = None if science is None else f"{science[0].resolve()}:val"
    data = [f"data.train={json.dumps(source)}", f"data.val={json.dumps(held_out)}", f"task={task}"]
    if science is not None:
        data.append("prompt.letters=true")
    theirs = sections_of(start_from) if start_from is not None else {}
    sections = [f"{key}={json.dumps(section)}" for key, section in theirs.items()]
    chosen: tuple[str, ...] = ()
    if base is None and (task in ("caption", "mixed") or (start_from is not None and is_published(start_from))):
        chosen = WITHOUT_READER
    elif base is None and task == "vqa" and "bridge.reader" not in given:
        choice = choose_settings(rows.examples)
        chosen = choice.settings
        if not quiet:
            print("\n".join(choice.reasons), file=sys.stderr)
    base = base or ("reason_cpu" if task == "reason" else "domain_cpu")
    return load_recipe(base, [*data, *sections, *chosen, *overrides]), re.sub(r"[^\w.-]+", "-", path.stem).strip("-")
