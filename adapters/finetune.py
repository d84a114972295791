"""Fine-tuning: the bridge, the projection and LoRA learn to answer about a domain's pictures.

The loop is `_finetune`, from top to bottom: load, tokenise, encode, train with validations between, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from adapters.data.batches import Step, plan_epoch
from adapters.data.collate import PackedSequence, collate_encoder_decoder, collate_packed, pairs_of
from adapters.data.examples import Example
from adapters.inference.reasoning import validate_reasons
from adapters.loading.assembly import Assembly
from adapters.recipe import Recipe
from adapters.training.checkpoint import RunState, trainable
from adapters.training.controls import OnAnswers, ValidationAnswers, validate_answers
from adapters.training.finetuning_setup import FineTuning, set_up_finetuning
from adapters.training.interrupt import interruptible
from adapters.training.keeping import RunKeeper
from adapters.training.optimiser import Schedule
from adapters.training.reader_fit import FittedReader
from adapters.training.reporting import Reporter
from adapters.training.run_data import Result, broadcast_from_main, report_skipped, steps_between_validations
from adapters.training.run_folder import check_finite, one_run_at_a_time
from adapters.training.run_report import RunReport
from adapters.training.self_critical import greedy_cider
from adapters.training.setup import RunOptions, open_run
from adapters.training.sharing import own_part, summed
from adapters.training.timing import in_words, measure_step, steps_within

AHEAD = 2  # micro-batches whose features are prepared while one is computed
LOSS_SHARE = 0.5  # of exact match, for a nat of loss: on 100 questions exact match has a standard error of 4 points


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
    measured: Mapping[str, float] | None = None,
    on_answers: OnAnswers | None = None,
) -> Result:
    """Train an adapter by a recipe.

    Args:
        recipe: what to train, and how.
        out: the run's folder: recipe, metrics, loss curve, `best` and `last` artefacts, report.html, resume state.
        resume: go on from the run in `out`; equal to a run that was never stopped.
        start_from: an adapter to start from instead of fresh weights; its terms are inherited.
        device: where to train; a GPU if there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        quiet: print nothing.
        measured: what the artefact says of a run that holds nothing out (data.hold_out=false).
        on_answers: called at each validation with its questions and the answers to them.

    Raises:
        UserError: data, recipe or weights are not in order; the loss is not a number; the disk is full; another run
            writes to `out`.
    """
    options = RunOptions(Path(out), resume, start_from, device, dtype, offline, quiet, measured or {}, on_answers)
    with one_run_at_a_time(options.out):
        return _finetune(recipe, options)


def _finetune(recipe: Recipe, options: RunOptions) -> Result:
    began = time.monotonic()
    run = set_up_finetuning(open_run(recipe, options, stage=2))
    train, position, assembly, optimiser = recipe.train, run.position, run.assembly, run.optimiser
    accelerator, model = run.opened.accelerator, assembly.model
    draw = partial(
        plan_epoch,
        run.pictures,
        seed=train.seed,
        batch_size=train.batch_size,
        row_tokens=run.row_tokens,
        views=recipe.data.views,
        world=accelerator.num_processes,
    )
    plan = lru_cache(maxsize=1)(lambda epoch: draw(epoch=epoch))  # of many rows it takes a while
    total = position.total or train.max_steps or max(1, round(train.epochs * len(plan(0))))
    seconds = None
    if position.step == 0 and run.sampler is None and (train.minutes is not None or not options.quiet):
        first = plan(0)[0].share(accelerator.process_index, accelerator.num_processes)
        inputs = partial(model_inputs, assembly, fitted=run.fitted, row_tokens=run.row_tokens)
        seconds = broadcast_from_main(measure_step(model, run.micro_batches(first), inputs))
        if train.minutes is not None:
            spent = broadcast_from_main(time.monotonic() - began)
            total = min(total, steps_within(train.minutes, elapsed=spent, step=seconds))
    position.total = total
    every = train.validate_every or steps_between_validations(total)
    schedule = Schedule(total, train.warmup_steps, train.min_learning_rate)
    keeper = RunKeeper(run.opened, assembly, model, optimiser, position, run.facts, run.final_reader)
    page = RunReport(run.opened, assembly)
    folder = options.out if accelerator.is_main_process else None
    with (
        Reporter(
            folder, total, device=torch.device(run.opened.device), start=position.step, quiet=run.opened.quiet
        ) as report,
        interruptible() as stop,
    ):
        report.say(describe_trainable(assembly))
        if seconds is not None:
            report.say(f"{total} steps of {seconds:.1f} s: about {in_words(total * seconds)}, and validations")
        if shortened := schedule.shortened():
            report.say(shortened)
        report_skipped(report, run.opened.train, run.opened.val)
        if position.step == 0 and run.validation.rows:  # a broken evaluation fails now, not after an hour
            first_two = Step(run.validation.rows[:2])
            validate(assembly, first_two, run.opened.val.examples[:2], recipe, row_tokens=run.row_tokens)
        losses: list[float] = []
        recent: list[float] = []  # since the last validation
        rewards: list[float] = []
        text_side: list[Tensor] = []
        timer = time.monotonic()
        samples = 0
        for step in _steps_from(position, plan):
            pressed = accelerator.reduce(torch.tensor(len(stop), device=accelerator.device))
            if position.step >= total or position.stopped_early or pressed:
                break
            model.train()
            rate = schedule.share(position.step)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rate
            loss = torch.zeros((), device=accelerator.device)
            share, supervised = step.share(accelerator.process_index, accelerator.num_processes), step.supervised
            if run.sampler is not None:
                share, reward = run.sampler.rewrite(share)
                rewards.append(float(accelerator.reduce(torch.tensor(reward, device=accelerator.device), "mean")))
                supervised = int(accelerator.reduce(torch.tensor(share.supervised, device=accelerator.device)))
            batches = run.micro_batches(share)
            later = [] if run.sampler is not None else _first_batches(plan(position.epoch), position.offset + 1, run)
            for index, rows in enumerate(batches):
                for coming in [*batches[index + 1 :], *later][:AHEAD]:
                    assembly.vision_side.expect([image for row in coming for image in row.images])
                last = index == len(batches) - 1
                with nullcontext() if last else accelerator.no_sync(run.prepared):
                    summed, _ = run.prepared(*model_inputs(assembly, rows, run.fitted, run.row_tokens))
                    # each token of the step weighs the same, whatever micro-batch or process it is in
                    part = summed / supervised
                    accelerator.backward(part * accelerator.num_processes)
                loss += part.detach()
            if run.text_side is not None and position.step % train.text_side_every == 0:
                kept = run.text_side.losses(position.step)
                accelerator.backward(kept.total)
                means = torch.stack([kept.contrastive, kept.matching, kept.generation]).detach()
                text_side.append(accelerator.reduce(means, "mean").cpu())
            step_loss = float(accelerator.reduce(loss))  # the one time a step that the device is waited for
            check_finite(step_loss, position.step + 1, train.learning_rate)
            norm = float(accelerator.clip_grad_norm_(list(trainable(model).values()), train.clip_norm))
            check_finite(norm, position.step + 1, train.learning_rate, what="the gradient's norm")
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if model.heads is not None:
                model.heads.clamp_temperature()
            position.step += 1
            position.offset += 1
            losses.append(step_loss)
            recent.append(step_loss)
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
            if position.step % every == 0 or position.step == total:
                metrics = {"train_loss": sum(recent) / len(recent)}
                if run.validation.rows:

                    def report_answers(asked: Sequence[Example], texts: Sequence[str]) -> None:
                        report.samples(position.step, asked, texts, sets=recipe.data.match == "set")
                        if options.on_answers is not None:
                            options.on_answers(asked, texts)

                    metrics |= validate(
                        assembly,
                        run.validation,
                        run.opened.val.examples,
                        recipe,
                        report_answers,
                        page.take,
                        row_tokens=run.row_tokens,
                    )
                    keeper.validated(report, metrics | run.controls, selection_score(metrics))
                    page.validated(position)
                else:  # nothing chooses: the newest weights are the best
                    keeper.validated(report, {**metrics, **options.measured}, float(position.step))
                recent, samples, timer = [], 0, time.monotonic()
        result = keeper.result(report, total)
        if result.finished and accelerator.is_main_process and (written := page.write(position, run.controls)):
            report.say(f"how it answers the validation rows, with pictures: {written}")
        return result


def selection_score(metrics: dict[str, float]) -> float:
    """What weights are chosen by, higher is better: CIDEr if captions are trained by it, else score and loss together.

    Exact match on a hundred questions moves in steps and by chance, the loss is smooth, but grows with how sure a wrong
    answer is: each corrects the other.
    """
    if "val_CIDEr" in metrics:
        return metrics["val_CIDEr"]
    return metrics.get("val_exact_match", 0.0) - LOSS_SHARE * metrics["val_loss"]


def _named_means(text_side: Sequence[Tensor]) -> dict[str, float]:
    """The means of the first stage's objectives, [3] for each step that had them."""
    if not text_side:
        return {}
    return dict(zip(("text_itc", "text_itm", "text_itg"), torch.stack(list(text_side)).mean(0).tolist(), strict=True))


def model_inputs(
    assembly: Assembly, rows: Sequence[PackedSequence], fitted: FittedReader | None = None, row_tokens: int = 0
) -> tuple[object, ...]:
    """What the model's forward takes for a micro-batch: tokens, features, and what the bridge is given beside them.

    Args:
        assembly: the models.
        rows: the micro-batch.
        fitted: left-out scores of training pairs, in place of the reader's own, which know these pairs by heart.
        row_tokens: the longest row of the batch that several sequences share.
    """
    pad_id = assembly.prompts.tokenizer.pad_token_id
    if assembly.model.language.is_encoder_decoder:
        batch = collate_encoder_decoder(rows, pad_id)
    else:
        batch = collate_packed(rows, pad_id, row_tokens=row_tokens)
    batch = batch.to(assembly.model.device)
    images = [image for row in rows for image in row.images]
    instructions = [row.packed_answers[0].instruction for row in rows for _ in row.images]
    features = assembly.features(images)
    left_out = fitted.left_out if fitted is not None else None
    answers = None
    if (reader := assembly.answer_reader) is not None:
        numbers = dict(zip((image.digest() for image in images), reader.look(features), strict=True))
        answers = assembly.read_answers(pairs_of(rows), numbers, left_out)
    return (batch, features, *assembly.beside_features(images, features, instructions, left_out), answers)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # blocks compiled for training run here as they are: few steps, many shapes
def validate(
    assembly: Assembly,
    validation: Step,
    examples: Sequence[Example],
    recipe: Recipe,
    on_answers: OnAnswers | None = None,
    keep: Callable[[ValidationAnswers], None] | None = None,
    *,
    row_tokens: int = 0,
) -> dict[str, float]:
    """Loss per supervised token over the validation rows, and the score of each task that the rows have.

    Questions have what `validate_answers` gives, rows with reasons the scores of `validate_reasons`, and captions
    that are trained by CIDEr have CIDEr.
    """
    assembly.model.eval()
    total = torch.zeros((), device=assembly.model.device)
    batches = Step(tuple(own_part(validation.rows))).micro_batches(recipe.train.micro_batch_tokens, row_tokens)
    for index, rows in enumerate(batches):
        for coming in batches[index + 1 : index + 1 + AHEAD]:
            assembly.vision_side.expect([image for row in coming for image in row.images])
        loss, _ = assembly.model(*model_inputs(assembly, rows, row_tokens=row_tokens))
        total += loss
    metrics = {"val_loss": summed(float(total)) / validation.supervised}
    if asked := [example for example in examples if (example.task or recipe.task) == "vqa"]:
        metrics |= validate_answers(assembly, asked, on_answers, sets=recipe.data.match == "set", keep=keep)
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
    bits = {"nf4": "4-bit NF4", "int8": "8-bit LLM.int8", "none": "unquantised"}[assembly.recipe.language.quantize]
    return (
        f"training {bridge / 1e6:.1f} M parameters of bridge and projection and {lora / 1e6:.1f} M of LoRA;"
        f" frozen: the image encoder and the {bits} LLM, computing in {str(model.language.compute_dtype)[6:]}"
    )


def _first_batches(steps: Sequence[Step], place: int, run: FineTuning) -> list[tuple[PackedSequence, ...]]:
    """The micro-batches that this process begins the step at a place with; none after the epoch's last step."""
    accelerator = run.opened.accelerator
    if place >= len(steps):
        return []
    share = steps[place].share(accelerator.process_index, accelerator.num_processes)
    return run.micro_batches(share)[:AHEAD]


def _steps_from(position: RunState, plan: Callable[[int], Sequence[Step]]) -> Iterator[Step]:
    """Steps from the run's place on, epoch after epoch without end."""
    while True:
        yield from plan(position.epoch)[position.offset :]
        position.epoch += 1
        position.offset = 0
