"""What the project claims of a GPU, checked on one: tests, training, answers, memory and speed; docs/gpu.md is written.

    .venv/bin/python scripts/check_gpu.py --out check                      # on a machine with a GPU
    .venv/bin/python scripts/check_gpu.py --out check --device cpu         # the same, smaller, without one

In turn: every test marked `gpu` is run; an adapter is trained on easy-VQA through an EfficientNet and another through a
CLIP-shaped tower of random weights (no hub is needed), and the loss has to fall; the memory of their training is held
against `querybridge estimate`; the first one answers in float32, in bfloat16, over NF4 and over 8 bits, and its answers
are compared; and its steps are timed against a plain loop of transformers and PEFT over the same rows, in turn in one
process, after a warm-up, the median of several. The exit code is 1 if something is not as it should be.

On a CPU the LLM is a random one with two layers unless --language names another, and there are fewer steps: what runs
there shows that the check works, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.recipe import Recipe

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
WITHIN = 0.10  # of the estimate
KEPT = "<!-- kept by hand from here on -->"
ANSWERS = {
    "float32": ("none", "float32"),
    "bfloat16": ("none", "bfloat16"),
    "nf4": ("nf4", None),
    "int8": ("int8", None),
}
_SYSTEM = "Answer questions about the picture."


@dataclass
class Found:
    """What was measured, in the order of the page, and what is not as it should be."""

    device: str
    machine: str
    rows: dict[str, list[list[str]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, part: str, *cells: object) -> None:
        """A row of a part's table."""
        self.rows.setdefault(part, []).append([str(cell) for cell in cells])
        print(" | ".join(map(str, cells)), file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Read the flags, check one part after the other, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a fresh folder for models, runs and figures")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default cuda)")
    parser.add_argument("--steps", type=int, help="of training (default 200; on a CPU 40)")
    parser.add_argument("--questions", type=int, help="that are answered in each precision (default 500; on a CPU 24)")
    parser.add_argument("--timed", type=int, default=5, help="steps of each loop that are timed (default 5)")
    parser.add_argument("--language", help="the LLM (default pypi:smollm2-135m-instruct; on a CPU a random small one)")
    parser.add_argument("--tower", default="pypi:efficientnet-lite2", help="the EfficientNet (default lite2's wheel)")
    parser.add_argument("--data", help="training rows (default easy-vqa:train; --test has to go with it)")
    parser.add_argument("--test", help="rows that are answered (default easy-vqa:test)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gpu.md", help="the page that is written")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    options = parser.parse_args(words)
    import torch
    from random_weights import make_clip, make_language

    from qformer.errors import UserError
    from serve.cli.command import hush_libraries

    hush_libraries()
    device = options.device
    on_gpu = torch.device(device).type == "cuda"
    try:
        if on_gpu and not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch sees no GPU here; give --device cpu for the smaller check")
        if options.out.exists():
            raise UserError(f"--out {options.out}: it is there already; name a folder that is not")
        options.out.mkdir(parents=True)
        if options.language is None:
            small = options.out / "llm"
            options.language = "pypi:smollm2-135m-instruct" if on_gpu else str(make_language(small))
        clip = make_clip(options.out / "clip", wide=768 if on_gpu else 128, layers=12 if on_gpu else 3)
        steps = options.steps or (200 if on_gpu else 40)
        found = Found(device, machine_of(device))
        if not options.no_tests:
            run_tests(found)
        recipes = {
            "EfficientNet": recipe_of(options, options.tower, -3, steps),
            "CLIP-shaped, random": recipe_of(options, str(clip), -2, steps),
        }
        for name, recipe in recipes.items():
            train(found, name, recipe, options.out / name.split(",")[0].lower(), device)
        compare_answers(found, options.out / "efficientnet", device, options.test or "easy-vqa:test", options.questions)
        race(found, recipes["EfficientNet"], options.out / "race", device, options.timed)
    except UserError as error:
        print(f"check_gpu: {error}", file=sys.stderr)
        return 2
    below = ""  # what is kept by hand
    if options.page.is_file():
        _, marker, rest = options.page.read_text(encoding="utf-8").partition(KEPT)
        below = f"\n{marker}{rest}" if marker else ""
    options.page.write_text(page(found, on_gpu=on_gpu) + below, encoding="utf-8")
    (options.out / "found.json").write_text(json.dumps(vars(found), indent=2) + "\n", encoding="utf-8")
    for line in found.wrong:
        print(f"not as it should be: {line}", file=sys.stderr)
    return int(bool(found.wrong))


def machine_of(device: str) -> str:
    """One line: the GPU or the CPU, the libraries that matter, and what else the machine was doing."""
    import bitsandbytes
    import torch
    import transformers

    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        where = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    else:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(": ")[2] if names else platform.processor()
        where = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, load {os.getloadavg()[0]:.1f}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{where}; {versions}, bitsandbytes {bitsandbytes.__version__}; {date.today():%-d %B %Y}"


def run_tests(found: Found) -> None:
    """Every test marked `gpu`, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    found.add("tests", "tests marked `gpu`", last)
    if done.returncode:
        found.wrong.append(f"tests marked gpu: {last}")
        print(done.stdout[-3000:], file=sys.stderr)


def recipe_of(options: argparse.Namespace, tower: str, layer: int, steps: int) -> Recipe:
    """A recipe of the check."""
    from adapters.recipe import parse_recipe

    values: dict[str, Any] = {
        "task": "vqa",
        "data": {
            "train": options.data or "easy-vqa:train",
            "hold_out": False,
            "limit": 4000 if options.device != "cpu" else 400,
        },
        "vision": {"towers": [{"source": tower, "layer": layer}]},
        "bridge": {"preset": "small", "dropout": 0.0},
        "language": {"source": options.language, "quantize": "nf4", "lora": {"rank": 8, "alpha": 16}},
        "prompt": {"system": _SYSTEM},
        "train": {
            "max_steps": steps,
            "batch_size": 16,
            "row_tokens": 112,
            "micro_batch_tokens": 4096,
            "learning_rate": 5e-4,
            "lora_learning_rate": 1.5e-3,
            "warmup_steps": min(30, steps // 4),
            "clip_norm": 1.0,
            "log_every": 1,
        },
    }
    return parse_recipe(values, "check_gpu")


def train(found: Found, name: str, recipe: Recipe, out: Path, device: str) -> None:
    """Train a run; its loss has to fall, and its memory to be what `estimate` says."""
    import torch

    from adapters.finetune import finetune
    from adapters.memory.estimate import estimate_memory

    estimate = estimate_memory(recipe, device=torch.device(device).type)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(torch.device(device))
    began = time.monotonic()
    result = finetune(recipe, out, device=device, quiet=True)
    seconds = time.monotonic() - began
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    tenth = max(1, len(losses) // 10)
    first, last = statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])
    found.add("training", name, result.steps, f"{first:.2f} → {last:.2f}", f"{seconds:.0f} s")
    if not last < 0.8 * first:
        found.wrong.append(f"{name}: the loss went from {first:.2f} to {last:.2f} in {result.steps} steps")
    # torch counts what it allocated, without the context, which `estimate` calls libraries
    calculated = sum(size for part, size in estimate["bytes"].items() if not (on_gpu and part == "runtime")) / GIB
    held = result.metrics["peak_memory_gib"]
    found.add("memory", name, f"{calculated:.2f} GiB", f"{held:.2f} GiB", f"{held / calculated:.2f}")
    if on_gpu and abs(held / calculated - 1) > WITHIN:
        found.wrong.append(f"{name}: training held {held:.2f} GiB, and estimate says {calculated:.2f} GiB")
    free_memory()


def free_memory() -> None:
    """Let go of the models of the part before."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare_answers(found: Found, run: Path, device: str, test: str, questions: int | None) -> None:
    """The same adapter over an LLM in several precisions: how many answers are those of float32."""
    import torch
    import yaml

    from adapters.artefact.artefact import find_artefact, load_artefact
    from adapters.data.examples import sample_evenly
    from adapters.data.reading import read_data
    from adapters.evaluation.vqa import score
    from adapters.inference.answering import answer_examples
    from qformer.decoding import Decoding

    count = questions or (500 if torch.device(device).type == "cuda" else 24)
    asked = sample_evenly(read_data(test, task="vqa").examples, count)
    right = [example.answers for example in asked]
    first: list[str] = []
    for name, (quantize, dtype) in ANSWERS.items():
        copy = run.with_name(f"{run.name}-{name}")
        shutil.copytree(find_artefact(str(run)), copy)
        values = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
        values["language"]["quantize"] = quantize
        (copy / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        assembly, _ = load_artefact(copy, device=device, dtype=dtype)
        answer = partial(answer_examples, assembly, asked, "vqa", decoding=Decoding(max_new_tokens=10))
        answer()  # the warm-up, which encodes the pictures too
        began = time.monotonic()
        texts = answer()
        seconds = time.monotonic() - began
        first = first or texts
        same = sum(mine == theirs for mine, theirs in zip(texts, first, strict=True)) / len(texts)
        exact = score(texts, right)["exact_match"]
        found.add("answers", name, f"{same:.1%}", f"{exact:.1%}", f"{len(texts) / seconds:.1f}")
        if not all(texts) and not any(texts):
            found.wrong.append(f"answers in {name}: all are empty")
        del assembly
        free_memory()


def race(found: Found, recipe: Recipe, out: Path, device: str, timed: int) -> None:
    """Answers a second of the project's steps and of a plain loop's over the same answers, in turn in one process."""
    import torch
    from plain_loop import plain_loop

    from adapters.data.batches import plan_epoch
    from adapters.finetune import model_inputs
    from adapters.training.checkpoint import trainable
    from adapters.training.finetuning_setup import set_up_finetuning
    from adapters.training.setup import RunOptions, open_run

    run = set_up_finetuning(open_run(recipe, RunOptions(out, device=device, quiet=True), stage=2))
    assembly, train_section = run.assembly, recipe.train
    plan = plan_epoch(run.pictures, seed=0, epoch=0, batch_size=train_section.batch_size, row_tokens=run.row_tokens)
    steps = [plan[number % len(plan)] for number in range(timed + 1)]

    def ours(number: int) -> None:
        step = steps[number]
        run.prepared.train()
        for rows in run.micro_batches(step):
            loss, _ = run.prepared(*model_inputs(assembly, rows, run.fitted, run.row_tokens))
            (loss / step.supervised).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable(assembly.model).values()), train_section.clip_norm)
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)

    plain = plain_loop(assembly, device)

    def theirs(number: int) -> None:
        plain(
            [
                (assembly.features([image])[0], [*filter(_is_word, (*row.shared, *answer.own))], list(answer.answer))
                for row in steps[number].rows
                for image in row.images
                for answer in row.packed_answers
            ]
        )

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(timed + 1):
        for name, loop in (("ours", ours), ("plain", theirs)):
            began = time.perf_counter()
            loop(number)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(torch.device(device))
            if number:  # the first is the warm-up
                seconds[name].append((time.perf_counter() - began) / steps[number].answers)
    rates = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["plain"], strict=True)]
    found.add("speed", "this project", f"{rates['ours']:.1f}", f"{statistics.median(ratios):.2f}")
    found.add("speed", "plain transformers and PEFT", f"{rates['plain']:.1f}", "1")


def _is_word(token: int) -> bool:
    return token >= 0  # the places of vectors are negative


_HEADS = {
    "tests": ("", "result"),
    "training": ("tower", "steps", "loss, first and last tenth", "time"),
    "memory": ("training through", "`estimate`", "measured", "measured / estimate"),
    "answers": ("LLM in", "answers equal to float32's", "exact match", "answers/s"),
    "speed": ("loop", "answers/s", "times the plain loop"),
}
_TITLES = {
    "tests": "Tests",
    "training": "easy-VQA through two towers",
    "memory": "Peak memory of training",
    "answers": "Answers in four precisions",
    "speed": "Speed of training",
}


def page(found: Found, *, on_gpu: bool) -> str:
    """The page, as far as it is measured; what stands below its `KEPT` line is kept by hand."""
    if on_gpu:
        opening = f"Measured on a GPU: {found.machine}."
    else:
        opening = (
            "**This page is waiting for a GPU.** No figure on it was measured on one: the tables show the same check on"
            f" a CPU, with a smaller LLM and fewer steps, which proves that it runs and says nothing of a GPU's memory"
            f" or speed. The CPU: {found.machine}."
        )
    lines = [
        "# The check on a GPU",
        "",
        "```",
        "python scripts/check_gpu.py --out check                  # a machine with a GPU: it writes this page",
        "python scripts/check_gpu.py --out check --device cpu     # the same, smaller, without one",
        "```",
        "",
        opening,
    ]
    for part, rows in found.rows.items():
        head = _HEADS[part]
        lines += ["", f"## {_TITLES[part]}", "", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
        lines += _NOTES.get(part, {}).get(on_gpu, [])
    if found.wrong:
        lines += ["", "## Not as it should be", "", *(f"- {line}" for line in found.wrong)]
    return "\n".join(lines) + "\n"


_NOTES = {
    "memory": {
        False: ["", "On a CPU it is RssAnon, which keeps what was freed; of so small a model it is mostly libraries."]
    },
    "answers": {
        False: ["", "A random LLM that was trained for a minute is close to undecided, so answers tip over easily."]
    },
}


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
