"""Make dialogues over easy-VQA's pictures in which the second turn cannot be answered without the first.

    .venv/bin/python scripts/make_dialogues.py --out data/dialogues

It writes `train.jsonl` and `test.jsonl`, and the same with each turn alone, without history: `train_alone.jsonl` and
`test_alone.jsonl`. To measure what the history is worth, train on each and score turn by turn (`by_kind`):

    querybridge finetune data/dialogues/train.jsonl --out runs/with_history
    querybridge evaluate data/dialogues/test.jsonl --adapter runs/with_history --json
    querybridge finetune data/dialogues/train_alone.jsonl --out runs/without_history
    querybridge evaluate data/dialogues/test_alone.jsonl --adapter runs/without_history --json

Two kinds, half of the dialogues each, drawn by a seed:

- "what shape is it?" or "what color is it?", then "and the other one?": the colour or the shape, as was not asked;
- "is it a red circle?", then "what was wrong?": nothing, the color, the shape or both.

Who does not know the first turn is right at most half the time on the first kind and a quarter on the second.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapters.data.examples import Example
from adapters.data.readers import read_data

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def things_in(examples: Iterable[Example]) -> dict[Path, tuple[str, str]]:
    """Shape and colour of the thing in each picture, as far as its questions and answers say both."""
    known: dict[Path, dict[str, str]] = {}
    for example in examples:
        (image,) = example.images
        assert image.path is not None
        words = re.findall(r"[a-z]+", example.question)
        told = [word for word in words if word in SHAPES + COLORS]
        if words[0] != "what" and (example.answer == "yes") == bool({"no", "not"} & set(words)):
            continue  # it says what is not there
        if words[0] == "what":
            told.append(example.answer)
        facts = known.setdefault(image.path, {})
        facts |= {"shape" if word in SHAPES else "color": word for word in told}
    return {path: (one["shape"], one["color"]) for path, one in known.items() if len(one) == 2}


def dialogue(shape: str, color: str, rng: random.Random) -> list[tuple[str, str]]:
    """Two questions with their answers about a thing."""
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            return [("what shape is it?", shape), ("and the other one?", color)]
        return [("what color is it?", color), ("and the other one?", shape)]
    wrong = rng.choice(("nothing", "the color", "the shape", "both"))
    said_shape = rng.choice([one for one in SHAPES if one != shape]) if wrong in ("the shape", "both") else shape
    said_color = rng.choice([one for one in COLORS if one != color]) if wrong in ("the color", "both") else color
    first = (f"is it a {said_color} {said_shape}?", "yes" if wrong == "nothing" else "no")
    return [first, ("what was wrong?", wrong)]


def write_dialogues(out: Path, part: str, things: Mapping[Path, tuple[str, str]], *, each: int, seed: int) -> int:
    """Write the dialogues of a part, with and without history; returns how many there are.

    Args:
        out: the folder.
        part: "train" or "test".
        things: shape and colour by picture.
        each: dialogues about a picture.
        seed: of the draw.
    """
    rng = random.Random(f"{seed}:{part}")
    whole, alone = [], []
    for path, thing in things.items():
        for _ in range(each):
            turns = dialogue(*thing, rng)
            messages = []
            for number, (asked, answered) in enumerate(turns, start=1):
                mark = "<image>" if number == 1 else ""
                messages += [{"role": "user", "content": mark + asked}, {"role": "assistant", "content": answered}]
                row = {"image": str(path), "question": asked, "answer": answered, "kind": f"turn {number}"}
                alone.append(row)
            whole.append({"messages": messages, "images": [str(path)]})
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in ((part, whole), (f"{part}_alone", alone)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(whole)


def main() -> None:
    """Write the dialogues of both parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/dialogues"), help="the folder to write to")
    parser.add_argument("--each", type=int, default=2, help="dialogues about a picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for part in ("train", "test"):
        things = things_in(read_data(f"easy-vqa:{part}").examples)
        count = write_dialogues(options.out, part, things, each=options.each, seed=options.seed)
        print(f"{options.out / part}.jsonl: {count} dialogues about {len(things)} pictures")


if __name__ == "__main__":
    main()
