"""BLIP-2's first stage (arXiv 2301.12597, section 3.2): norm, bridge and heads learn from captions, without an LLM.

The loop is `pretrain`, from top to bottom. What it leaves is searched and classified with as it is, and the second
stage, `adapters.finetune`, starts from it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from adapters.artefact.artefact import find_artefact, save_artefact
from adapters.artefact.facts import Facts
from adapters.data.caption_batches import Batch, CaptionedPicture, draw_batch, group_captions
from adapters.data.views import all_views
from adapters.evaluation.retrieval import recalls
from adapters.inference.retrieval import Retriever
from adapters.loading.assembly import chosen_dtype
from adapters.loading.vision_side import VisionSide, check_device, default_device, load_vision_side
from adapters.recipe import Recipe
from adapters.training.checkpoint import RunState, generators_of_all, load_state, read_run_state, save_state, trainable
from adapters.training.interrupt import interruptible
from adapters.training.optimiser import build_optimiser, learning_rate
from adapters.training.reporting import Reporter
from adapters.training.run_data import (
    Result,
    broadcast_from_main,
    fill_caches,
    note_validation,
    read_split,
    report_skipped,
    report_terms,
    sample_evenly,
)
from adapters.training.run_folder import check_finite, check_run_folder, open_run_folder
from adapters.training.start import start_from_artefact
from adapters.training.text_side import model_inputs
from qformer.errors import UserError
from qformer.precision import default_compute_dtype


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
        resume: go on from the run that stands in `out`; equal to a run that was never stopped.
        start_from: an adapter whose norm, bridge and heads to start from.
        device: where to train; a GPU where there is one.
        dtype: "float32" or "bfloat16"; left out, what suits the device.
        offline: take frozen weights from the cache only.
        quiet: print nothing.

    Raises:
        UserError: data, recipe or weights are not in order; the loss is not a number; the disk is full.
    """
    out = Path(out)
    if not recipe.bridge.text_branch or recipe.bridge.start is None:
        raise UserError(
            "the first stage reads captions: set bridge.text_branch=true and bridge.start to a BERT's source"
        )
    for name in ("compile", "label_smoothing", "self_critical", "align_steps", "text_side_every"):
        if value := getattr(recipe.train, name):
            raise UserError(
                f"train.{name}={value}: it is for training with an LLM, which the first stage has none of; leave it out"
            )
    on_cpu = (device or default_device()) == "cpu"
    accelerator = Accelerator(cpu=on_cpu, device_placement=False, mixed_precision="no")
    main, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    state = check_run_folder(out, resume, recipe)
    train = recipe.train
    train_data, val_data = read_split(recipe, offline=offline)
    pictures, held_out = group_captions(train_data.examples), group_captions(val_data.examples)
    if min(train.batch_size, len(pictures)) < 2 * world:
        raise UserError(
            f"telling pictures apart needs two a step and process: {train_data.name} has {len(pictures)} with English"
            f" captions, train.batch_size is {train.batch_size}"
        )
    if not held_out:
        raise UserError(f"{val_data.name} holds no pictures with English captions; name others with --set data.val")
    starting = start_from if state is None else None
    inherited: tuple[str, ...] = ()
    if starting is not None:
        find_artefact(starting)  # a mistake here is told before anything is loaded
    place = device or str(accelerator.device)
    check_device(place)
    compute_dtype = chosen_dtype(dtype or (read_run_state(state).dtype if state is not None else None))
    compute_dtype = compute_dtype or broadcast_from_main(default_compute_dtype(place, four_bit=False))
    vision_side = load_vision_side(recipe, device=place, offline=offline)
    images = all_views((picture.image for picture in pictures), recipe.data.views)
    images += [picture.image for picture in held_out]
    fill_caches(vision_side.caches, images, rank=rank, world=world, quiet=quiet or not main)
    accelerator.wait_for_everyone()
    fill_caches(vision_side.caches, images, quiet=True)  # all there by now: the cache learns what must not be evicted
    if starting is not None:
        start = start_from_artefact(vision_side, starting)
        inherited = start.terms
        if main and not quiet:
            print(start, file=sys.stderr)
    if state is None and main and not quiet:
        report_terms(term for term in vision_side.terms if term not in inherited)
    if state is None and starting is None:
        vision_side.feature_norm.standardise(
            vision_side.features([picture.image for picture in sample_evenly(pictures, 256)])
        )
    model = vision_side.representation(compute_dtype)
    optimiser = build_optimiser(model, train)
    position = RunState(
        data=train_data.fingerprint,
        dtype=str(compute_dtype).removeprefix("torch."),
        terms=[*([train_data.terms] if train_data.terms else []), *vision_side.terms, *inherited],
        started_from=starting,
    )
    if state is not None:
        position = load_state(state, model, optimiser, rank=rank)
        if position.data != train_data.fingerprint:
            raise UserError(
                f"{out}: the run was trained on other data than {recipe.data.train} is now; name another --out"
            )
    elif rank:  # the same weights on every process, but chances of its own
        torch.manual_seed(train.seed + 1000 * rank)
    prepared = accelerator.prepare(model)
    steps_an_epoch = max(1, len(pictures) // train.batch_size)
    total = train.max_steps or max(1, round(train.epochs * steps_an_epoch))
    if main and not quiet and total <= train.contrastive_steps:
        print(
            f"all {total} steps are ITC's alone (train.contrastive_steps={train.contrastive_steps}): ITM and ITG"
            f" learn nothing; for all three set it to {total * 2 // 3} or less",
            file=sys.stderr,
        )
    facts = Facts(
        fingerprints=vision_side.fingerprints,
        data={
            "train": train_data.name,
            "pictures": len(pictures),
            "captions": sum(len(picture.captions) for picture in pictures),
            "fingerprint": train_data.fingerprint,
            "bad rows left out": len(train_data.skipped),
        },
        terms=tuple(dict.fromkeys(position.terms)),
        started_from=position.started_from,
    )
    if main:
        open_run_folder(out, recipe)
    began = time.monotonic() - position.seconds
    with (
        Reporter(
            out if main else None, total, device=accelerator.device, start=position.step, quiet=quiet or not main
        ) as report,
        interruptible() as stop,
    ):
        report.say(_describe(vision_side, compute_dtype, len(pictures), len(held_out)))
        report_skipped(report, train_data, val_data)
        if position.step == 0:  # a broken evaluation fails now, not after an hour
            evaluate_recall(vision_side, held_out[:2], compute_dtype)
        sums: dict[str, float] = {}
        counted, timer = 0, time.monotonic()
        for batch in _batches_from(position, pictures, recipe):
            pressed = accelerator.reduce(torch.tensor(len(stop), device=accelerator.device))
            if position.step >= total or position.stopped_early or pressed:
                break
            model.train()
            rate = learning_rate(position.step, total, train)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            mine = batch[rank::world][: len(batch) // world]  # as many on every process
            paired = max(1, round(train.pair_share * len(mine))) if position.step >= train.contrastive_steps else 0
            losses = prepared(*model_inputs(vision_side, mine), paired=paired)
            accelerator.backward(losses.total)
            said = torch.stack([losses.total, losses.contrastive, losses.matching, losses.generation]).detach()
            values = dict(zip(("loss", "itc", "itm", "itg"), accelerator.reduce(said, "mean").tolist(), strict=True))
            check_finite(values["loss"], position.step + 1, recipe)
            norm = float(accelerator.clip_grad_norm_(list(trainable(model).values()), train.clip_norm))
            check_finite(norm, position.step + 1, recipe, what="the gradient's norm")
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
            if position.step % train.validate_every == 0 or position.step == total:
                metrics = evaluate_recall(vision_side, held_out, compute_dtype)
                report.validation(position.step, metrics)
                position.seconds = time.monotonic() - began
                generators = generators_of_all()
                improved = note_validation(position, metrics["mean_recall"], metrics, train.patience)
                if main:
                    measured = replace(facts, metrics=metrics, steps=position.step)
                    save_artefact(out / "last", vision_side, measured)
                    if improved:
                        save_artefact(out / "best", vision_side, measured)
                    save_state(out / "state", model, optimiser, position, generators)
                    report.draw()
                accelerator.wait_for_everyone()
                sums, counted, timer = {}, 0, time.monotonic()
        finished = position.step >= total or position.stopped_early
        generators = generators_of_all()
        if not finished and main:
            position.seconds = time.monotonic() - began
            save_state(out / "state", model, optimiser, position, generators)
            report.say(f"stopped at step {position.step} of {total}; --resume goes on from there")
        peak = report.memory.peak_gib
        return Result(out, out / "best", position.step, {**position.metrics, "peak_memory_gib": peak}, finished)


def _batches_from(position: RunState, pictures: Sequence[CaptionedPicture], recipe: Recipe) -> Iterator[Batch]:
    """Batches from where the run stands, epoch after epoch; what does not fill one is passed over."""
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
