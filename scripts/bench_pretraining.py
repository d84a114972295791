"""Measure the first stage: samples a second with cached features, and its share of the machine's matrix-multiply peak.

    .venv/bin/python scripts/bench_pretraining.py photo_stage1 --set data.train=captions_train.jsonl

Operations are counted by torch over one whole step, forward and backward; the peak is that of a plain product of two
2048 × 2048 matrices, measured between the steps. Medians. Where the recipe begins with ITC alone, such steps are
measured too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import nullcontext


def main() -> int:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a recipe of the first stage: file or shipped name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's key")
    parser.add_argument("--dtype", help="float32 or bfloat16; left out, what pretrain takes here")
    parser.add_argument("--steps", type=int, default=9, help="steps that count; two more warm up (default %(default)s)")
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from adapters.data.caption_batches import draw_batch, group_captions
    from adapters.loading.assembly import chosen_dtype
    from adapters.loading.vision_side import load_vision_side
    from adapters.recipe import load_recipe
    from adapters.training.optimiser import build_optimiser
    from adapters.training.run_data import fill_caches
    from adapters.training.setup import read_split
    from adapters.training.text_side import model_inputs
    from qformer.precision import default_compute_dtype

    dtype = chosen_dtype(options.dtype) or default_compute_dtype("cpu", four_bit=False)
    recipe = load_recipe(options.recipe, options.set)
    train = recipe.train
    vision_side = load_vision_side(recipe)
    rng = random.Random(0)
    pictures = group_captions(read_split(recipe)[0].examples)
    batches = [
        draw_batch(rng.sample(pictures, train.batch_size), train.captions, rng) for _ in range(options.steps + 2)
    ]
    fill_caches(vision_side.caches, [picture.image for batch in batches for picture, _ in batch])
    model = vision_side.representation(dtype).train()
    optimiser = build_optimiser(model, learning_rate=train.learning_rate)
    square = torch.randn(2048, 2048, dtype=dtype)

    def measure(paired: int) -> dict[str, float]:
        seconds, peaks, counter = [], [], FlopCounterMode(display=False)
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            _ = square @ square
            peaks.append(2 * 2048**3 / (time.perf_counter() - began))
            began = time.perf_counter()
            with counter if number == 0 else nullcontext():
                model(*model_inputs(vision_side, batch), paired=paired).total.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
        step, peak = statistics.median(seconds[2:]), statistics.median(peaks[2:])
        samples, operations = train.batch_size * train.captions, counter.get_total_flops()
        found = {
            "seconds_a_step": step,
            "samples_per_second": samples / step,
            "gflop_a_sample": operations / samples / 1e9,
            "gflop_per_second": operations / step / 1e9,
            "peak_gflop_per_second": peak / 1e9,
            "share_of_peak": operations / step / peak,
        }
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    settings = {"recipe": recipe.description, "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
    kinds = {"ITC alone": 0} if train.contrastive_steps else {}
    kinds["ITC, ITM and ITG"] = max(1, round(train.pair_share * train.batch_size))
    print(json.dumps(settings | {kind: measure(paired) for kind, paired in kinds.items()}, indent=2))
    return 0


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"bench_pretraining: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
