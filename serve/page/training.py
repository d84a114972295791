"""Training runs as the page starts, stops and reads them: each is a `querybridge finetune` of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qformer.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,59}")
_WIDTH, _HEIGHT = 640, 200  # of the curve, in its own units


@dataclass(frozen=True)
class RunShown:
    """What is known of a run.

    Attributes:
        state: "running", "stopped", "finished" or "failed".
        said: the last line that the run printed.
        losses: (step, training loss), in their order.
        validations: figures of each validation, with their step.
        samples: predictions of the newest validation: question, prediction, answers, right.
    """

    state: str
    said: str
    losses: Sequence[tuple[int, float]]
    validations: Sequence[dict[str, float]]
    samples: Sequence[dict[str, Any]]


class TrainingRuns:
    """The runs in a folder; one is trained at a time.

    Args:
        folder: holds a folder for each run.
        options: more words of each `querybridge finetune`, such as ("--set", "bridge.preset=tiny").
    """

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.options = tuple(options)
        self._name = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> str:
        """The name of the run that is being trained; "" if none is."""
        return self._name if self._process is not None and self._process.poll() is None else ""

    def names(self) -> list[str]:
        """All runs, the newest first."""
        found = [path.parent for path in self.folder.glob("*/recipe.yaml")]
        names = [path.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]
        return names if not self.running or self.running in names else [self.running, *names]

    def start(self, data: str, name: str, epochs: int = 0) -> None:
        """Begin a run.

        Args:
            data: a data file on this machine.
            name: of the run.
            epochs: passes over the data; 0 leaves them to the size of the data.

        Raises:
            UserError: another run is under way, the name is taken or cannot be one, or there is no such file.
        """
        path = Path(data).expanduser().resolve()
        if not data.strip() or not path.exists():
            raise UserError(f"There is no file '{data}' on this machine: write a data file's path")
        self._check_name(name)
        if (self.folder / name).exists():
            raise UserError(f"There is a run '{name}' already: take another name, or resume that one")
        words = [str(path), "--out", str(self.folder / name), *self.options]
        if epochs:
            words += ["--set", f"train.epochs={epochs}"]
        self._train(name, words)
        self._kept(name).write_text(json.dumps(words), encoding="utf-8")

    def resume(self, name: str) -> None:
        """Go on with a run that was stopped, as if it had not been.

        Raises:
            UserError: another run is under way, or this one was not stopped half way.
        """
        self._check_name(name)
        if not (self.folder / name / "state").exists() or not self._kept(name).exists():
            raise UserError(f"'{name}' was not stopped half way on this page: there is nothing to resume")
        self._train(name, [*json.loads(self._kept(name).read_text(encoding="utf-8")), "--resume"])

    def stop(self) -> None:
        """Have the run that is under way keep what it has and end; it may be resumed."""
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End with the page: the run keeps what it has."""
        self.stop()
        if self._process is not None:
            self._process.wait()

    def show(self, name: str) -> RunShown:
        """What is known of a run by now.

        Raises:
            UserError: there is none of that name.
        """
        self._check_name(name)
        run = self.folder / name
        if not run.exists() and name not in (self.running, self._name):
            raise UserError(f"There is no run '{name}'")
        metrics, samples = _lines(run / "metrics.jsonl"), _lines(run / "samples.jsonl")
        newest = samples[-1]["step"] if samples else None
        log = self._log(name)
        printed = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        return RunShown(
            self._state(name),
            next((line.strip() for line in reversed(printed) if line.strip()), ""),
            [(row["step"], row["loss"]) for row in metrics if "loss" in row],
            [row for row in metrics if "val_loss" in row or "val_exact_match" in row],
            [one for one in samples if one["step"] == newest],
        )

    def _state(self, name: str) -> str:
        if name == self.running:
            return "running"
        code = self._process.returncode if self._process is not None and name == self._name else None
        if code not in (None, 0, 130, -signal.SIGINT):
            return "failed"
        return "finished" if code == 0 or not (self.folder / name / "state").exists() else "stopped"

    def _train(self, name: str, words: list[str]) -> None:
        if self.running:
            raise UserError(f"'{self.running}' is being trained: stop it first, or wait for its end")
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.cli", "finetune", *words],
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._name = name

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(f"'{name}' cannot be a run's name: take letters, digits, '-', '_' and '.'")

    def _log(self, name: str) -> Path:
        return self.folder / ".page" / f"{name}.log"

    def _kept(self, name: str) -> Path:
        return self.folder / ".page" / f"{name}.json"


def draw_curve(shown: RunShown) -> str:
    """Losses as a picture in the page; nothing if there are none yet."""
    validation = [(int(row["step"]), row["val_loss"]) for row in shown.validations if "val_loss" in row]
    points = [*shown.losses, *validation]
    if not points:
        return ""
    last, top = max(step for step, _ in points) or 1, max(loss for _, loss in points) or 1.0

    def line(values: Sequence[tuple[int, float]], kind: str) -> str:
        placed = " ".join(f"{step / last * _WIDTH:.1f},{_HEIGHT - loss / top * _HEIGHT:.1f}" for step, loss in values)
        return f"<polyline class='{kind}' points='{placed}'/>"

    newest = shown.losses[-1][1] if shown.losses else validation[-1][1]
    told = f"Loss {newest:.3f} at step {last}, at most {top:.3f}"
    return (
        f"<figure class='curve'><svg viewBox='-4 -4 {_WIDTH + 8} {_HEIGHT + 8}' role='img' aria-label='{told}'>"
        f"{line(shown.losses, 'loss')}{line(validation, 'val')}</svg>"
        f"<figcaption>{told}. Thin: training; thick: validation.</figcaption></figure>"
    )


def draw_validation(shown: RunShown) -> str:
    """The newest validation: its figures, and sample predictions."""
    parts = []
    if shown.validations:
        named = {name: value for name, value in shown.validations[-1].items() if isinstance(value, float)}
        figures = " · ".join(f"{escape(name)} {value:.3f}" for name, value in named.items())
        parts.append(f"<p>Validation at step {int(shown.validations[-1]['step'])}: {figures}</p>")
    if shown.samples:
        rows = "".join(
            f"<tr><td>{escape(', '.join(one['images']))}</td><td>{escape(one['question'])}</td>"
            f"<td class='answer'>{escape(one['prediction']) or '<i>no words</i>'}</td>"
            f"<td>{'right' if one['right'] else 'wrong: ' + escape(next(iter(one['answers']), ''))}</td></tr>"
            for one in shown.samples
        )
        head = "<tr><th>Picture</th><th>Question</th><th>Prediction</th><th>Verdict</th></tr>"
        parts.append(f"<table class='answers'><thead>{head}</thead><tbody>{rows}</tbody></table>")
    return "".join(parts)


def _lines(path: Path) -> list[dict[str, Any]]:
    """A log's lines; the last may be half written."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
