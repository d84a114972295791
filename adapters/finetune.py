"""Fine-tuning: the bridge, the projection and LoRA learn to answer about a domain's pictures.

The loop is `finetune`, from top to bottom: load, tokenise, encode, train with validations between, save.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from adapters.alignment import align_words
from adapters.answering import answer_examples
from adapters.artefact import Facts, find_artefact, read_facts, save_artefact
from adapters.assembly import Assembly, assemble
from adapters.checkpoint import Position, generators_of_all, load_state, read_position, save_state, trainable
from adapters.data.batches import Picture, Step, plan_epoch, plan_validation, tokenise
from adapters.data.collate import Row, collate_encoder_decoder, collate_rows
from adapters.data.examples import DataSet, Example, merge, split_by_image
from adapters.data.images import ImageRef
from adapters.data.readers import read_data
from adapters.evaluation.vqa import score
from adapters.optimiser import build_optimiser, learning_rate
from adapters.recipe import Recipe, Sources, SourceSection, TrainSection
from adapters.reporting import Reporter
from adapters.run_folder import check_finite, check_run_folder, open_run_folder
from adapters.sight import Sight, default_device
from adapters.starting import start_from_artefact
from adapters.stopping import interruptible
from adapters.text_side import TextSideKeeper
from qformer.decoding import Decoding
from qformer.errors import UserError


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        best: its best artefact.
        steps: optimiser steps taken, over all sittings.
        metrics: the best validation's figures, and peak_memory_gib of this sitting.
        finished: False where Ctrl-C stopped it; `resume` goes on.
    """

    folder: Path
    best: Path
    steps: int
    metrics: dict[str, float]
    finished: bool


def finetune(
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
    """Train an adapter by a recipe.

    Args:
        recipe: what to train, and how.
        out: the run's folder: recipe, metrics, loss curve, `best` and `last` artefacts, resume state.
        resume: go on from the run that stands in `out`; equal to a run that was never stopped.
        start_from: an adapter to start from instead of fresh weights; its terms are inherited.
        device: where to train; a GPU where there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        quiet: print nothing.

    Raises:
        UserError: data, recipe or weights are not in order; the loss is not a number; the disk is full.
    """
    out = Path(out)
    accelerator = Accelerator(
        cpu=(device or default_device()) == "cpu",
        mixed_precision="no",  # precision is the LLM's
        # the text side, where the adapter keeps it, is in no answer's loss
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.bridge.text_branch)],
    )
    main = accelerator.is_main_process
    state = check_run_folder(out, resume, recipe)
    train = recipe.train

    train_data, val_data = read_split(recipe, offline=offline)
    starting = start_from if state is None else None  # a resumed run already holds what it started from
    if starting is not None:
        begun = read_facts(find_artefact(starting))  # a mistake here is told before anything is loaded
    assembly = assemble(
        recipe,
        device=device or str(accelerator.device),
        dtype=dtype or (read_position(state).dtype if state is not None else None),  # a resumed run keeps its own
        offline=offline,
        lora=starting is None or begun.kind == "representation",
    )
    position = Position(
        data=train_data.fingerprint,
        dtype=str(assembly.model.language.compute_dtype).removeprefix("torch."),
        terms=[train_data.terms] if train_data.terms else [],
    )
    if starting is not None:
        position.started_from = starting
        position.terms += start_from_artefact(assembly, starting)
        if not quiet:
            print(f"starting from {starting}; terms: {'; '.join(begun.terms) or 'not stated'}", file=sys.stderr)
    pictures = tokenise(train_data, assembly.prompts, max_tokens=train.micro_batch_tokens)
    row_tokens = train.row_tokens if _packs(assembly) else 0
    validation = plan_validation(
        tokenise(val_data, assembly.prompts, max_tokens=train.micro_batch_tokens), row_tokens=row_tokens
    )
    images = [image for data in (train_data, val_data) for example in data.examples for image in example.images]
    fill_caches(assembly, images[accelerator.process_index :: accelerator.num_processes], quiet=quiet or not main)
    accelerator.wait_for_everyone()
    fill_caches(assembly, images, quiet=True)  # all there by now: the cache learns what must not be evicted

    model = assembly.model
    if state is None and starting is None:
        model.feature_norm.standardise(assembly.features(_some_pictures(pictures)))
        if train.align_steps and not assembly.reads_instructions:
            _align(assembly, pictures, train, quiet=quiet or not main)
    optimiser = build_optimiser(assembly.model, train)
    if state is not None:
        position = load_state(state, model, optimiser, rank=accelerator.process_index)
        if position.data != train_data.fingerprint:
            raise UserError(
                f"{out}: the run was trained on other data than {recipe.data.train} is now; name another --out"
            )
    keeper = TextSideKeeper(assembly, train_data.examples, train) if train.text_side_every else None
    if keeper is not None and accelerator.num_processes > 1:
        raise UserError("train.text_side_every: the text side is kept in a run of one process only; set it to 0")
    prepared = accelerator.prepare(model)
    answers = sum(len(picture.questions) for picture in pictures)
    steps_an_epoch = len(_plan(pictures, 0, train, row_tokens, accelerator.num_processes))
    total = train.max_steps or max(1, round(train.epochs * steps_an_epoch))
    facts = Facts(
        fingerprints=assembly.fingerprints,
        data={
            "train": train_data.name,
            "answers": answers,
            "pictures": len(pictures),
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
        Reporter(out if main else None, total, start=position.step, quiet=quiet or not main) as report,
        interruptible() as stop,
    ):
        report.say(describe_trainable(assembly))
        for data in (train_data, val_data):
            for line in data.skipped[:3]:
                report.say(f"left out: {line}")
            if data.skipped:
                report.say(f"{data.name}: {len(data.skipped)} bad rows left out")
        if position.step == 0:  # a broken evaluation fails now, not after an hour
            validate(assembly, Step(validation.rows[:2]), val_data.examples[:2], recipe)
        losses: list[float] = []
        timer = time.monotonic()
        samples = 0
        for step in _steps_from(position, pictures, train, row_tokens, accelerator.num_processes):
            pressed = accelerator.reduce(torch.tensor(len(stop), device=accelerator.device))
            if position.step >= total or position.stopped_early or pressed:
                break
            model.train()
            rate = learning_rate(position.step, total, train)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            loss = 0.0
            share = step.micro_batches(train.micro_batch_tokens, accelerator.process_index, accelerator.num_processes)
            for index, rows in enumerate(share):
                last = index == len(share) - 1
                with nullcontext() if last else accelerator.no_sync(prepared):
                    summed, _ = prepared(*model_inputs(assembly, rows))
                    # each token of the step weighs the same, whatever micro-batch or process it is in
                    part = summed / step.supervised
                    accelerator.backward(part * accelerator.num_processes)
                loss += part.item()
            if keeper is not None and position.step % train.text_side_every == 0:
                kept = keeper.losses(position.step)
                accelerator.backward(kept.total)
                keeper.model.heads.clamp_temperature()
            loss = float(accelerator.reduce(torch.tensor(loss, device=accelerator.device)))
            check_finite(loss, position.step + 1, recipe)
            norm = float(accelerator.clip_grad_norm_(list(trainable(model).values()), train.clip_norm))
            check_finite(norm, position.step + 1, recipe, what="the gradient's norm")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            position.step += 1
            position.offset += 1
            losses.append(loss)
            samples += step.answers
            if position.step % train.log_every == 0 or position.step == total:
                elapsed = time.monotonic() - timer
                report.step(
                    position.step,
                    {
                        "loss": sum(losses) / len(losses),
                        "learning_rate": train.learning_rate * rate,
                        "gradient_norm": norm,
                        "samples_per_second": samples / elapsed,
                    },
                )
                losses, samples, timer = [], 0, time.monotonic()
            if position.step % train.validate_every == 0 or position.step == total:
                metrics = validate(assembly, validation, val_data.examples, recipe)
                report.validation(position.step, metrics)
                position.seconds = time.monotonic() - began
                generators = generators_of_all()
                improved = note_validation(position, metrics, train)  # on every process, so that all stop together
                if main:
                    measured = replace(facts, metrics=metrics, steps=position.step)
                    save_artefact(out / "last", assembly, measured)
                    if improved:
                        save_artefact(out / "best", assembly, measured)
                    save_state(out / "state", model, optimiser, position, generators)
                    report.draw()
                accelerator.wait_for_everyone()
                samples, timer = 0, time.monotonic()
        finished = position.step >= total or position.stopped_early
        generators = generators_of_all()
        if not finished and main:
            position.seconds = time.monotonic() - began
            save_state(out / "state", model, optimiser, position, generators)
            report.say(f"stopped at step {position.step} of {total}; --resume goes on from there")
        return Result(
            out,
            out / "best",
            position.step,
            {**position.metrics, "peak_memory_gib": report.memory.peak_gib},
            finished,
        )


def read_split(recipe: Recipe, *, offline: bool = False) -> tuple[DataSet, DataSet]:
    """The training and the validation data of a recipe; without a validation set, whole pictures are held out."""
    data = recipe.data

    def read(sources: Sources, limit: int | None) -> DataSet:
        task = None if recipe.task == "mixed" else recipe.task
        listed = (SourceSection(file=sources, limit=limit),) if isinstance(sources, str) else sources
        options: dict[str, Any] = {"skip_bad_rows": data.skip_bad_rows, "offline": offline}
        return merge(
            [read_data(part.file, task=part.task or task, limit=part.limit or limit, **options) for part in listed]
        )

    train = read(data.train, data.limit)
    if data.terms:
        train = replace(train, terms="; ".join(filter(None, (train.terms, data.terms))))
    if data.val is not None:
        return train, read(data.val, data.val_limit)
    train, val = split_by_image(train, data.val_fraction, seed=0)  # the split does not hang on the run's seed
    return train, replace(val, examples=_spread(val.examples, data.val_limit))


def _spread(examples: tuple[Example, ...], most: int | None) -> tuple[Example, ...]:
    """At most so many examples, evenly over all: a mixture of files keeps its mixture."""
    if most is None or len(examples) <= most:
        return examples
    return tuple(examples[index * len(examples) // most] for index in range(most))


def fill_caches(assembly: Assembly | Sight, images: Sequence[ImageRef], *, quiet: bool = False) -> None:
    """Encode every picture that is not in the cache yet."""
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not quiet and (time.monotonic() - shown > 10 or done == total):
            shown = time.monotonic()
            print(f"encoding pictures: {done}/{total}", file=sys.stderr, flush=True)

    for cache in assembly.caches:
        cache.fill(images, on_progress=progress)


def model_inputs(assembly: Assembly, rows: Sequence[Row]) -> tuple[object, ...]:
    """What the model's forward takes for a micro-batch: tokens, features, and the instruction where it is read."""
    collate = collate_encoder_decoder if assembly.model.language.is_encoder_decoder else collate_rows
    batch = collate(rows, assembly.prompts.tokenizer.pad_token_id).to(assembly.model.device)
    images = [image for row in rows for image in row.images]
    instructions = [row.branches[0].instruction for row in rows for _ in row.images]
    return (batch, assembly.features(images), *assembly.instruction_tokens(instructions))


@torch.no_grad()
def validate(assembly: Assembly, validation: Step, examples: Sequence[Example], recipe: Recipe) -> dict[str, float]:
    """Loss per supervised token over the validation rows, and for questions the exact match of greedy answers."""
    assembly.model.eval()
    summed = 0.0
    for rows in validation.micro_batches(recipe.train.micro_batch_tokens):
        loss, _ = assembly.model(*model_inputs(assembly, rows))
        summed += loss.item()
    metrics = {"val_loss": summed / validation.supervised}
    asked = [example for example in examples if (example.task or recipe.task) == "vqa"]
    if asked:
        said = answer_examples(assembly, asked, "vqa", decoding=Decoding(max_new_tokens=10))
        metrics["val_exact_match"] = score(said, [example.answers for example in asked])["exact_match"]
    return metrics


def describe_trainable(assembly: Assembly) -> str:
    """One line: what trains, and how much of the whole that is."""
    model = assembly.model
    lora = sum(p.numel() for name, p in trainable(model).items() if name.startswith("language."))
    bridge = sum(p.numel() for p in trainable(model).values()) - lora
    bits = {"nf4": "4-bit NF4", "none": "unquantised"}[assembly.recipe.language.quantize]
    return (
        f"training {bridge / 1e6:.1f} M parameters of bridge and projection and {lora / 1e6:.1f} M of LoRA;"
        f" frozen: the image encoder and the {bits} LLM, computing in {str(model.language.compute_dtype)[6:]}"
    )


def _steps_from(
    position: Position, pictures: list[Picture], train: TrainSection, row_tokens: int, world: int
) -> Iterator[Step]:
    """Steps from where the run stands, epoch after epoch without end."""
    while True:
        yield from _plan(pictures, position.epoch, train, row_tokens, world)[position.offset :]
        position.epoch += 1
        position.offset = 0


def _plan(pictures: list[Picture], epoch: int, train: TrainSection, row_tokens: int, world: int) -> list[Step]:
    return plan_epoch(
        pictures, seed=train.seed, epoch=epoch, batch_size=train.batch_size, row_tokens=row_tokens, world=world
    )


def _some_pictures(pictures: Sequence[Picture], most: int = 256) -> list[ImageRef]:
    """Pictures spread evenly over the training data."""
    images = list(dict.fromkeys(image for picture in pictures for image in picture.images))
    return images[:: max(1, len(images) // most)][:most]


def _packs(assembly: Assembly) -> bool:
    """Whether questions share a picture's sequence: not where the bridge reads each question beside the picture."""
    return assembly.model.language.can_pack and not assembly.reads_instructions


def note_validation(position: Position, metrics: dict[str, float], train: TrainSection) -> bool:
    """Keep the best validation's figures and count towards patience; returns whether this one is the best.

    The loss decides: on some hundred questions exact match moves by several points from chance alone.
    """
    current = -metrics["val_loss"]
    if position.best is None or current > position.best:
        position.best, position.stale, position.metrics = current, 0, metrics
        return True
    position.stale += 1
    position.stopped_early = train.patience is not None and position.stale >= train.patience
    return False


def _align(assembly: Assembly, pictures: Sequence[Picture], train: TrainSection, *, quiet: bool) -> None:
    def tell(step: int, loss: float) -> None:
        if not quiet and (step % 50 == 0 or step == train.align_steps):
            print(f"naming words: step {step}/{train.align_steps} · loss {loss:.3f}", file=sys.stderr, flush=True)

    align_words(assembly, pictures, steps=train.align_steps, seed=train.seed, on_step=tell)
