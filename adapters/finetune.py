"""Fine-tuning: the bridge, the projection and LoRA learn to answer about a domain's pictures.

The loop is `finetune`, from top to bottom: load, tokenise, encode, train with validations between, save.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from adapters.artefact.artefact import find_artefact, save_artefact
from adapters.artefact.facts import Facts, read_facts
from adapters.data.batches import Step, TokenisedPicture, plan_epoch, plan_validation, tokenise
from adapters.data.collate import PackedSequence, collate_encoder_decoder, collate_packed
from adapters.data.examples import Example
from adapters.data.views import all_views
from adapters.evaluation.vqa import score
from adapters.inference.answering import answer_examples
from adapters.inference.reasoning import validate_reasons
from adapters.loading.assembly import Assembly, assemble
from adapters.loading.vision_side import check_device, default_device
from adapters.recipe import Recipe, TrainSection
from adapters.training.alignment import align_words
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
from adapters.training.self_critical import SelfCriticalSampler, check_self_critical, greedy_cider
from adapters.training.start import has_lora, start_from_artefact
from adapters.training.text_side import TextSideKeeper, check_keeping
from qformer.compiling import compile_blocks
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.precision import default_compute_dtype


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
        device_placement=False,  # --device says where
        mixed_precision="no",  # precision is the LLM's
        # the text side, where the adapter keeps it, is in no answer's loss
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.bridge.text_branch)],
    )
    main, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    state = check_run_folder(out, resume, recipe)
    train = recipe.train
    if train.contrastive_steps:
        raise UserError(
            f"train.contrastive_steps={train.contrastive_steps}: it is the first stage's: run querybridge pretrain"
            " RECIPE --stage 1, or set it to 0"
        )

    train_data, val_data = read_split(recipe, offline=offline)
    if train.text_side_every:
        check_keeping(recipe, train_data, processes=world)
    if train.self_critical:
        if train.label_smoothing:
            raise UserError(
                f"train.label_smoothing={train.label_smoothing:g}: samples are weighed, not smoothed; set it to 0"
                " beside train.self_critical"
            )
        check_self_critical(train_data, train.self_critical)
        check_self_critical(val_data, train.self_critical, what="validation data")
    starting = start_from if state is None else None  # a resumed run already holds what it started from
    if starting is not None:
        begun = find_artefact(starting)  # a mistake here is told before anything is loaded
    place = device or str(accelerator.device)
    check_device(place)
    if dtype is None and state is not None:
        dtype = read_run_state(state).dtype  # a resumed run keeps its own
    if dtype is None:
        faster = default_compute_dtype(place, four_bit=recipe.language.quantize == "nf4")
        dtype = broadcast_from_main(str(faster).removeprefix("torch."))
    assembly = assemble(
        recipe,
        device=place,
        dtype=dtype,
        offline=offline,
        lora=starting is None or not has_lora(begun),
    )
    position = RunState(
        data=train_data.fingerprint,
        dtype=str(assembly.model.language.compute_dtype).removeprefix("torch."),
        terms=[*([train_data.terms] if train_data.terms else []), *assembly.vision_side.terms],
    )
    if starting is not None:
        position.started_from = starting
        start = start_from_artefact(assembly, starting)
        position.terms += start.terms
        if main and not quiet:
            print(start, file=sys.stderr)
    if state is None and main and not quiet:
        report_terms(term for term in assembly.vision_side.terms if starting is None or term not in start.terms)
    how: Any = {"max_tokens": train.micro_batch_tokens, "stages": recipe.reason.stages}
    pictures = tokenise(train_data, assembly.prompts, **how)
    row_tokens = train.row_tokens if _packs(assembly) else 0
    validation = plan_validation(tokenise(val_data, assembly.prompts, **how), row_tokens=row_tokens)
    images = all_views((row.images[0] for row in train_data.examples if len(row.images) == 1), recipe.data.views)
    images += [image for data in (train_data, val_data) for row in data.examples for image in row.images]
    fill_caches(assembly.caches, images, rank=rank, world=world, quiet=quiet or not main)
    accelerator.wait_for_everyone()
    fill_caches(assembly.caches, images, quiet=True)  # all there by now: the cache learns what must not be evicted

    model = assembly.model
    model.language.label_smoothing = train.label_smoothing
    if state is None and starting is None:
        seen = list(dict.fromkeys(image for picture in pictures for image in picture.images))
        model.feature_norm.standardise(assembly.features(sample_evenly(seen, 256)))
    fresh = starting is None or read_facts(begun).kind != "language"  # the first stage leaves a fresh projection
    if state is None and fresh and train.align_steps and not assembly.reads_instructions:
        _align(assembly, pictures, train, quiet=quiet or not main)
    optimiser = build_optimiser(assembly.model, train)
    if state is not None:
        position = load_state(state, model, optimiser, rank=rank)
        if position.data != train_data.fingerprint:
            raise UserError(
                f"{out}: the run was trained on other data than {recipe.data.train} is now; name another --out"
            )
    elif rank:  # the same weights on every process, but chances of its own
        torch.manual_seed(train.seed + 1000 * rank)
    if train.compile:
        compile_blocks(model.language.base)
    keeper = TextSideKeeper(assembly, train_data.examples) if train.text_side_every else None
    critic = SelfCriticalSampler(assembly, train_data, train.self_critical) if train.self_critical else None
    prepared = accelerator.prepare(model)
    answers = sum(len(picture.questions) for picture in pictures)
    plan = partial(
        plan_epoch,
        pictures,
        seed=train.seed,
        batch_size=train.batch_size,
        row_tokens=row_tokens,
        views=recipe.data.views,
        world=world,
    )
    steps_an_epoch = len(plan(epoch=0))
    total = train.max_steps or max(1, round(train.epochs * steps_an_epoch))
    facts = Facts(
        fingerprints=assembly.fingerprints,
        data={
            "train": train_data.name,
            "answers": answers,
            "pictures": len({image.digest() for picture in pictures for image in picture.images}),
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
        report.say(describe_trainable(assembly))
        report_skipped(report, train_data, val_data)
        if position.step == 0:  # a broken evaluation fails now, not after an hour
            validate(assembly, Step(validation.rows[:2]), val_data.examples[:2], recipe)
        losses: list[float] = []
        rewards: list[float] = []
        text_side: list[Tensor] = []
        timer = time.monotonic()
        samples = 0
        for step in _steps_from(position, plan):
            pressed = accelerator.reduce(torch.tensor(len(stop), device=accelerator.device))
            if position.step >= total or position.stopped_early or pressed:
                break
            model.train()
            rate = learning_rate(position.step, total, train)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            loss = 0.0
            share, supervised = step.share(rank, world), step.supervised
            if critic is not None:
                share, reward = critic.rewrite(share)
                rewards.append(float(accelerator.reduce(torch.tensor(reward, device=accelerator.device), "mean")))
                supervised = int(accelerator.reduce(torch.tensor(share.supervised, device=accelerator.device)))
            batches = share.micro_batches(train.micro_batch_tokens)
            for index, rows in enumerate(batches):
                last = index == len(batches) - 1
                with nullcontext() if last else accelerator.no_sync(prepared):
                    summed, _ = prepared(*model_inputs(assembly, rows))
                    # each token of the step weighs the same, whatever micro-batch or process it is in
                    part = summed / supervised
                    accelerator.backward(part * accelerator.num_processes)
                loss += part.item()
            if keeper is not None and position.step % train.text_side_every == 0:
                kept = keeper.losses(position.step)
                accelerator.backward(kept.total)
                said = torch.stack([kept.contrastive, kept.matching, kept.generation]).detach()
                text_side.append(accelerator.reduce(said, "mean").cpu())
            loss = float(accelerator.reduce(torch.tensor(loss, device=accelerator.device)))
            check_finite(loss, position.step + 1, recipe)
            norm = float(accelerator.clip_grad_norm_(list(trainable(model).values()), train.clip_norm))
            check_finite(norm, position.step + 1, recipe, what="the gradient's norm")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if model.heads is not None:
                model.heads.clamp_temperature()
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
                        **({"reward": sum(rewards) / len(rewards)} if rewards else {}),
                        **_named_means(text_side),
                    },
                )
                losses, rewards, text_side, samples, timer = [], [], [], 0, time.monotonic()
            if position.step % train.validate_every == 0 or position.step == total:
                metrics = validate(assembly, validation, val_data.examples, recipe)
                report.validation(position.step, metrics)
                position.seconds = time.monotonic() - began
                generators = generators_of_all()
                chosen_by = metrics["val_CIDEr"] if critic is not None else -metrics["val_loss"]
                improved = note_validation(position, chosen_by, metrics, train.patience)
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


def _named_means(text_side: Sequence[Tensor]) -> dict[str, float]:
    """The means of the first stage's objectives, [3] for each step that had them."""
    if not text_side:
        return {}
    return dict(zip(("text_itc", "text_itm", "text_itg"), torch.stack(list(text_side)).mean(0).tolist(), strict=True))


def model_inputs(assembly: Assembly, rows: Sequence[PackedSequence]) -> tuple[object, ...]:
    """What the model's forward takes for a micro-batch: tokens, features, and the instruction where it is read."""
    collate = collate_encoder_decoder if assembly.model.language.is_encoder_decoder else collate_packed
    batch = collate(rows, assembly.prompts.tokenizer.pad_token_id).to(assembly.model.device)
    images = [image for row in rows for image in row.images]
    instructions = [row.packed_answers[0].instruction for row in rows for _ in row.images]
    return (batch, assembly.features(images), *assembly.instruction_tokens(instructions))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # blocks compiled for training run here as they are: few steps, many shapes
def validate(assembly: Assembly, validation: Step, examples: Sequence[Example], recipe: Recipe) -> dict[str, float]:
    """Loss per supervised token over the validation rows, and the score of each task that the rows have.

    Questions have the exact match of greedy answers, rows with reasons the scores of `validate_reasons`, and captions
    that are trained by CIDEr have CIDEr.
    """
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
    if recipe.train.self_critical:
        metrics["val_CIDEr"] = greedy_cider(assembly, examples, recipe.task)
    if reasoned := [example for example in examples if (example.task or recipe.task) == "reason"]:
        metrics |= {f"val_{name}": value for name, value in validate_reasons(assembly, reasoned).items()}
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


def _steps_from(position: RunState, plan: Callable[..., list[Step]]) -> Iterator[Step]:
    """Steps from where the run stands, epoch after epoch without end."""
    while True:
        yield from plan(epoch=position.epoch)[position.offset :]
        position.epoch += 1
        position.offset = 0


def _packs(assembly: Assembly) -> bool:
    """Whether questions share a picture's sequence: not where the bridge reads each question beside the picture."""
    return assembly.model.language.can_pack and not assembly.reads_instructions


def _align(assembly: Assembly, pictures: Sequence[TokenisedPicture], train: TrainSection, *, quiet: bool) -> None:
    def tell(step: int, loss: float) -> None:
        if not quiet and (step % 50 == 0 or step == train.align_steps):
            print(f"naming words: step {step}/{train.align_steps} · loss {loss:.3f}", file=sys.stderr, flush=True)

    align_words(assembly, pictures, steps=train.align_steps, seed=train.seed, on_step=tell)
