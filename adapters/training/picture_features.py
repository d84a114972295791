"""Where a run's features come from: kept on disk, or encoded each time they are needed; said with both costs."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters.data.duplicates import look_at
from adapters.data.examples import sample_evenly
from adapters.data.image_ref import ImageRef
from adapters.features.cache import FeatureCache
from adapters.features.files import size_on_disk
from adapters.features.on_demand import FeaturesOnDemand
from adapters.features.reading import FeaturesReadAhead
from adapters.loading.vision_side import VisionSide
from adapters.training.run_data import broadcast_from_main, fill_caches
from adapters.training.setup import Opened
from adapters.training.timing import in_words
from qformer.errors import UserError


@dataclass(frozen=True)
class Choice:
    """Whether features are kept, and what is said of it; "" if they are all there."""

    kept: bool
    said: str


def prepare_features(opened: Opened, side: VisionSide, images: Sequence[ImageRef]) -> None:
    """Encode a run's pictures and keep their features; or, if they do not fit or the recipe says so, see to it that
    each can be encoded when it is needed.

    Args:
        opened: the run.
        side: whose features are set up.
        images: all pictures of the run in all their views.

    Raises:
        UserError: a picture cannot be read, or the disk is full.
    """
    accelerator = opened.accelerator
    refs = list({ref.digest(): ref for ref in images}.values())
    choice = Choice(kept=True, said="")
    if accelerator.is_main_process and refs:
        choice = choose(side.caches, refs, keep=opened.recipe.data.cache)
    choice = broadcast_from_main(choice)
    if choice.said and not opened.quiet:
        print(choice.said, file=sys.stderr, flush=True)
    if not choice.kept:
        if accelerator.is_main_process:
            _check_readable(refs, quiet=opened.quiet)
        accelerator.wait_for_everyone()
        side.sources = [FeaturesOnDemand(cache) for cache in side.caches]
        return
    if choice.said:  # something is missing
        place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        fill_caches(side.caches, refs, **place, quiet=opened.quiet)
        accelerator.wait_for_everyone()
    for cache in side.caches:
        cache.hold(refs)
    pinned = torch.device(opened.device).type == "cuda"
    side.sources = [FeaturesReadAhead(cache, pinned=pinned) for cache in side.caches]


def choose(caches: Sequence[FeatureCache], refs: Sequence[ImageRef], *, keep: bool) -> Choice:
    """Keep features if the recipe says so and they fit the cache's bound and the disk; a few pictures tell the costs.

    Args:
        caches: one a tower, of one root.
        refs: distinct pictures, at least one.
        keep: as `data.cache` has it.
    """
    missing = [cache.missing(refs) if keep else list(refs) for cache in caches]
    if keep and not any(missing):
        return Choice(kept=True, said="")
    needed = to_write = 0
    now = epoch = 0.0
    for cache, lacking in zip(caches, missing, strict=True):
        of_one, seconds = _costs(cache, lacking or refs)
        needed += of_one * len(refs)
        to_write += of_one * len(lacking)
        now += seconds * len(lacking)
        epoch += seconds * len(refs)
    bound, folder = caches[0].max_bytes, caches[0].root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    many = f"{len(refs):,} pictures"
    if keep and needed <= bound and to_write <= free:
        return Choice(
            kept=True,
            said=f"{many}: features are kept on disk, {_gib(needed)} of at most {_gib(bound)}; encoding those that are"
            f" missing takes about {in_words(now)}, where data.cache=off would take {in_words(epoch)} an epoch",
        )
    kept_would = f"kept on disk their features would take {_gib(needed)} and be encoded once"
    if not keep:
        why = f"data.cache=off; {kept_would}"
    elif needed > bound:
        why = f"{kept_would}, but the cache is held to {_gib(bound)} (QUERYBRIDGE_FEATURES_GIB)"
    else:
        why = f"{kept_would}, but {folder} has {_gib(free)} free (QUERYBRIDGE_CACHE names another folder)"
    return Choice(
        kept=False, said=f"{many}: encoded as they are needed, which takes about {in_words(epoch)} an epoch; {why}"
    )


def _costs(cache: FeatureCache, refs: Sequence[ImageRef]) -> tuple[int, float]:
    """Bytes of a picture's features on disk, and seconds to decode and encode it."""
    source = FeaturesOnDemand(cache)
    began = time.perf_counter()
    features = source.load(refs[:1])
    seconds = time.perf_counter() - began
    if seconds < 1.0:  # else the first is slow because it is slow, not because it is the first
        sample = sample_evenly(refs, max(4, cache.together))
        began = time.perf_counter()
        source.load(sample)
        seconds = (time.perf_counter() - began) / len(sample)
    return size_on_disk(features[0].numpy()), seconds


def _check_readable(refs: Sequence[ImageRef], *, quiet: bool) -> None:
    """A picture that cannot be decoded is told now, not after hours; what earlier runs decoded is not read again."""
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not quiet and time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"opening pictures: {done}/{total}", file=sys.stderr, flush=True)

    plain = {ref.content_digest(): ref for ref in refs}
    if unreadable := look_at(plain, progress):
        more = f"; and {len(unreadable) - 1} more pictures" if len(unreadable) > 1 else ""
        raise UserError(unreadable[0] + more)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
