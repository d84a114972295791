"""The files of questions that `scripts/make_photo.py` writes of photos of everything, and of captions with boxes."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adapters.data.examples import Example
from adapters.data.photo_questions import Seen, questions_about
from adapters.data.rewording import DESCRIBE, reword, reword_unseen
from qformer.atomic import whole_file

DESCRIBED = 0.06  # share of the pictures that are to be described in other words than the usual request
ALONE = 0.25  # share of the animals of whose pictures it is asked whether a person is there


def make_broad_questions(data: Path, part: str, out: Path) -> None:
    """Write the questions of the photos of everything in other words, and more questions on Flickr8k's photos.

    One half of the validation pictures chooses: `broad_val` in other words, and `broad_chooses` as the questions are.
    The other half is measured on and chooses nothing: `broad_reports`, and `broad_unseen` in words of no training.

    Args:
        data: holds `flickr8k/` and `broad/`.
        part: "train" or "val".
        out: the folder of the files.
    """
    broad = data / "broad"
    rows = list(read_lines(broad / f"questions_{part}.jsonl"))
    if part == "val":
        halves: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for row in rows:
            halves[chooses(row["image"])].append(row)
        for name, half in (("chooses", halves[True]), ("reports", halves[False])):
            write_questions(
                out / f"broad_{name}.jsonl", ((broad / row["image"], row["question"], row["answer"]) for row in half)
            )
        rng = random.Random(0)
        unseen = [(row, reword_unseen(row["question"], rng)) for row in halves[False]]
        write_questions(
            out / "broad_unseen.jsonl",
            ((broad / row["image"], text, row["answer"]) for row, text in unseen if text is not None),
        )
        rows = halves[True]
    rng = random.Random(part)
    wordings = 3 if part == "train" else 1
    worded = [
        (broad / row["image"], reword(row["question"], rng), row["answer"]) for _ in range(wordings) for row in rows
    ]
    rng.shuffle(worded)
    write_questions(out / f"broad_{part}.jsonl", worded)
    write_questions(out / f"wider_{part}.jsonl", wider_questions(data, part))


def chooses(image: str) -> bool:
    """Whether a validation picture is of the half that chooses weights; by its name, so that it stays so."""
    return hashlib.sha256(image.encode()).digest()[0] % 2 == 0


def wider_questions(data: Path, part: str) -> list[tuple[Path, str, str]]:
    """Questions made of Flickr8k's captions and boxes, and requests in words to describe a picture."""
    flickr, broad = data / "flickr8k", data / "broad"
    boxes: dict[str, list[tuple[str, Any, str]]] = {}
    for row in read_lines(flickr / f"boxes_{part}.jsonl"):
        boxes.setdefault(row["image"], []).append((row["phrase"], row["boxes"], row["kind"]))
    rng, asked = random.Random(f"{part}:wider"), Counter[str]()
    found = []
    for row in read_lines(flickr / f"captions_{part}.jsonl"):
        seen = Seen(row["captions"], boxes.get(row["image"], []))
        found += [
            (flickr / row["image"], reword(text, rng), answer) for text, answer in questions_about(seen, rng, asked)
        ]
        if rng.random() < DESCRIBED:
            found.append((flickr / row["image"], rng.choice(DESCRIBE), rng.choice(row["captions"])))
    for row in read_lines(broad / f"captions_{part}.jsonl"):
        if rng.random() < DESCRIBED:
            found.append((broad / row["image"], rng.choice(DESCRIBE), row["captions"][-1]))
    for row in read_lines(broad / f"questions_{part}.jsonl"):
        # one animal fills these pictures; a person in them is assumed to be rare
        if row["question"].startswith("What animal") and rng.random() < ALONE:
            found.append((broad / row["image"], reword("Is there a person in the picture?", rng), "no"))
    rng.shuffle(found)
    return [(image, question, answer.removesuffix(" .")) for image, question, answer in found]


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_questions(file: Path, asked: Iterable[tuple[Path | None, str, str]]) -> None:
    """Write pictures with a question and its answer each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"image": str(image), "question": question, "answer": answer} for image, question, answer in asked)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_own_reasons(file: Path, asked: Sequence[Example], reasons: Sequence[str]) -> None:
    """Write rows with reasons that an adapter gave, in place of those that people gave.

    Who learns to answer from people's reasons alone trusts reasons that it will never have.
    """
    rows = (
        {
            "image": str(row.images[0].path), "question": row.question, "choices": list(row.choices),
            "rationale": reason, "answer": row.answer,
        }
        for row, reason in zip(asked, reasons, strict=True)
    )  # fmt: skip
    with whole_file(file) as building:
        building.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
