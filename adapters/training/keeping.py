"""What a run leaves in its folder as it goes: artefacts after each validation, and the state to go on from."""

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
from adapters.training.run_data import Result, note_validation
from adapters.training.run_folder import open_run_folder
from adapters.training.setup import Opened


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
