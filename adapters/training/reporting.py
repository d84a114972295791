"""What a run tells: a progress bar, a line of metrics a step, TensorBoard, and the loss curve as a picture."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from adapters.data.examples import Example
from qformer.errors import UserError


def anonymous_memory() -> int:
    """Bytes of memory of this process that no file backs; 0 if the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(lines.get("RssAnon", "0 kB").split()[0]) * 1024


class MemoryWatch:
    """The peak of memory while it runs: on a GPU what torch allocated, else RssAnon, looked at ten times a second."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.kind = "GPU" if self.on_gpu else "RssAnon"
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def peak_gib(self) -> float:
        """The peak so far, GiB."""
        return (torch.cuda.max_memory_allocated(self.device) if self.on_gpu else self._peak) / 2**30

    def start(self) -> None:
        """Begin to look."""
        if not self.on_gpu:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self._peak = max(self._peak, anonymous_memory())


class Reporter:
    """Reports a run of `total` steps into `folder`. On a terminal a bar; elsewhere a line every few seconds.

    Args:
        folder: the run's folder; metrics.jsonl, tensorboard/, loss.png, samples.png and samples.jsonl are
            written there. None writes nothing.
        total: steps of the whole run.
        device: where the model is; tells whose memory is watched.
        start: steps already taken.
        quiet: print nothing.

    Raises:
        UserError: the folder cannot be written, here or later: most often the disk is full.
    """

    def __init__(
        self, folder: Path | None, total: int, *, device: torch.device, start: int = 0, quiet: bool = False
    ) -> None:
        self.folder = folder
        self.total = total
        self.start = start
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.memory = MemoryWatch(device)
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            with _written(folder):
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
                _cut_after(folder / "metrics.jsonl", start)
                _cut_after(folder / "samples.jsonl", start)

    def __enter__(self) -> Reporter:
        self.memory.start()
        if not self.quiet and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn(),
                console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=self.total, completed=self.start, said="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.memory.stop()
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None and self.folder is not None:
            with suppress(UserError) if error is not None else nullcontext(), _written(self.folder):
                self._board.close()

    def say(self, text: str) -> None:
        """A line for people, on standard error."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One optimiser step's figures."""
        peak = self.memory.peak_gib
        self._write(step, values | {"peak_memory_gib": round(peak, 3)})
        rate = values["samples_per_second"]
        said = f"loss {values['loss']:.3f} · {rate:.1f} samples/s · peak {self.memory.kind} {peak:.2f} GiB"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, said=said)
        elif time.monotonic() - self._printed > 15 or step == self.total:
            self._printed = time.monotonic()
            left = (time.monotonic() - self._began) / max(step - self.start, 1) * (self.total - step)
            self.say(f"step {step}/{self.total} · {said} · {left / 60:.1f} min left")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """One validation's figures."""
        self._write(step, values)
        self.say(f"step {step}: " + " · ".join(f"{name} {value:.3f}" for name, value in values.items()))

    def samples(self, step: int, examples: Sequence[Example], texts: Sequence[str], *, sets: bool = False) -> None:
        """A few predictions of a validation with their pictures: samples.png, samples.jsonl and TensorBoard."""
        if self.folder is None:
            return
        from adapters.training.samples import save_samples

        with _written(self.folder):
            sheet = save_samples(self.folder, step, examples, texts, sets=sets)
            if self._board is not None:
                self._board.add_image("samples", sheet, step, dataformats="HWC")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.folder is None:
            return
        with _written(self.folder):
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def draw(self) -> None:
        """Draw the loss curve from metrics.jsonl into loss.png."""
        if self.folder is not None:
            with _written(self.folder):
                draw_curve(self.folder)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What cannot be written is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: the run's log cannot be written ({error}); free space, then --resume") from error


_CURVES = {"loss": "training loss", "val_loss": "validation loss"}
_FIRST_STAGE_CURVES = {"itc": "ITC", "itm": "ITM", "itg": "ITG"}
_SCORES = {"val_exact_match": "exact match", "mean_recall": "mean recall"}


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run takes again, and a line that was only half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            print(f"{path}: a damaged line was dropped", file=sys.stderr)
    path.write_text("".join(kept), encoding="utf-8")


def draw_curve(folder: Path) -> Path:
    """Read a run's metrics.jsonl and draw losses and validation scores into loss.png; returns its path.

    Of the first stage each objective has a curve; steps that leave one out have no point on it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first_stage = any("itc" in row for row in rows)
    curves = _FIRST_STAGE_CURVES if first_stage else _CURVES

    def points(name: str) -> list[tuple[int, float]]:
        skipped = 0.0 if name in ("itm", "itg") else None
        return [(row["step"], row[name]) for row in rows if name in row and row[name] != skipped]

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label in curves.items():
        if found := points(name):
            axes.plot(*zip(*found, strict=True), label=label, marker="o" if name == "val_loss" else None)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss of each objective" if first_stage else "loss per supervised token")
    for name, label in _SCORES.items():
        if found := points(name):
            right = axes.twinx()
            right.plot(*zip(*found, strict=True), color="black", marker="s", label=f"validation {label}")
            right.set_ylim(0, 1)
            right.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(folder / "loss.png", dpi=120)
    return folder / "loss.png"
