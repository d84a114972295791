"""Rows with questions, reasons and answers, for the tests of every room."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tiny import COLOURS, draw_data


def draw_reasons(folder: Path, name: str = "reasons.jsonl") -> Path:
    """Two questions about each square, one of them in two steps."""
    draw_data(folder)
    rows = []
    for colour in COLOURS:
        for shade in range(3):
            seen = {"image": f"{colour}{shade}.png"}
            rows.append(
                seen
                | {
                    "question": "what colour?",
                    "choices": list(COLOURS),
                    "rationale": f"It is {colour}.",
                    "answer": colour,
                    "kind": "colour",
                    "steps": 1,
                }
            )
            rows.append(
                seen
                | {
                    "question": "is it red?",
                    "choices": ["yes", "no"],
                    "rationale": f"It is {colour}. That is {'' if colour == 'red' else 'not '}red.",
                    "answer": "yes" if colour == "red" else "no",
                    "kind": "same",
                    "steps": 2,
                }
            )
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_scienceqa(folder: Path) -> Path:
    """A folder as ScienceQA's: of each split three problems, one of them without a picture."""
    problems, splits = {}, {}
    for start, split in enumerate(("train", "val", "test")):
        splits[split] = [str(3 * start + number) for number in range(3)]
        for number, name in enumerate(splits[split]):
            problems[name] = {
                "question": f"Which is metal {name}?",
                "choices": ["iron", "wood"],
                "answer": number % 2,
                "hint": "Look." if number else "",
                "image": "image.png" if number < 2 else None,
                "grade": "grade2",
                "subject": "natural science",
                "topic": "",
                "lecture": "Iron is a metal.",
                "solution": "So it is.",
                "split": split,
            }
            if number < 2:
                picture = folder / "images" / split / name / "image.png"
                picture.parent.mkdir(parents=True)
                Image.new("RGB", (24, 24), (40 * start, 90 * number, 120)).save(picture)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder
