"""What the first stage has at its first step, and how it comes to that: group captions, load, encode."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapters.artefact.facts import Facts
from adapters.data.caption_batches import CaptionedPicture, group_captions
from adapters.data.examples import sample_evenly
from adapters.data.views import all_views
from adapters.loading.assembly import chosen_dtype
from adapters.loading.vision_side import VisionSide, load_vision_side
from adapters.training.checkpoint import RunState
from adapters.training.picture_features import prepare_features
from adapters.training.setup import Opened, dtype_of, facts_of, optimiser_of, position_of, take_over
from qformer.errors import UserError
from qformer.representation import RepresentationModel


@dataclass(frozen=True)
class Pretraining:
    """The first stage, ready for its first step.

    Attributes:
        opened, optimiser, position, facts: as `FineTuning` has them.
        vision_side: the models.
        model: the first stage's model over them.
        prepared: the same as the processes run it.
        pictures: training pictures with their English captions.
        held_out: validation pictures with theirs.
        compute_dtype: of the bridge's computation.
    """

    opened: Opened
    vision_side: VisionSide
    model: RepresentationModel
    prepared: nn.Module
    optimiser: torch.optim.Optimizer
    position: RunState
    facts: Facts
    pictures: Sequence[CaptionedPicture]
    held_out: Sequence[CaptionedPicture]
    compute_dtype: torch.dtype


def set_up_pretraining(opened: Opened) -> Pretraining:
    """Prepare `adapters.pretrain.pretrain`.

    Raises:
        UserError: data, recipe or weights are not in order.
    """
    recipe = opened.recipe
    pictures, held_out = group_captions(opened.train.examples), group_captions(opened.val.examples)
    if min(recipe.train.batch_size, len(pictures)) < 2 * opened.accelerator.num_processes:
        raise UserError(
            f"telling pictures apart needs two a step and process: {opened.train.name} has {len(pictures)} with English"
            f" captions, train.batch_size is {recipe.train.batch_size}"
        )
    if not held_out:
        raise UserError(f"{opened.val.name} holds no pictures with English captions; name others with --set data.val")
    compute_dtype = chosen_dtype(dtype_of(opened, four_bit=False))
    assert compute_dtype is not None
    vision_side = load_vision_side(recipe, device=opened.device, offline=opened.options.offline)
    images = all_views((picture.image for picture in pictures), recipe.data.views)
    images += [picture.image for picture in held_out]
    prepare_features(opened, vision_side, images)
    start = take_over(opened, vision_side)
    begins_fresh = opened.state is None and start is None
    if begins_fresh and (source := vision_side.start) is not None and source.whole:
        if not opened.quiet:
            print(source.describe(), file=sys.stderr)
    elif begins_fresh:
        seen = [picture.image for picture in sample_evenly(pictures, 256)]
        vision_side.feature_norm.standardise(vision_side.features(seen))
    model = vision_side.representation(compute_dtype)
    optimiser = optimiser_of(model, recipe)
    dtype = str(compute_dtype).removeprefix("torch.")
    position = position_of(opened, model, optimiser, dtype, vision_side.terms, start)
    counted = {"pictures": len(pictures), "captions": sum(len(picture.captions) for picture in pictures)}
    prepared = opened.accelerator.prepare(model)
    facts = facts_of(opened, position, vision_side.fingerprints, counted)
    return Pretraining(
        opened,
        vision_side,
        model,
        prepared,
        optimiser,
        position,
        facts,
        pictures,
        held_out,
        compute_dtype,
    )
