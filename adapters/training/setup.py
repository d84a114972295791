"""What happens before the first step of either stage: read the data, load the models, encode, take weights over."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from adapters.artefact.artefact import find_artefact
from adapters.artefact.facts import Facts
from adapters.data.examples import (
    DataSet,
    Example,
    merge,
    mix,
    repeat,
    sample_evenly,
    split_by_image,
    split_fold,
    with_stages,
)
from adapters.data.lazy import Picked, places_where
from adapters.data.reading import read_data
from adapters.loading.assembly import Assembly
from adapters.loading.vision_side import VisionSide, check_device, default_device
from adapters.recipe import Recipe, differing_keys, load_recipe
from adapters.recipe_data import Sources, SourceSection
from adapters.training.checkpoint import RunState, find_state, load_state, read_run_state
from adapters.training.controls import OnAnswers
from adapters.training.optimiser import build_optimiser
from adapters.training.run_data import broadcast_from_main, report_terms
from adapters.training.start import Start, start_from_artefact
from qformer.errors import UserError
from qformer.precision import default_compute_dtype

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class RunOptions:
    """How a run is made, whatever its recipe says; as `adapters.finetune.finetune` takes them."""

    out: Path
    resume: bool = False
    start_from: str | None = None
    device: str | None = None
    dtype: str | None = None
    offline: bool = False
    quiet: bool = False
    measured: Mapping[str, float] = field(default_factory=dict)
    on_answers: OnAnswers | None = None


@dataclass(frozen=True)
class Opened:
    """A run whose folder and data are in order; no model is loaded yet.

    Attributes:
        recipe: what to train, and how.
        options: how the run is made.
        accelerator: the processes.
        state: the folder to go on from, or None for a fresh run.
        start_from: the adapter to start from; None for a resumed run, whose state holds what it took over.
        device: where to train.
        train: training data.
        val: validation data.
    """

    recipe: Recipe
    options: RunOptions
    accelerator: Accelerator
    state: Path | None
    start_from: str | None
    device: str
    train: DataSet
    val: DataSet

    @property
    def quiet(self) -> bool:
        """Whether this process prints nothing."""
        return self.options.quiet or not self.accelerator.is_main_process


def _check_finetuning(recipe: Recipe) -> None:
    """Refuse settings that are the first stage's, or that do not go together."""
    train = recipe.train
    _check_hold_out(recipe)
    if train.contrastive_steps:
        raise UserError(
            f"train.contrastive_steps={train.contrastive_steps}: it is the first stage's: run querybridge pretrain"
            " RECIPE --stage 1, or set it to 0"
        )
    if not train.bridge:
        if recipe.language.lora is None:
            raise UserError("train.bridge=false: without language.lora nothing would be trained; set one of them")
        if train.text_side_every:
            raise UserError(
                f"train.text_side_every={train.text_side_every}: it trains the bridge, and train.bridge=false freezes"
                " it; set it to 0"
            )
    if train.self_critical and train.minutes:
        raise UserError(
            f"train.minutes={train.minutes:g} (--budget): steps that sample captions are not timed beforehand; leave it"
            " out, or set train.max_steps"
        )
    if train.self_critical and train.label_smoothing:
        raise UserError(
            f"train.label_smoothing={train.label_smoothing:g}: samples are weighed, not smoothed; set it to 0"
            " beside train.self_critical"
        )


def _check_hold_out(recipe: Recipe) -> None:
    """Refuse more than one way to say which rows are validated on: all but one would have no effect."""
    data = recipe.data
    given = {
        "data.val": data.val is not None,
        "data.fold": data.fold is not None,
        "data.hold_out=false": not data.hold_out,
    }
    named = [name for name, is_given in given.items() if is_given]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} each say what is validated on: leave all but one out")


def _check_pretraining(recipe: Recipe) -> None:
    """Refuse a recipe without a text side, and settings that are for training with an LLM."""
    _check_hold_out(recipe)
    if not recipe.data.hold_out:
        raise UserError("data.hold_out=false: the first stage chooses its weights by validation; leave it out")
    if not recipe.bridge.text_branch or recipe.bridge.start is None:
        raise UserError(
            "the first stage reads captions: set bridge.text_branch=true and bridge.start to a BERT's source"
        )
    if not recipe.train.bridge:
        raise UserError("train.bridge=false: the first stage trains the bridge alone; leave it out")
    for name in ("compile", "label_smoothing", "self_critical", "align_steps", "text_side_every", "minutes"):
        if value := getattr(recipe.train, name):
            raise UserError(
                f"train.{name}={value}: it is for training with an LLM, which the first stage has none of; leave it out"
            )


def open_run(recipe: Recipe, options: RunOptions, *, stage: Literal[1, 2]) -> Opened:
    """Start the processes and read the data; every mistake that needs no model is reported here.

    Args:
        recipe: what to train, and how.
        options: how the run is made.
        stage: BLIP-2's first stage, without an LLM, or its second, which fine-tuning is.

    Raises:
        UserError: recipe, folder, data or device are not in order.
    """
    if stage == 1:
        _check_pretraining(recipe)
    else:
        _check_finetuning(recipe)
    unused = stage == 2 and recipe.bridge.text_branch  # the text side, if the adapter keeps it, is in no answer's loss
    accelerator = Accelerator(
        cpu=(options.device or default_device()) == "cpu",
        device_placement=False,  # the option `device` decides
        mixed_precision="no",  # precision is the LLM's
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    if accelerator.distributed_type not in _DISTRIBUTED:
        kind = str(accelerator.distributed_type.value)
        raise UserError(
            f"accelerate is configured for {kind}, and a run keeps the whole model in each process; launch it with"
            " adapters/accelerate/one_gpu.yaml or two_gpus.yaml"
        )
    state = check_run_folder(options.out, options.resume, recipe)
    train, val = read_split(recipe, offline=options.offline)
    start_from = options.start_from if state is None else None
    if start_from is not None:
        find_artefact(start_from)  # an unknown name is reported before anything is loaded
    device = options.device or str(accelerator.device)
    check_device(device)
    use_device(device, accelerator.num_processes)
    return Opened(recipe, options, accelerator, state, start_from, device, train, val)


def use_device(device: str, processes: int) -> None:
    """Make a GPU that is named by its number the one that random state, memory and kernels mean without a number.

    Raises:
        UserError: several processes would share it.
    """
    chosen = torch.device(device)
    if chosen.type != "cuda" or chosen.index is None:
        return
    if processes > 1:
        raise UserError(
            f"--device {device}: {processes} processes would share one GPU; write --device cuda, and each takes its own"
        )
    torch.cuda.set_device(chosen)


def dtype_of(opened: Opened, *, four_bit: bool) -> str:
    """The dtype of the computation: the option's, else a resumed run's own, else the faster one, measured once."""
    if opened.options.dtype is not None:
        return opened.options.dtype
    if opened.state is not None and (dtype := read_run_state(opened.state).dtype) is not None:
        return dtype
    faster = default_compute_dtype(opened.device, four_bit=four_bit)
    return broadcast_from_main(str(faster).removeprefix("torch."))


def take_over(opened: Opened, target: Assembly | VisionSide) -> Start | None:
    """Take over the weights of the adapter to start from, and say what a fresh run inherits."""
    start = start_from_artefact(target, opened.start_from) if opened.start_from is not None else None
    if opened.quiet:
        return start
    if start is not None:
        print(start, file=sys.stderr)
    if opened.state is None:
        side = target.vision_side if isinstance(target, Assembly) else target
        report_terms(term for term in side.terms if start is None or term not in start.terms)
    return start


def optimiser_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over what is trained, as a recipe sets it."""
    train = recipe.train
    return build_optimiser(
        model,
        learning_rate=train.learning_rate,
        lora_learning_rate=train.lora_learning_rate,
        weight_decay=train.weight_decay,
        betas=train.betas,
        kind=train.optimiser,
    )


def position_of(
    opened: Opened,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    dtype: str,
    terms: Iterable[str],
    start: Start | None,
) -> RunState:
    """Where the run begins: at step 0, or at the step of a resumed run's state, with its weights and generators.

    Raises:
        UserError: the state is of other training or validation data, or damaged.
    """
    rank = opened.accelerator.process_index
    if opened.state is not None:
        position = load_state(opened.state, model, optimiser, rank=rank)
        if position.data != opened.train.fingerprint:
            raise UserError(
                f"{opened.options.out}: the run was trained on other data than {opened.recipe.data.train} is now;"
                " name another --out"
            )
        if position.val and position.val != opened.val.fingerprint:
            named = opened.recipe.data.val or "those held out of the training data"
            raise UserError(
                f"{opened.options.out}: the run was validated on other data than {named} is now, and its best weights"
                " were chosen by them; put the former data back, or name another --out"
            )
        return position
    if rank:  # the same weights on every process, but random draws of its own
        torch.manual_seed(opened.recipe.train.seed + 1000 * rank)
    own = [opened.train.terms] if opened.train.terms else []
    return RunState(
        data=opened.train.fingerprint,
        val=opened.val.fingerprint,
        dtype=dtype,
        terms=[*own, *terms, *(start.terms if start is not None else ())],
        started_from=opened.start_from,
    )


def facts_of(opened: Opened, position: RunState, fingerprints: dict[str, str], counted: dict[str, int]) -> Facts:
    """What the run's artefacts say of it before anything is measured; `counted` says how much data there is."""
    data = opened.train
    return Facts(
        fingerprints=fingerprints,
        data={
            "train": data.name,
            **counted,
            "fingerprint": data.fingerprint,
            "bad rows left out": len(data.skipped),
        },
        terms=tuple(dict.fromkeys(position.terms)),
        started_from=position.started_from,
        compute_dtype=position.dtype,
    )


def held_out_share(rows: int) -> float:
    """The share of the pictures that is held out of so many rows: 5 %, or more to have 100 rows, at most a quarter."""
    return min(0.25, max(0.05, 100 / rows))


def read_split(recipe: Recipe, *, offline: bool = False) -> tuple[DataSet, DataSet]:
    """The training and the validation data of a recipe; without a validation set, whole pictures are held out."""
    data = recipe.data

    def read(sources: Sources, limit: int | None) -> DataSet:
        task = None if recipe.task == "mixed" else recipe.task
        listed = (SourceSection(file=sources, limit=limit),) if isinstance(sources, str) else sources
        options: dict[str, Any] = {
            "skip_bad_rows": data.skip_bad_rows,
            "broken_pictures_too": True,
            "allow_outside": data.allow_outside,
            "offline": offline,
        }
        parts = [
            read_data(
                part.file,
                task=part.task or task,
                limit=part.limit or limit,
                columns=part.columns or data.columns,
                **options,
            )
            for part in listed
        ]
        parts = [with_stages(rows, part.stages) for rows, part in zip(parts, listed, strict=True)]
        shares = [part.share for part in listed if part.share is not None]
        if shares:  # of all, as the recipe has checked
            return merge(mix(parts, shares))
        return merge([repeat(rows, part.repeat) for rows, part in zip(parts, listed, strict=True)])

    train = read(data.train, data.limit)
    if data.terms:
        train = replace(train, terms="; ".join(filter(None, (train.terms, data.terms))))
    if data.val is not None:
        return train, read(data.val, data.val_limit)
    if not data.hold_out:
        return train, replace(train, name=f"{train.name} (val)", examples=(), faults=())
    if data.fold is not None:
        fold, folds = map(int, data.fold.split("/"))
        train, val = split_fold(train, fold, folds)
        return train, replace(val, examples=_once(val))
    share = data.val_fraction or held_out_share(len(train.examples))
    train, val = split_by_image(train, share, seed=0)  # the split does not depend on the run's seed
    return train, replace(val, examples=sample_evenly(_once(val), data.val_limit))


def _once(data: DataSet) -> Sequence[Example]:
    """The rows of a data set that is repeated, each once."""
    return Picked(data.examples, places_where(data.examples, lambda example: example.turn == 0))


def check_run_folder(out: Path, resume: bool, recipe: Recipe) -> Path | None:
    """The state to go on from, or None for a fresh run.

    Raises:
        UserError: there is nothing to resume, another run is in the folder, or it was another recipe's.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: this is a file; name a folder")
    state = find_state(out / "state")
    if resume:
        if state is None:
            raise UserError(f"--resume: {out} holds no run to go on with; leave --resume out, or name the run's folder")
        if differing := differing_keys(load_recipe(out / "recipe.yaml"), recipe):
            raise UserError(
                f"--resume: the recipe differs from the run's in {', '.join(differing[:3])}; give the same recipe and"
                f" --set as before ({out / 'recipe.yaml'}), or name another --out"
            )
        return state
    if state is not None:
        steps = read_run_state(state).step
        raise UserError(
            f"--out {out}: a run of {steps} steps stands there; add --resume to go on, or name another folder"
        )
    return None
