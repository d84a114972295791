"""ScienceQA (Lu et al. 2022, arXiv 2209.09513) from its own files: as plain records, and as rows of a data set.

They lie as the authors' repository (lupantech/ScienceQA) has them: `problems.json` and `pid_splits.json` in one
folder, and pictures at `{split}/{id}/image.png` in that folder or in its `images/`.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.data.answers import choice_letter
from adapters.data.formats.raw_rows import RawRow, kind_of, shorten
from adapters.data.image_ref import blank_image
from qformer.errors import UserError

TERMS = "ScienceQA (Lu et al. 2022) - CC BY-NC-SA 4.0"
SUBJECTS = ("natural science", "social science", "language science")
GRADES = tuple(f"grade{number}" for number in range(1, 13))
_FOLDERS = ("train", "val", "test")  # of pictures; `minival` and the like have theirs among these
_MOST_CHOICES = 10


@dataclass(frozen=True)
class ScienceProblem:
    """One problem.

    Args:
        id: its key in `problems.json`.
        question: what is asked.
        context: the hint, unchanged; "" if there is none.
        choices: what may be answered.
        rationale: the lecture and the solution, parted by a space; "" if there is neither.
        answer_index: the place of the right choice, from 0.
        answer: the right choice.
        image: its picture; None if it has none.
        subject: one of `SUBJECTS`.
        grade: "grade1" to "grade12".
        split: "train", "val" or "test".
        topic: such as "physics" or "geography".
    """

    id: str
    question: str
    context: str
    choices: tuple[str, ...]
    rationale: str
    answer_index: int
    answer: str
    image: Path | None
    subject: str
    grade: str
    split: str
    topic: str

    @property
    def letter(self) -> str:
        """The right answer as it is given: "(A)" for the first choice."""
        return choice_letter(self.answer_index)


def read_scienceqa(
    folder: str | Path, split: str, *, images: str | Path | None = None, need_images: bool = True
) -> tuple[ScienceProblem, ...]:
    """Read the problems of a split, in its order.

    Args:
        folder: holds `problems.json` and `pid_splits.json`.
        split: a key of `pid_splits.json`, such as "train", "val", "test" or "minival".
        images: the folder of `train/`, `val/` and `test/`, if it is neither `folder` nor `folder/images`.
        need_images: whether each picture named must be there; False takes their paths as they should be.

    Raises:
        UserError: a file is missing or broken, there is no such split, a problem lacks something or a picture is not
            there.
    """
    folder = Path(folder).expanduser()
    table, splits_file = folder / "problems.json", folder / "pid_splits.json"
    problems, splits = _load(table), _load(splits_file)
    if not isinstance(splits.get(split), list):
        raise UserError(f"{splits_file} has no list '{shorten(split)}': take one of {', '.join(splits)}")
    if images is None:
        images = folder / "images" if (folder / "images").is_dir() else folder
    root, found = Path(images).expanduser(), []
    for number in splits[split]:
        name = str(number)
        if name not in problems:
            raise UserError(f"{splits_file}: '{split}' names problem {shorten(name)}, which {table} lacks: take it out")
        problem = _Fields(problems[name], f"{table} problem {name}").problem(name, root)
        if need_images and problem.image is not None and not problem.image.is_file():
            raise UserError(
                f"{table} problem {name}: its picture {problem.image} is not there: unpack the archives of pictures"
                f" into {folder / 'images'}, or name their folder"
            )
        found.append(problem)
    return tuple(found)


def is_scienceqa(folder: str | Path) -> bool:
    """Whether a folder holds ScienceQA."""
    return os.path.isfile(Path(folder) / "problems.json")  # says no to a name that no file can have


def scienceqa_folder(source: str | Path) -> tuple[Path, str] | None:
    """Folder and split of a source that is written FOLDER:SPLIT; None if it is no folder of ScienceQA."""
    name, _, split = str(source).rpartition(":")
    folder = Path(name).expanduser()
    return (folder, split) if name and is_scienceqa(folder) else None


def scienceqa_rows(folder: Path, split: str) -> Iterator[RawRow]:
    """The problems of a split as rows with reasons, in its order; their ids are the problems'.

    A problem without a picture gets a grey one, as multimodal chain of thought gives it features of nothing: so all are
    asked in one way.

    Raises:
        UserError: as `read_scienceqa`, but for pictures that are not there, which are the row's matter.
    """
    blank = "data:image/x-portable-pixmap;base64," + base64.b64encode(blank_image().read()).decode()
    for number, problem in enumerate(read_scienceqa(folder, split, need_images=False), start=1):
        fields = {
            "image": str(problem.image.relative_to(folder)) if problem.image is not None else blank,
            "question": problem.question,
            "context": problem.context.strip(),
            "choices": list(problem.choices),
            "rationale": problem.rationale.strip(),
            "answer": problem.answer,
            "id": problem.id,
        }
        yield RawRow(f"{folder / 'problems.json'} problem {problem.id}", number, fields)


class _Fields:
    """The fields of one problem, checked as they are taken."""

    def __init__(self, fields: object, where: str) -> None:
        if not isinstance(fields, dict):
            raise UserError(f"{where} is {kind_of(fields)} ({shorten(fields)}): write an object of its fields")
        self._fields: dict[str, Any] = fields
        self._where = where

    def problem(self, name: str, images: Path) -> ScienceProblem:
        """The whole problem."""
        choices = self._choices()
        index = self._index(len(choices))
        split = self._one_of("split", _FOLDERS)
        picture = self._fields.get("image")  # null if there is none
        reasons = [self._text("lecture"), self._text("solution")]
        return ScienceProblem(
            id=name,
            question=self._text("question", needed=True),
            context=self._text("hint"),
            choices=choices,
            rationale=" ".join(text for text in reasons if text),
            answer_index=index,
            answer=choices[index],
            image=images / split / name / self._text("image", needed=True) if picture else None,
            subject=self._one_of("subject", SUBJECTS),
            grade=self._one_of("grade", GRADES),
            split=split,
            topic=self._text("topic"),
        )

    def _get(self, name: str) -> Any:
        if name not in self._fields:
            raise UserError(f"{self._where}: field '{name}' is missing: add it")
        return self._fields[name]

    def _text(self, name: str, *, needed: bool = False) -> str:
        value = self._get(name)
        if not isinstance(value, str):
            raise UserError(f"{self._where}: '{name}' is {kind_of(value)} ({shorten(value)}): write text in quotes")
        if needed and not value.strip():
            raise UserError(f"{self._where}: '{name}' is empty: fill it in")
        return value

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self._text(name)
        if value not in allowed:
            raise UserError(f"{self._where}: '{name}' is '{shorten(value)}': take one of {', '.join(allowed)}")
        return value

    def _choices(self) -> tuple[str, ...]:
        value = self._get("choices")
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise UserError(f"{self._where}: 'choices' is {kind_of(value)} ({shorten(value)}): write a list of texts")
        if not 2 <= len(value) <= _MOST_CHOICES:
            raise UserError(f"{self._where}: {len(value)} 'choices': give from 2 to {_MOST_CHOICES}")
        return tuple(value)

    def _index(self, choices: int) -> int:
        value = self._get("answer")
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{self._where}: 'answer' is {kind_of(value)} ({shorten(value)}): write a choice's index")
        if not 0 <= value < choices:
            raise UserError(f"{self._where}: 'answer' is {value}, of {choices} choices: write 0 to {choices - 1}")
        return value


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is not there: name the folder that holds it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}: mend that") from None
    except ValueError as error:  # broken JSON, or not UTF-8
        raise UserError(f"{path} is broken ({shorten(str(error), 80)}): fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {kind_of(value)}, not an object: fetch it again")
    return value
