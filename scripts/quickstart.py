"""Train on part of easy-VQA, score the adapter beside its controls, ask it three questions, open the demo.

    ./scripts/quickstart.sh [--no-demo]

What is done is skipped on the next run; a run that was stopped goes on. Everything lies in runs/quickstart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.adapter import LoadedAdapter

RUN = Path("runs") / "quickstart"
TEST_QUESTIONS = 1000
SHOWN = (11, 18, 31)  # rows of the test set that are asked in the terminal


def main() -> int:
    """Run what has not been done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], prog="scripts/quickstart.sh")
    parser.add_argument("--no-demo", action="store_true", help="stop after the answers, do not open the web page")
    parser.add_argument("--port", type=int, default=7860, help="port of the web page on 127.0.0.1 (default 7860)")
    parser.add_argument("--offline", action="store_true", help="take the frozen models from the cache only")
    options = parser.parse_args()

    os.chdir(Path(__file__).resolve().parents[1])
    from serve.cli.command import hush_libraries

    hush_libraries()
    began = time.monotonic()
    train(offline=options.offline)
    from adapters.loading.vision_side import FrozenModels
    from serve.adapter import load_adapter

    frozen = FrozenModels()
    engine = load_adapter(RUN, offline=options.offline, frozen=frozen)
    show_scores(engine, offline=options.offline)
    show_answers(engine, offline=options.offline)
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. The adapter is {RUN / 'best'}. Next:")
    print(f'  .venv/bin/querybridge ask {RUN}/pictures/1.png "what shape is present?" --adapter {RUN}')
    print("  .venv/bin/querybridge caption YOUR_PHOTO.jpg")
    print("  .venv/bin/querybridge finetune YOUR_DATA.jsonl --out runs/mine")
    print(f"  .venv/bin/querybridge demo --adapter {RUN}", flush=True)
    if not options.no_demo:
        from adapters.catalogue import shipped_adapters
        from serve.engine.engine import Engine
        from serve.page.app import launch

        shipped = [load_adapter(name, offline=options.offline, frozen=frozen) for name in shipped_adapters()]
        launch(Engine([engine, *shipped]), port=options.port, open_browser=True)
    return 0


def train(*, offline: bool) -> None:
    """Fine-tune by the quick start's recipe, unless that is done; go on with a run that was stopped."""
    from adapters.finetune import finetune
    from adapters.recipe import differing_keys, load_recipe
    from adapters.training.checkpoint import find_state
    from qformer.errors import UserError

    recipe = load_recipe("quickstart")
    earlier = RUN / "recipe.yaml"
    if earlier.exists() and (differing := differing_keys(load_recipe(earlier), recipe)):
        raise UserError(f"{RUN} was trained with another {', '.join(differing[:3])}; move the folder away")
    if (RUN / "finished").exists():
        print(f"{RUN}: trained already", file=sys.stderr)
        return
    resume = find_state(RUN / "state") is not None
    result = finetune(recipe, RUN, resume=resume, offline=offline)
    if not result.finished:
        raise KeyboardInterrupt
    (RUN / "finished").touch()


def measure(engine: LoadedAdapter, *, offline: bool) -> dict[str, float]:
    """Answer the test questions with their pictures and without."""
    from serve.evaluation.run import evaluate

    print(f"answering {TEST_QUESTIONS} test questions, then again without the pictures", file=sys.stderr)
    seeing = evaluate(engine, "easy-vqa:test", limit=TEST_QUESTIONS, offline=offline)
    blind = evaluate(engine, "easy-vqa:test", limit=TEST_QUESTIONS, blank_images=True, offline=offline)
    return {
        "n": seeing["n"],
        "exact_match": seeing["exact_match"],
        "blank_images": blind["exact_match"],
        "commonest_answer": seeing["commonest_answer"],
    }


def show_scores(engine: LoadedAdapter, *, offline: bool) -> None:
    """Exact match on fixed test questions, beside the same model on a blank picture and the commonest answers."""
    path = RUN / "scores.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not measured yet, or stopped while it was written
        scores = measure(engine, offline=offline)
        path.write_text(json.dumps(scores, indent=2), encoding="utf-8")
    print(f"\nexact answers to {scores['n']} test questions about pictures it has never seen")
    print(f"  this adapter                           {scores['exact_match']:7.1%}")
    print(f"  the same adapter on a blank picture    {scores['blank_images']:7.1%}")
    print(f"  the commonest answer to each question  {scores['commonest_answer']:7.1%}")


def show_answers(engine: LoadedAdapter, *, offline: bool) -> None:
    """Ask three of the test set's questions; pictures and questions are left in the run's folder to try things with."""
    from adapters.data.reading import read_data

    examples = read_data("easy-vqa:test", limit=max(SHOWN) + 1, offline=offline).examples
    chosen = [examples[row] for row in SHOWN]
    folder = RUN / "pictures"
    folder.mkdir(exist_ok=True)
    rows = []
    print()
    for example, answer in zip(chosen, engine.answer(chosen), strict=True):
        picture = folder / f"{len(rows) + 1}.png"
        picture.write_bytes(example.images[0].read())
        rows.append({"image": f"pictures/{picture.name}", "question": example.question, "answer": example.answers[0]})
        print(f"{picture}  {example.question}  {answer}  (right: {example.answers[0]})")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (RUN / "questions.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"quickstart: {error}; free space or mend rights, and run it again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("quickstart: stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
