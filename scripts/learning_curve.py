"""Fine-tune on ever more of a data set and plot the test score, beside a linear probe and blank pictures.

    .venv/bin/python scripts/learning_curve.py train.jsonl test.jsonl --sizes 100,300,1000 --seeds 0,1 --out runs/curve

Each run learns from whole pictures drawn by its seed, as many as give the wanted number of questions, with the settings
that `querybridge finetune DATA` chooses. `results.jsonl` in the folder has a line for each run, and a second call makes
those that are missing; `curve.png` is the plot, with those of other sets beside it: `--beside NAME=FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVES = {  # a figure of a run: how it is drawn
    "exact_match": ("the adapter", "black", "o"),
    "linear_probe": ("linear probe on pooled features", "tab:blue", "s"),
    "blank_images": ("the adapter on blank pictures", "tab:red", "x"),
}


def main() -> int:
    """Read the flags, make the runs that are missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="questions to learn from")
    parser.add_argument("test", help="questions to score")
    parser.add_argument("--sizes", default="100,300,1000", help="numbers of questions; more than there are means all")
    parser.add_argument("--seeds", default="0", help="seeds with commas between them (default 0)")
    parser.add_argument("--test-limit", type=int, help="only the first so many test questions")
    parser.add_argument("--recipe", default="domain_cpu", help="what is trained (default domain_cpu)")
    parser.add_argument("--out", type=Path, required=True, help="the folder of all runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key in every run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the LLM's computation")
    parser.add_argument("--title", help="of the plot (default: the training file's name)")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="NAME=FOLDER", help="another curve's folder, drawn beside"
    )
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    others = [read_beside(parser, text) for text in options.beside]
    sizes, seeds = (whole_numbers(parser, name, getattr(options, name)) for name in ("sizes", "seeds"))
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    for size in sizes:
        for seed in seeds:
            asked = {"size": size, "seed": seed, "set": options.set, "dtype": options.dtype}
            if not any(all(row.get(key) == value for key, value in asked.items()) for row in read_results(results)):
                figures = one_run(options, size, seed)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asked, **figures}) + "\n")
    rows = read_results(results)
    print(table(rows))
    draw([(options.title or Path(options.train).name, rows), *others], options.out / "curve.png")
    return 0


def read_beside(parser: argparse.ArgumentParser, text: str) -> tuple[str, list[dict[str, Any]]]:
    """The name and the runs of another set's curve."""
    name, _, folder = text.partition("=")
    if not (rows := read_results(Path(folder) / "results.jsonl")):
        parser.error(f"--beside {text}: write NAME=FOLDER, with results.jsonl in the folder")
    return name, rows


def whole_numbers(parser: argparse.ArgumentParser, name: str, text: str) -> list[int]:
    """Whole numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        parser.error(f"--{name} {text}: write whole numbers with commas between them")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs that were made."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def one_run(options: argparse.Namespace, size: int, seed: int) -> dict[str, Any]:
    """Train on a part of the data and score it: figures as fractions, and how long training took."""
    from adapters.artefact.artefact import load_artefact
    from adapters.choice import choose_settings
    from adapters.data.batches import tokenise
    from adapters.data.reading import read_data
    from adapters.evaluation.vqa import score
    from adapters.finetune import finetune
    from adapters.recipe import load_recipe
    from adapters.training.reader_fit import probe_answers
    from serve.adapter import load_adapter
    from serve.evaluation.run import evaluate

    folder = options.out / f"{size}-{seed}{'-' + options.dtype if options.dtype else ''}"
    part = folder.with_suffix(".jsonl")
    rows = read_data(options.train, task="vqa").examples
    chosen = some_pictures(rows, size, seed)
    part.write_text("".join(json.dumps(as_row(row)) + "\n" for row in chosen), encoding="utf-8")
    settings = [
        *choose_settings(chosen).settings, f"data.train={json.dumps(str(part))}", "data.allow_outside=true",
        f"train.seed={seed}",
    ]  # fmt: skip
    print(f"{len(chosen)} questions, seed {seed}", file=sys.stderr, flush=True)
    began = time.monotonic()
    result = finetune(
        load_recipe(options.recipe, [*settings, *options.set]), folder, resume=(folder / "state").exists(),
        dtype=options.dtype,
    )  # fmt: skip
    if not result.finished:
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    adapter = load_adapter(folder)
    limit = options.test_limit
    found = {"exact_match": evaluate(adapter, options.test, limit=limit)["exact_match"]}
    found["blank_images"] = evaluate(adapter, options.test, limit=limit, blank_images=True)["exact_match"]
    assembly, _ = load_artefact(folder)
    test = [row for row in read_data(options.test, task="vqa", limit=limit).examples if len(row.images) == 1]
    pictures = tokenise(read_data(part, task="vqa", allow_outside=True), assembly.prompts, max_tokens=100_000)
    probed = probe_answers(assembly, pictures, [(row.images[0], row.question) for row in test])
    if probed is not None:
        found["linear_probe"] = score(probed, [row.answers for row in test])["exact_match"]
    return {"questions": len(chosen), **found, "seconds": round(seconds)}


def some_pictures(rows: Sequence[Any], size: int, seed: int) -> list[Any]:
    """All rows of pictures in a random order, until there are `size` of them."""
    grouped: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        grouped.setdefault(tuple(image.digest() for image in row.images), []).append(row)
    pictures = list(grouped)
    random.Random(seed).shuffle(pictures)
    chosen: list[Any] = []
    for picture in pictures:
        if len(chosen) >= size:
            break
        chosen += grouped[picture]
    return chosen


def as_row(row: Any) -> dict[str, Any]:
    """A question as a line of a data file, its pictures by their full paths."""
    images = [str(Path(image.path).resolve()) for image in row.images]
    given = {"images": images, "question": row.question, "answers": list(row.answers), "kind": row.kind}
    return {name: value for name, value in given.items() if value is not None}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each number of questions, worst, median and best over the seeds."""
    lines = [f"| questions | runs | {' | '.join(name for name, _, _ in CURVES.values())} | minutes |"]
    lines.append("|---" * (len(CURVES) + 3) + "|")
    for questions in sorted({row["questions"] for row in rows}):
        runs = [row for row in rows if row["questions"] == questions]
        cells = []
        for figure in CURVES:
            values = sorted(row[figure] for row in runs if figure in row)
            spread = f"{values[0]:.1%}" if values else "–"
            cells.append(spread if len(values) < 2 else f"{values[0]:.1%} to {values[-1]:.1%}")
        minutes = max(row["seconds"] for row in runs) / 60
        lines.append(f"| {questions} | {len(runs)} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def draw(sets: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """A panel a set: the means over seeds, with each run as a faint point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.5 * len(sets), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(panels, sets, strict=True):
        for name, (label, colour, marker) in CURVES.items():
            points = [(row["questions"], row[name]) for row in rows if name in row]
            if not points:
                continue
            sizes = sorted({size for size, _ in points})
            values = [[value for at, value in points if at == size] for size in sizes]
            axes.plot(sizes, [sum(one) / len(one) for one in values], color=colour, marker=marker, label=label)
            axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, alpha=0.3)
        axes.set_xscale("log")
        ticks = sorted({row["questions"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 1)
        axes.set_xlabel("training questions")
        axes.set_title(title)
    panels[0].set_ylabel("exact match on the test questions")
    panels[-1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"learning_curve: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("learning_curve: stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
