"""A folder of drawn scenes to train and test on: pictures, their captions, and questions with reasons and answers."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from adapters.data.scenes.captions import captions_of
from adapters.data.scenes.drawing import draw_scene, make_scenes
from adapters.data.scenes.questions import Balance, SceneQuestion, questions_of
from qformer.errors import UserError

PARTS = ("train", "val", "test")


def write_scenes(
    folder: str | Path, *, train: int = 2000, val: int = 200, test: int = 300, seed: int = 0
) -> dict[str, list[SceneQuestion]]:
    """Write `images/*.png`, the questions `{train,val,test}.jsonl`, and `captions_{train,val,test}.jsonl`.

    A row is {"image", "question", "choices", "rationale", "answer", "kind", "steps"}, or {"image", "captions"}; its
    picture's path starts from the folder. No scene is in two parts, and answers are balanced within each part. The
    same numbers and seed give the same bytes, with one version of Pillow. The folder appears under its name when it is
    whole, and not before.

    Args:
        folder: to be made; one that holds something is not written over.
        train: scenes to train on; about nine questions are asked of each.
        val: scenes to choose a model by.
        test: scenes to report scores of.
        seed: another seed makes other scenes.

    Returns:
        The questions of each part, in the order of its rows.

    Raises:
        UserError: a number is below 1, the folder holds something, or it cannot be written.
    """
    target, numbers = Path(folder).expanduser().resolve(), dict(zip(PARTS, (train, val, test), strict=True))
    for part, number in numbers.items():
        if number < 1:
            raise UserError(f"--{part} {number}: give a number of scenes from 1 on")
    scenes = iter(make_scenes(sum(numbers.values()), seed))
    questions: dict[str, list[SceneQuestion]] = {part: [] for part in PARTS}
    with _made_whole(target) as work:
        (work / "images").mkdir()
        for part, number in numbers.items():
            rng, balance = random.Random(f"{seed} {part}"), Balance()
            with _lines(work / f"{part}.jsonl") as file, _lines(work / f"captions_{part}.jsonl") as captions:
                for place in range(1, number + 1):
                    scene, image = next(scenes), f"images/{part}_{place:05}.png"
                    draw_scene(scene).save(work / image, format="PNG")
                    captions.write(json.dumps({"image": image, "captions": captions_of(scene)}) + "\n")
                    for question in questions_of(scene, rng, balance):
                        file.write(_row(image, question) + "\n")
                        questions[part].append(question)
    return questions


def _lines(file: Path) -> TextIO:
    return file.open("w", encoding="utf-8", newline="\n")


def _row(image: str, question: SceneQuestion) -> str:
    fields = asdict(question)
    order = ("question", "choices", "rationale", "answer", "kind", "steps")
    return json.dumps({"image": image} | {name: fields[name] for name in order}, ensure_ascii=False)


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A folder to write in, beside the target, which takes the target's name at the end or is removed."""
    work = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target} holds something already: name a new folder, or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        yield work
        if target.exists():
            target.rmdir()  # empty, or this fails
        work.rename(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {target} ({reason}): name a folder on a disk that takes it") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
