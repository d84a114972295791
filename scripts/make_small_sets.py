"""Make the small data sets that fine-tuning is measured on: kinds of things in photos, and drawn gauges and charts.

    python scripts/make_small_sets.py kinds FOLDER --out OUT    # photos of FOLDER/captions_{train,val}.jsonl
    python scripts/make_small_sets.py gauges --out OUT

Each writes OUT/train.jsonl and OUT/test.jsonl with whole pictures in one of the two, one question a row; `kind` is the
kind of question; the pictures are in OUT/images. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw

THINGS = "What kind of thing is in the picture?"
HARD_KINDS = (  # clothes and cartons, which look alike
    "shorts", "shirt", "skirt", "t-shirt", "pants", "jacket", "dress", "long-sleeved shirt", "hat", "shoes",
    "carton of milk", "carton of yogurt", "carton of juice", "house",
)  # fmt: skip
COLOURS = {
    "red": (200, 40, 40),
    "blue": (40, 80, 200),
    "green": (40, 150, 60),
    "orange": (240, 150, 30),
    "purple": (130, 60, 170),
}
SIZE = 256
TEST_SHARE = 0.3


def write_rows(out: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    """Write OUT/train.jsonl and OUT/test.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for part, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (out / f"{part}.jsonl").write_text(text, encoding="utf-8")
        print(f"{out / part}.jsonl: {len(lines)} rows, {len({line['image'] for line in lines})} pictures")


def make_kinds(folder: Path, out: Path, kinds: list[str], per_kind: int, seed: int) -> None:
    """Photos of `kinds`, at most `per_kind` of each, by the names that their captions give.

    Args:
        folder: with captions_train.jsonl and captions_val.jsonl, whose first captions are "A kind .".
        out: where to write.
        kinds: names; none takes the commonest twelve.
        per_kind: pictures of a kind at most.
        seed: of the choice of pictures and of the split.
    """
    pictures: dict[str, list[str]] = defaultdict(list)
    for part in ("train", "val"):
        for line in (folder / f"captions_{part}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            name = row["captions"][0].removesuffix(" .")
            for article in ("A pair of ", "A ", "An "):
                name = name.removeprefix(article)
            pictures[name.lower()].append(row["image"])
    chosen = kinds or sorted(pictures, key=lambda name: (-len(pictures[name]), name))[:12]
    if missing := [name for name in chosen if name not in pictures]:
        raise SystemExit(f"--kinds: {folder} has no pictures of {', '.join(missing)}")
    rng = random.Random(seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for name in chosen:
        found = sorted(pictures[name])
        rng.shuffle(found)
        found = found[:per_kind]
        for place, image in enumerate(found):
            part = "test" if place < round(TEST_SHARE * len(found)) else "train"
            own = f"images/{Path(image).name}"
            shutil.copy(folder / image, out / own)
            rows[part].append({"image": own, "question": THINGS, "answer": name, "kind": "thing"})
    for lines in rows.values():
        rng.shuffle(lines)
    write_rows(out, rows)


def draw_gauge(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str, str]]]:
    """A round gauge from 0 to 100 with a coloured zone, and its questions: (kind, question, answer)."""
    picture = Image.new("RGB", (SIZE, SIZE), rng.choice(((255, 255, 255), (240, 240, 232), (225, 232, 240))))
    draw = ImageDraw.Draw(picture)
    centre = (SIZE / 2 + rng.uniform(-8, 8), SIZE / 2 + 15 + rng.uniform(-8, 8))
    radius = rng.uniform(85, 105)
    value = rng.randrange(0, 101)
    zone, needle = rng.sample(list(COLOURS), 2)
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    draw.arc(box, 150, 390, fill=(90, 90, 90), width=6)
    draw.arc(box, 342, 390, fill=COLOURS[zone], width=16)
    for mark in range(0, 101, 10):
        angle = math.radians(150 + 2.4 * mark)
        inner, outer = radius - 14, radius - 2
        ends = [(centre[0] + r * math.cos(angle), centre[1] + r * math.sin(angle)) for r in (inner, outer)]
        draw.line(ends, fill=(40, 40, 40), width=3)
    angle = math.radians(150 + 2.4 * value)
    tip = (centre[0] + (radius - 18) * math.cos(angle), centre[1] + (radius - 18) * math.sin(angle))
    draw.line([centre, tip], fill=COLOURS[needle], width=7)
    draw.ellipse((centre[0] - 9, centre[1] - 9, centre[0] + 9, centre[1] + 9), fill=(30, 30, 30))
    return picture, [
        ("above", "Does the gauge read more than 50?", "yes" if value > 50 else "no"),
        ("reading", "What does the gauge read, to the nearest twenty?", str(round(value / 20) * 20)),
        ("needle", "What colour is the needle?", needle),
        ("zone", "What colour is the zone at the end of the scale?", zone),
    ]


def draw_chart(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str, str]]]:
    """A chart of bars named A, B, …, and its questions: (kind, question, answer)."""
    picture = Image.new("RGB", (SIZE, SIZE), rng.choice(((255, 255, 255), (245, 245, 240))))
    draw = ImageDraw.Draw(picture)
    count = rng.randrange(3, 6)
    heights = [value / 100 for value in rng.sample(range(15, 101, 8), count)]
    colours = rng.sample(list(COLOURS), count)
    left, bottom, top = 24, 216, 26
    step = (SIZE - 2 * left) / count
    draw.line([(left - 8, bottom), (SIZE - left + 8, bottom)], fill=(60, 60, 60), width=3)
    for place, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        x = left + place * step + step * 0.15
        draw.rectangle((x, bottom - height * (bottom - top), x + step * 0.7, bottom), fill=COLOURS[colour])
        draw.text((x + step * 0.25, bottom + 6), "ABCDE"[place], fill=(20, 20, 20), font_size=22)
    tallest = heights.index(max(heights))
    one, other = rng.sample(range(count), 2)
    return picture, [
        ("count", "How many bars does the chart have?", str(count)),
        ("tallest", "Which bar is the tallest?", "ABCDE"[tallest]),
        ("tallest colour", "What colour is the tallest bar?", colours[tallest]),
        (
            "taller",
            f"Is bar {'ABCDE'[one]} taller than bar {'ABCDE'[other]}?",
            "yes" if heights[one] > heights[other] else "no",
        ),
    ]


def make_gauges(out: Path, train: int, test: int, seed: int) -> None:
    """As many gauges as charts; `train` and `test` are pictures, with four questions each."""
    rng = random.Random(seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number in range(train + test):
        picture, questions = (draw_gauge if number % 2 else draw_chart)(rng)
        name = f"images/{number:04}.png"
        picture.save(out / name)
        part = "train" if number < train else "test"
        for kind, question, answer in questions:
            rows[part].append({"image": name, "question": question, "answer": answer, "kind": kind})
    write_rows(out, rows)


def main() -> None:
    """Read the command line and make one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kinds = commands.add_parser("kinds", help="kinds of things in photos")
    kinds.add_argument("folder", type=Path, help="with captions_train.jsonl and captions_val.jsonl")
    kinds.add_argument("--kinds", nargs="+", default=[], metavar="NAME", help="default: the commonest twelve")
    kinds.add_argument("--hard", action="store_true", help="clothes and cartons, which look alike")
    kinds.add_argument("--per-kind", type=int, default=52, help="pictures of a kind at most (default 52)")
    gauges = commands.add_parser("gauges", help="drawn gauges and bar charts")
    gauges.add_argument("--train", type=int, default=160, help="training pictures (default 160)")
    gauges.add_argument("--test", type=int, default=48, help="test pictures (default 48)")
    for command in (kinds, gauges):
        command.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
        command.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.command == "kinds":
        names = list(HARD_KINDS) if given.hard else [name.lower() for name in given.kinds]
        make_kinds(given.folder, given.out, names, given.per_kind, given.seed)
    else:
        make_gauges(given.out, given.train, given.test, given.seed)


if __name__ == "__main__":
    main()
