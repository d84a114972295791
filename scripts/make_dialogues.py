"""Make dialogues about pictures in which the second turn cannot be answered without the first.

    .venv/bin/python scripts/make_dialogues.py --out data/dialogues
    .venv/bin/python scripts/make_dialogues.py --out data/rooms --train daquar/train.jsonl --test daquar/val.jsonl

Without `--train` the pictures are easy-VQA's. It writes `train.jsonl` and `test.jsonl`, and the same with each turn
alone, without history: `train_alone.jsonl` and `test_alone.jsonl`; the pictures go into folders beside them. To measure
what the history is worth, train on each and score turn by turn (`by_kind`):

    querybridge finetune data/dialogues/train.jsonl --out runs/with_history
    querybridge evaluate data/dialogues/test.jsonl --adapter runs/with_history --json
    querybridge finetune data/dialogues/train_alone.jsonl --out runs/without_history
    querybridge evaluate data/dialogues/test_alone.jsonl --adapter runs/without_history --json

Kinds of dialogues, one after the other, drawn by a seed:

- other: "what shape is it?" or "what color is it?", then "and the other one?": what was not asked for;
- wrong: "is it a red circle?", then "what was wrong?": nothing, the color, the shape or both;
- second: "first: is it red? second: what shape is it? answer the first.", then "and the second?".

Who does not know the first turn is right at most half the time on the first kind and a quarter on the second, and on
the third as often as the commonest answer is. A file of questions of your own (`--train`, `--test`) gives the third
kind alone, of two questions with different answers about one picture.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from adapters.data.examples import Example
from adapters.data.reading import read_data
from qformer.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("other", "wrong", "second")
Turns = list[tuple[str, str]]


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


def about_a_thing(kind: str, shape: str, color: str, rng: random.Random) -> Turns:
    """Two questions with their answers about a thing of easy-VQA's."""
    if kind == "other":
        both = [("what shape is it?", shape), ("what color is it?", color)]
        rng.shuffle(both)
        return [both[0], ("and the other one?", both[1][1])]
    if kind == "wrong":
        wrong = rng.choice(("nothing", "the color", "the shape", "both"))
        said_shape = rng.choice([one for one in SHAPES if one != shape]) if wrong in ("the shape", "both") else shape
        said_color = rng.choice([one for one in COLORS if one != color]) if wrong in ("the color", "both") else color
        first = (f"is it a {said_color} {said_shape}?", "yes" if wrong == "nothing" else "no")
        return [first, ("what was wrong?", wrong)]
    named = rng.choice((color, rng.choice(COLORS))), rng.choice((shape, rng.choice(SHAPES)))
    questions = [
        ("what shape is it?", shape),
        ("what color is it?", color),
        (f"is it {named[0]}?", "yes" if named[0] == color else "no"),
        (f"is it a {named[1]}?", "yes" if named[1] == shape else "no"),
    ]
    return one_after_the_other(rng.sample(questions, 2))


def one_after_the_other(two: Sequence[tuple[str, str]]) -> Turns:
    """Two questions that are put at once, with the answers turn by turn."""
    (first, answer), (second, other) = two
    return [(f"first: {first} second: {second} answer the first.", answer), ("and the second?", other)]


def dialogues_about_things(
    examples: Iterable[Example], kinds: Sequence[str], *, each: int, seed: str
) -> list[tuple[Path, Turns]]:
    """Dialogues about easy-VQA's pictures, `each` of every picture."""
    rng, made = random.Random(seed), list[tuple[Path, Turns]]()
    for path, thing in things_in(examples).items():
        for _ in range(each):
            made.append((path, about_a_thing(kinds[len(made) % len(kinds)], *thing, rng)))
    return made


def dialogues_from_questions(examples: Iterable[Example], *, each: int, seed: str) -> list[tuple[Path, Turns]]:
    """Dialogues of two questions with different answers about one picture, at most `each` of every picture."""
    rng, made = random.Random(seed), list[tuple[Path, Turns]]()
    asked: dict[Path, Turns] = {}
    for example in examples:
        if len(example.images) == 1 and example.images[0].path is not None and not example.history:
            asked.setdefault(example.images[0].path, []).append((example.question, example.answer))
    for path, questions in asked.items():
        rng.shuffle(questions)
        pairs = [pair for pair in zip(questions[::2], questions[1::2], strict=False) if pair[0][1] != pair[1][1]]
        made += [(path, one_after_the_other(pair)) for pair in pairs[:each]]
    return made


def write_dialogues(out: Path, part: str, dialogues: Sequence[tuple[Path, Turns]]) -> int:
    """Write the dialogues of a part, with and without history, and their pictures; returns how many there are.

    Args:
        out: the folder.
        part: "train" or "test".
        dialogues: each with its picture.
    """
    (out / part).mkdir(parents=True, exist_ok=True)
    whole, alone, names = [], [], dict[Path, str]()
    for path, turns in dialogues:
        if path not in names:
            names[path] = f"{part}/{len(names):05d}{path.suffix}"
            put(path, out / names[path])
        messages: list[Mapping[str, str]] = []
        for number, (asked, answered) in enumerate(turns, start=1):
            mark = "<image>" if number == 1 else ""
            messages += [{"role": "user", "content": mark + asked}, {"role": "assistant", "content": answered}]
            alone.append({"image": names[path], "question": asked, "answer": answered, "kind": f"turn {number}"})
        whole.append({"messages": messages, "images": [names[path]]})
    for name, rows in ((part, whole), (f"{part}_alone", alone)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(whole)


def put(picture: Path, place: Path) -> None:
    """A picture at another place too: by a link if the disk can, else as a copy."""
    place.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(picture, place)
    if not place.exists():
        shutil.copy(picture, place)


def main() -> None:
    """Write the dialogues of both parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/dialogues"), help="the folder to write to")
    parser.add_argument("--train", help="a file of questions to make them of, in place of easy-VQA's")
    parser.add_argument("--test", help="the same to test on")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of easy-VQA's dialogues, with commas between")
    parser.add_argument("--each", type=int, default=2, help="dialogues about a picture at most")
    parser.add_argument("--pictures", type=int, help="to train on at most; a quarter as many to test on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds: there is no {unknown[0]}; take {', '.join(KINDS)}")
    if (options.train is None) != (options.test is None):
        parser.error("--train and --test go together")
    for part, own in (("train", options.train), ("test", options.test)):
        how = {"each": options.each, "seed": f"{options.seed}:{part}"}
        examples = read_data(own or f"easy-vqa:{part}", task="vqa").examples
        made = (
            dialogues_from_questions(examples, **how) if own else dialogues_about_things(examples, kinds, **how)
        )  # fmt: skip
        if options.pictures is not None:
            known = sorted({path for path, _ in made})
            random.Random(options.seed).shuffle(known)
            kept = set(known[: options.pictures if part == "train" else max(1, options.pictures // 4)])
            made = [one for one in made if one[0] in kept]
        count = write_dialogues(options.out, part, made)
        print(f"{options.out / part}.jsonl: {count} dialogues about {len({path for path, _ in made})} pictures")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"make_dialogues: {error}", file=sys.stderr)
        sys.exit(2)
