"""What fine-tuning has at its first step, and how it comes to that: load, tokenise, encode, name words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from adapters.artefact.artefact import find_artefact
from adapters.artefact.facts import Facts, read_facts
from adapters.data.batches import Step, leave_out_long, plan_validation
from adapters.data.collate import PackedSequence
from adapters.data.examples import Example, sample_evenly
from adapters.data.tokenised import TokenisedPicture
from adapters.data.views import all_views
from adapters.loading.assembly import Assembly, assemble
from adapters.loading.reader import Reader
from adapters.training.alignment import align_words
from adapters.training.checkpoint import RunState
from adapters.training.controls import fixed_controls
from adapters.training.picture_features import prepare_features
from adapters.training.reader_fit import FittedReader, fit_reader
from adapters.training.run_data import report_copies
from adapters.training.self_critical import SelfCriticalSampler, check_self_critical
from adapters.training.setup import Opened, dtype_of, facts_of, optimiser_of, position_of, take_over
from adapters.training.start import freeze_bridge, has_lora
from adapters.training.start_memory import StartMemory
from adapters.training.text_side import TextSideKeeper, check_keeping
from qformer.compiling import compile_blocks
from qformer.errors import UserError


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning, ready for its first step.

    Attributes:
        opened: folder, data, processes.
        assembly: the models.
        prepared: its model as the processes run it.
        optimiser: over the trainable parameters.
        position: the step the run has reached; it changes as the run goes on.
        facts: what the artefacts say of the run.
        pictures: tokenised training data.
        validation: tokenised validation data.
        row_tokens: the longest row that several questions or pictures share; 0 if each question has its own.
        fitted: the closed-form reader with its left-out scores, if the recipe has one.
        final_reader: the reader of the artefacts, fitted to the held-out pictures too; validation uses `fitted`.
        controls: scores of what the run does not change (`adapters.training.controls.fixed_controls`).
        text_side: keeps the bridge's text side, if the recipe says so.
        sampler: samples captions, if they are trained by CIDEr.
    """

    opened: Opened
    assembly: Assembly
    prepared: nn.Module
    optimiser: torch.optim.Optimizer
    position: RunState
    facts: Facts
    pictures: Sequence[TokenisedPicture]
    validation: Step
    row_tokens: int
    fitted: FittedReader | None
    final_reader: Reader | None
    controls: dict[str, float]
    text_side: TextSideKeeper | None
    sampler: SelfCriticalSampler | None

    def micro_batches(self, share: Step) -> list[tuple[PackedSequence, ...]]:
        """A process's share of a step, cut as the recipe says."""
        return share.micro_batches(self.opened.recipe.train.micro_batch_tokens, self.row_tokens)


def set_up_finetuning(opened: Opened) -> FineTuning:
    """Prepare `adapters.finetune.finetune`.

    Raises:
        UserError: data, recipe or weights are not in order.
    """
    recipe, train = opened.recipe, opened.recipe.train
    if train.text_side_every:
        check_keeping(opened.train, text_branch=recipe.bridge.text_branch, processes=opened.accelerator.num_processes)
    if train.self_critical:
        check_self_critical(opened.train, train.self_critical)
        check_self_critical(opened.val, train.self_critical, what="validation data")
    begun = find_artefact(opened.start_from) if opened.start_from is not None else None
    assembly = assemble(
        recipe,
        device=opened.device,
        dtype=dtype_of(opened, four_bit=recipe.language.quantize == "nf4"),
        offline=opened.options.offline,
        lora=begun is None or not has_lora(begun),
    )
    model = assembly.model
    start = take_over(opened, assembly)
    how: Any = {"max_tokens": train.micro_batch_tokens, "stages": recipe.reason.stages}
    if recipe.data.skip_bad_rows:
        train_data, val_data = (
            leave_out_long(data, assembly.prompts, **how) if data.examples else data
            for data in (opened.train, opened.val)
        )
        opened = replace(opened, train=train_data, val=val_data)
    memory = StartMemory(assembly, **how)
    pictures = memory.tokenise(opened.train)
    # questions share a picture's sequence unless the bridge reads each of them beside the picture
    can_share = model.language.can_pack and not assembly.reads_instructions
    row_tokens = min(train.row_tokens, train.micro_batch_tokens) if can_share else 0
    held_out = memory.tokenise(opened.val)
    validation = plan_validation(held_out, row_tokens=row_tokens)
    images = [*opened.train.images, *opened.val.images]
    if recipe.data.views > 1:
        viewed = (row.images[0] for row in opened.train.examples if len(row.images) == 1)
        images = [*all_views(viewed, recipe.data.views), *images]
    prepare_features(opened, assembly.vision_side, list(dict.fromkeys(images)))

    if not opened.quiet and opened.state is None:
        report_copies(opened.train, opened.val)
    model.language.label_smoothing = train.label_smoothing
    begins_fresh = opened.state is None and start is None
    if begins_fresh and (source := assembly.vision_side.start) is not None and source.whole:
        if not opened.quiet:
            print(source.describe(projection=assembly.projection_taken), file=sys.stderr)
    elif begins_fresh:
        seen = list(dict.fromkeys(image for picture in pictures for image in picture.images))
        model.feature_norm.standardise(assembly.features(sample_evenly(seen, 256)))
    # the first stage leaves a fresh projection, and a BLIP-2 that of its own LLM
    fresh = not assembly.projection_taken if begun is None else read_facts(begun).kind != "language"
    if not train.bridge:
        if opened.state is None and fresh:
            raise UserError(
                "train.bridge=false: the bridge would stay as it was drawn; add --start-from ADAPTER, or a bridge.start"
                " that was trained for the recipe's LLM"
            )
        freeze_bridge(assembly)
    if opened.state is None and fresh and train.align_steps and not assembly.reads_instructions:
        _align(opened, assembly, pictures)  # before there is a reader, whose vectors it does not change
    fitted = _fit(opened, assembly, pictures) if recipe.bridge.reader is not None else None
    final_reader = fitted.reader if fitted is not None else None
    if fitted is not None and recipe.data.val is None and recipe.data.fold is None and held_out:
        everything = fit_reader(assembly, [*pictures, *held_out], kind=recipe.bridge.reader or "names")
        final_reader = everything.reader if everything is not None else final_reader
    optimiser = optimiser_of(model, recipe)
    dtype = str(model.language.compute_dtype).removeprefix("torch.")
    position = position_of(opened, model, optimiser, dtype, assembly.vision_side.terms, start)
    if train.compile:
        compile_blocks(model.language.base)
    counted = {
        "answers": sum(len(picture.questions) for picture in pictures),
        "pictures": len({image.digest() for picture in pictures for image in picture.images}),
    }
    text_side = None
    if train.text_side_every:
        text_side = TextSideKeeper(
            assembly,
            opened.train.examples,
            batch_size=train.text_side_batch or train.batch_size,
            captions=train.captions,
            pair_share=train.pair_share,
            views=recipe.data.views,
            seed=train.seed,
        )
    sampler = SelfCriticalSampler(assembly, opened.train, train.self_critical) if train.self_critical else None
    prepared = opened.accelerator.prepare(model)
    asked, sets = _questions(opened), recipe.data.match == "set"
    facts = facts_of(opened, position, assembly.fingerprints, counted)
    return FineTuning(
        opened,
        assembly,
        prepared,
        optimiser,
        position,
        facts,
        pictures,
        validation,
        row_tokens,
        fitted,
        final_reader,
        memory.controls(
            partial(fixed_controls, assembly, pictures, opened.train.examples, asked, sets=sets), sets=sets
        ),
        text_side,
        sampler,
    )


def _fit(opened: Opened, assembly: Assembly, pictures: Sequence[TokenisedPicture]) -> FittedReader | None:
    """Fit the reader and give it to the assembly; data that suit none are trained on without one."""
    fitted = fit_reader(assembly, pictures, kind=opened.recipe.bridge.reader or "names")
    if fitted is not None:
        assembly.reader = fitted.reader
    if not opened.quiet:
        print(fitted or "no closed-form reader: the answers are too few, or too different to score", file=sys.stderr)
    return fitted


def _questions(opened: Opened) -> list[Example]:
    return [example for example in opened.val.examples if (example.task or opened.recipe.task) == "vqa"]


def _align(opened: Opened, assembly: Assembly, pictures: Sequence[TokenisedPicture]) -> None:
    """Let the bridge learn to name the answers' words, and report the loss."""
    train = opened.recipe.train

    def report(step: int, loss: float) -> None:
        if not opened.quiet and (step % 50 == 0 or step == train.align_steps):
            print(f"naming words: step {step}/{train.align_steps} · loss {loss:.3f}", file=sys.stderr, flush=True)

    align_words(assembly, pictures, steps=train.align_steps, seed=train.seed, on_step=report)
