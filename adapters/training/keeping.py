"""What a run keeps after each validation: artefacts, the best one, the state to resume; and when it stops early."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from adapters.artefact.artefact import save_artefact
from adapters.artefact.facts import Facts
from adapters.loading.assembly import Assembly
from adapters.loading.reader import Reader
from adapters.loading.vision_side import VisionSide
from adapters.training.checkpoint import RunState, generators_of_all, save_state
from adapters.training.controls import describe_controls
from adapters.training.reporting import Reporter
from adapters.training.run_data import Result, broadcast_from_main
from adapters.training.run_folder import open_run_folder
from adapters.training.setup import Opened

NEWEST_SHARE = 0.7  # of the newest validation in the running mean that weights are chosen by


class RunKeeper:
    """Saves a run of either stage. Every process calls it; the first one writes.

    Args:
        opened: the run's folder, recipe and processes; the folder is made if there is none.
        trained: what the artefacts are of.
        model: the module whose trainable parameters are the state.
        optimiser: over them.
        position: the step the run has reached; changed in place.
        facts: what the artefacts say of the run, figures apart.
        reader: the closed-form reader of the artefacts, in place of the one that the run validates with.

    Raises:
        UserError: the folder cannot be written, here or later.
    """

    def __init__(
        self,
        opened: Opened,
        trained: Assembly | VisionSide,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        position: RunState,
        facts: Facts,
        reader: Reader | None = None,
    ) -> None:
        self.opened = opened
        self.trained = trained
        self.model = model
        self.optimiser = optimiser
        self.position = position
        self.facts = facts
        self.reader = reader
        self.folder = opened.options.out
        self.began = time.monotonic() - position.seconds
        if opened.accelerator.is_main_process:
            open_run_folder(self.folder, opened.recipe.dump())

    def validated(self, report: Reporter, metrics: dict[str, float], score: float) -> None:
        """Report a validation and save `last`, `best` if it has the highest score so far, and the state."""
        position = self.position
        report.validation(position.step, metrics)
        generators = generators_of_all()
        improved = note_validation(position, score, metrics, self.opened.recipe.train.patience)
        if self.opened.accelerator.is_main_process:
            measured = replace(self.facts, metrics=metrics, steps=position.step)
            trained = self.trained
            if self.reader is not None and isinstance(trained, Assembly):
                trained = replace(trained, reader=self.reader)
            save_artefact(self.folder / "last", trained, measured)
            if improved:
                save_artefact(self.folder / "best", trained, measured)
            self._save_state(generators)
            report.draw()
        self.opened.accelerator.wait_for_everyone()

    def result(self, report: Reporter, total: int) -> Result:
        """Save the state of a run that was stopped before its end, and say what the run came to."""
        position = self.position
        finished = position.step >= total or position.stopped_early
        generators = generators_of_all()
        if not finished and self.opened.accelerator.is_main_process:
            self._save_state(generators)
            report.say(f"stopped at step {position.step} of {total}; --resume goes on from there")
        if finished:
            for line in describe_controls(
                position.metrics, step=position.best_step, total=total, stopped_early=position.stopped_early
            ):
                report.say(line)
        metrics = {**position.metrics, "peak_memory_gib": report.memory.peak_gib}
        return Result(self.folder, self.folder / "best", position.step, metrics, finished)

    def _save_state(self, generators: dict[str, torch.Tensor]) -> None:
        self.position.seconds = time.monotonic() - self.began
        save_state(self.folder / "state", self.model, self.optimiser, self.position, generators)


def note_validation(position: RunState, score: float, metrics: dict[str, float], patience: int | None) -> bool:
    """Keep the best validation's figures and count towards patience.

    The first process decides for all: on different devices equal figures may differ in their last bit, and a process
    that stopped alone would leave the others waiting.

    Args:
        position: changed in place.
        score: higher is better; a running mean of it decides.
        metrics: what was measured.
        patience: validations without a gain before stopping.

    Returns:
        Whether this one is the best.
    """
    score = broadcast_from_main(score)
    if position.smoothed is not None:  # one lucky validation does not choose
        score = NEWEST_SHARE * score + (1 - NEWEST_SHARE) * position.smoothed
    position.smoothed = score
    if position.best is None or score > position.best:
        position.best, position.best_step, position.stale, position.metrics = score, position.step, 0, metrics
        return True
    position.stale += 1
    position.stopped_early = patience is not None and position.stale >= patience
    return False
