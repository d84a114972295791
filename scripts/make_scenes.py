"""Make a data set of drawn scenes: pictures of coloured shapes, and questions with the steps to their answers.

    .venv/bin/python scripts/make_scenes.py data/scenes
    .venv/bin/python scripts/make_scenes.py data/few_scenes --train 20 --val 5 --test 5

It needs no network and no model. Printed at the end: how many questions there are, and what language alone could score.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Read the flags, write the folder, say what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--train", type=int, default=6000, help="scenes to train on (default 6000)")
    parser.add_argument("--val", type=int, default=200, help="scenes to choose a model by (default 200)")
    parser.add_argument("--test", type=int, default=300, help="scenes to report scores of (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other scenes (default 0)")
    options = parser.parse_args()
    from adapters.data.scenes.files import write_scenes
    from adapters.evaluation.rationales import language_control
    from qformer.errors import UserError

    try:
        questions = write_scenes(
            options.out, train=options.train, val=options.val, test=options.test, seed=options.seed
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for part, asked in questions.items():
        print(f"{options.out / part}.jsonl: {getattr(options, part)} scenes, {len(asked)} questions")
    control = language_control(questions["test"], questions["train"])["accuracy"]
    print(f"test, each question answered as it mostly is in training: {control:.3f} right without the picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
