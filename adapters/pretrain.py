"""BLIP-2's first stage (arXiv 2301.12597, section 3.2): norm, bridge and heads learn from captions, without an LLM.

The loop is `_pretrain`, from top to bottom. What it leaves is searched and classified with as it is, and the second
stage, `adapters.finetune`, starts from it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from adapters.data.caption_batches import Batch, CaptionedPicture, draw_batch
from adapters.evaluation.retrieval import recalls
from adapters.inference.retrieval import Retriever
from adapters.loading.vision_side import VisionSide
from adapters.recipe import Recipe
from adapters.training.checkpoint import RunState, trainable
from adapters.training.interrupt import interruptible
from adapters.training.keeping import RunKeeper
from adapters.training.optimiser import Schedule
from adapters.training.pretraining_setup import set_up_pretraining
from adapters.training.reporting import Reporter
from adapters.training.run_data import Result, report_skipped, steps_between_validations
from adapters.training.run_folder import check_finite, one_run_at_a_time
from adapters.training.setup import RunOptions, open_run
from adapters.training.text_side import model_inputs


def pretrain(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    start_from: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> Result:
    """Train the first stage by a recipe: ITC, ITM and ITG with equal weight.

    Args:
        recipe: what to train, and how; its bridge has a text branch, its data are captions. `train.batch_size` counts
            pictures, of each of which `train.captions` are drawn a step.
        out: the run's folder, as `adapters.finetune.finetune` leaves it; `best` has the highest mean recall.
        resume: go on from the run in `out`; equal to a run that was never stopped.
        start_from: an adapter whose norm, bridge and heads to start from.
        device: where to train; a GPU if there is one.
        dtype: "float32" or "bfloat16"; left out, what suits the device.
        offline: take frozen weights from the cache only.
        quiet: print nothing.

    Raises:
        UserError: data, recipe or weights are not in order; the loss is not a number; the disk is full; another run
            writes to `out`.
    """
    options = RunOptions(Path(out), resume, start_from, device, dtype, offline, quiet)
    with one_run_at_a_time(options.out):
        return _pretrain(recipe, options)


def _pretrain(recipe: Recipe, options: RunOptions) -> Result:
    run = set_up_pretraining(open_run(recipe, options, stage=1))
    train, position, vision_side, optimiser = recipe.train, run.position, run.vision_side, run.optimiser
    accelerator, model = run.opened.accelerator, run.model
    world, rank = accelerator.num_processes, accelerator.process_index
    total = train.max_steps or max(1, round(train.epochs * max(1, len(run.pictures) // train.batch_size)))
    if not run.opened.quiet and total <= train.contrastive_steps:
        print(
            f"all {total} steps are ITC's alone (train.contrastive_steps={train.contrastive_steps}): ITM and ITG"
            f" learn nothing; for all three set it to {total * 2 // 3} or less",
            file=sys.stderr,
        )
    every = train.validate_every or steps_between_validations(total)
    schedule = Schedule(total, train.warmup_steps, train.min_learning_rate)
    keeper = RunKeeper(run.opened, vision_side, model, optimiser, position, run.facts)
    folder = options.out if accelerator.is_main_process else None
    with (
        Reporter(
            folder, total, device=torch.device(run.opened.device), start=position.step, quiet=run.opened.quiet
        ) as report,
        interruptible() as stop,
    ):
        report.say(_describe(vision_side, run.compute_dtype, len(run.pictures), len(run.held_out)))
        if shortened := schedule.shortened():
            report.say(shortened)
        report_skipped(report, run.opened.train, run.opened.val)
        if position.step == 0:  # a broken evaluation fails now, not after an hour
            evaluate_recall(vision_side, run.held_out[:2], run.compute_dtype)
        sums: dict[str, float] = {}
        counted, timer = 0, time.monotonic()
        for batch in _batches_from(position, run.pictures, recipe):
            pressed = accelerator.reduce(torch.tensor(len(stop), device=accelerator.device))
            if position.step >= total or position.stopped_early or pressed:
                break
            model.train()
            rate = schedule.share(position.step)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            mine = batch[rank::world][: len(batch) // world]  # as many on every process
            paired = max(1, round(train.pair_share * len(mine))) if position.step >= train.contrastive_steps else 0
            losses = run.prepared(*model_inputs(vision_side, mine), paired=paired)
            accelerator.backward(losses.total)
            means = torch.stack([losses.total, losses.contrastive, losses.matching, losses.generation]).detach()
            values = dict(zip(("loss", "itc", "itm", "itg"), accelerator.reduce(means, "mean").tolist(), strict=True))
            check_finite(values["loss"], position.step + 1, train.learning_rate)
            norm = float(accelerator.clip_grad_norm_(list(trainable(model).values()), train.clip_norm))
            check_finite(norm, position.step + 1, train.learning_rate, what="the gradient's norm")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            model.heads.clamp_temperature()
            position.step += 1
            position.offset += 1
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
            counted += 1
            if position.step % train.log_every == 0 or position.step == total:
                elapsed = time.monotonic() - timer
                report.step(
                    position.step,
                    {name: value / counted for name, value in sums.items()}
                    | {
                        "learning_rate": train.learning_rate * rate,
                        "gradient_norm": norm,
                        "temperature": model.heads.temperature.item(),
                        "samples_per_second": counted * len(batch) * train.captions / elapsed,
                    },
                )
                sums, counted, timer = {}, 0, time.monotonic()
            if position.step % every == 0 or position.step == total:
                metrics = evaluate_recall(vision_side, run.held_out, run.compute_dtype)
                keeper.validated(report, metrics, metrics["mean_recall"])
                sums, counted, timer = {}, 0, time.monotonic()
        return keeper.result(report, total)


def _batches_from(position: RunState, pictures: Sequence[CaptionedPicture], recipe: Recipe) -> Iterator[Batch]:
    """Batches from the run's place on, epoch after epoch; what does not fill one is passed over."""
    train = recipe.train
    size = min(train.batch_size, len(pictures))
    while True:
        rng = random.Random(f"{train.seed}:{position.epoch}")
        order = rng.sample(pictures, len(pictures))
        drawn = draw_batch(order, train.captions, rng, views=recipe.data.views)
        for start in range(position.offset * size, len(drawn) - size + 1, size):
            yield drawn[start : start + size]
        position.epoch += 1
        position.offset = 0


def evaluate_recall(
    vision_side: VisionSide, pictures: Sequence[CaptionedPicture], compute_dtype: torch.dtype
) -> dict[str, float]:
    """ITC's R@1, R@5 and R@10 both ways among held-out pictures, and their mean."""
    retriever = Retriever(vision_side, compute_dtype=compute_dtype)
    images = retriever.embed_images([picture.image for picture in pictures])
    texts = retriever.embed_texts([text for picture in pictures for text in picture.captions])
    owners = [row for row, picture in enumerate(pictures) for _ in picture.captions]
    found = recalls(retriever.scores(images, texts), owners)
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def _describe(vision_side: VisionSide, compute_dtype: torch.dtype, pictures: int, held_out: int) -> str:
    trained = sum(p.numel() for part in vision_side.parts().values() for p in part.parameters() if p.requires_grad)
    return (
        f"first stage: training {trained / 1e6:.1f} M parameters of norm, bridge and heads on {pictures} pictures,"
        f" {held_out} held out; computing in {str(compute_dtype).removeprefix('torch.')}"
    )
