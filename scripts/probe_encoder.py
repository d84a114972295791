"""How much of a drawn scene each layer of a frozen image encoder shows: which of the coloured shapes are there.

    .venv/bin/python scripts/probe_encoder.py pypi:efficientnet-lite2 --layers=-1,-2,-3,-4

A probe of two layers looks at each patch alone, and a coloured shape counts as seen if any patch shows it. Printed
is its F1 over the pairs of colour and shape, on scenes that it was not trained on. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.data.scenes.drawing import Scene

HIDDEN = 256
EPOCHS = 60
BATCH = 32


def main() -> int:
    """Read the flags, probe one layer after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="the encoder: pypi:NAME, a folder, or a hub id")
    parser.add_argument("--layers", default="-1,-2", help="hidden states, with commas between them (default -1,-2)")
    parser.add_argument("--train", type=int, default=600, help="scenes that the probe learns from (default 600)")
    parser.add_argument("--test", type=int, default=200, help="scenes that it is scored on (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and probe (default 0)")
    options = parser.parse_args()
    try:
        layers = [int(layer) for layer in options.layers.split(",")]
    except ValueError:
        parser.error(f"--layers {options.layers}: write whole numbers with commas between them")
    if options.train < 1 or options.test < 1:
        parser.error("--train and --test: at least one scene each")
    import torch

    from adapters.data.scenes.drawing import make_scenes
    from qformer.errors import UserError

    scenes = make_scenes(options.train + options.test, options.seed)
    shown = things_in(scenes)
    for layer in layers:
        try:
            features = encode(options.source, layer, scenes)
        except UserError as error:
            print(f"probe_encoder: {error}", file=sys.stderr)
            return 2
        torch.manual_seed(options.seed)
        learned, other = features[: options.train], features[options.train :]
        found = probe(learned, shown[: options.train], other) > 0
        right = shown[options.train :] > 0
        f1 = 2 * (found & right).sum() / (found.sum() + right.sum()).clamp(min=1)
        print(f"layer {layer}: {features.shape[1]} patches of {features.shape[2]}, F1 {f1:.3f}", flush=True)
    return 0


def encode(source: str, layer: int, scenes: list[Scene]) -> Tensor:
    """Features [N, P, D] of drawn scenes, standardised over all of them."""
    import torch

    from adapters.data.scenes.drawing import draw_scene
    from qformer.vision_loading import load_image_encoder

    encoder = load_image_encoder(source, layer=layer, class_token=False)
    parts = []
    for start in range(0, len(scenes), BATCH):
        pixels = encoder.preprocess([draw_scene(scene) for scene in scenes[start : start + BATCH]])
        with torch.no_grad():
            parts.append(encoder(pixels).float())
    features = torch.cat(parts)
    return (features - features.mean((0, 1))) / (features.std((0, 1)) + 1e-5)


def things_in(scenes: list[Scene]) -> Tensor:
    """[N, 35]: 1 if a scene holds a shape of that colour."""
    import torch

    from adapters.data.scenes.drawing import COLOURS, SHAPES

    pairs = {pair: column for column, pair in enumerate(product(COLOURS, SHAPES))}
    shown = torch.zeros(len(scenes), len(pairs))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            shown[row, pairs[thing.colour, thing.shape]] = 1.0
    return shown


def probe(features: Tensor, shown: Tensor, others: Tensor) -> Tensor:
    """Train on `features` [N, P, D] and what is shown there [N, K]; log-odds [M, K] of other pictures' features."""
    import torch
    from torch import nn

    patches, width = features.shape[1:]
    layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, shown.shape[1]))
    steps = max(1, EPOCHS * len(features) // BATCH)
    optimiser = torch.optim.AdamW(layers.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)

    def log_odds(some: Tensor) -> Tensor:
        return layers(some).logsumexp(dim=1) - torch.tensor(float(patches)).log()  # any patch may show it

    for _ in range(steps):
        rows = torch.randint(len(features), (BATCH,))
        loss = nn.functional.binary_cross_entropy_with_logits(log_odds(features[rows]), shown[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return torch.cat([log_odds(some) for some in others.split(BATCH)])


if __name__ == "__main__":
    sys.exit(main())
