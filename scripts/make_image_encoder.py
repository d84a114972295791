"""Train the last blocks of EfficientNet-Lite2 contrastively on pictures with captions; leaves a small difference.

.venv/bin/python scripts/make_image_encoder.py captions_train.jsonl captions_val.jsonl --out my_tower
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="a file of captions to learn from")
    parser.add_argument("val", help="a file of captions to choose the epoch by")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the difference")
    parser.add_argument(
        "--source", default="pypi:efficientnet-lite2", help="an EfficientNet-Lite (default %(default)s)"
    )
    parser.add_argument(
        "--start", type=int, default=5, help="last hidden state that stays published (default %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=12, help="passes over the pictures (default %(default)s)")
    parser.add_argument(
        "--views",
        type=int,
        default=5,
        help="of each picture: itself, and parts of it, mirrored and not (default %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=5e-4,
        help="of the heads; the blocks learn at a fifth (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--terms", help="what the pictures may be used for; kept with the difference")
    parser.add_argument("--offline", action="store_true", help="take frozen weights from the cache only")
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    from adapters.training.contrastive_tower import train_tower

    best = train_tower(
        options.train,
        options.val,
        options.out,
        source=options.source,
        start=options.start,
        epochs=options.epochs,
        views=options.views,
        learning_rate=options.learning_rate,
        seed=options.seed,
        terms=options.terms,
        offline=options.offline,
    )
    print(json.dumps(best, indent=2))
    return 0


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"make_image_encoder: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
