"""Pictures to try the page with: of an adapter's own data if it is here, else photos, or drawn scenes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.data.reading import read_data
from adapters.data.scenes.drawing import draw_scene, make_scenes
from adapters.data.scenes.questions import questions_of
from qformer.errors import UserError

COUNT = 6  # pictures
ANY_QUESTION = "what is in the picture?"  # for a picture that comes without one
_QUESTIONS = 3  # of each
_SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_PHOTOS = {  # beside this file: each with what may be asked
    "cat.jpg": ("what animal is it?", "what colour are its eyes?"),
    "coffee.jpg": ("what is in the cup?", "is there a spoon?"),
    "astronaut.jpg": ("what is the person wearing?", "is the person smiling?"),
    "palace.jpg": ("what kind of building is it?", "is it sunny?"),
    "galaxies.jpg": ("what is in the picture?", "what colour is the background?"),
    "rocket.jpg": ("what is in the picture?", "is it day or night?"),
}
CREDITS = (  # as scikit-image (skimage.data) and scikit-learn (datasets/images) state them
    "Photos to try: cat by Stéfan van der Walt and coffee by Rachel Michetti, courtesy of Pikolo Espresso Bar (both"
    " CC0); astronaut and galaxies by NASA and rocket by SpaceX (public domain); palace by danielbuechele (CC BY 2.0)."
    " All were made smaller."
)


@dataclass(frozen=True)
class ExamplePicture:
    """A picture to try, with what may be asked about it."""

    path: Path
    questions: tuple[str, ...]


def find_examples(
    folder: Path, *, task: str, train: Sequence[str], val: Sequence[str] = ()
) -> tuple[str, list[ExamplePicture]]:
    """Pictures to try an adapter with, and what they are.

    Args:
        folder: where scenes are drawn, if they are needed.
        task: what the adapter was trained for.
        train: its training data, as `read_data` takes each.
        val: its validation data, if pictures of the training data weren't held out instead.
    """
    own = data_examples((val or train)[0], task)
    if own:
        return f"from its {'validation' if val else 'training'} data", own
    if not _is_easy_vqa(train):
        return "photos, not from its training data", list(photos())
    return "drawn scenes, not from its training data", list(drawn_scenes(folder, COUNT))


def data_examples(source: str, task: str) -> list[ExamplePicture]:
    """Pictures and questions from the data an adapter was trained with; none if it is not on this machine.

    If there are enough, each begins with a question that none before has; rows of several pictures are passed over.
    Nothing is fetched.

    Args:
        source: the data, as `read_data` takes it.
        task: what the adapter was trained for; "mixed" leaves the task to the rows.
    """
    named_task = None if task == "mixed" else task
    try:
        rows = read_data(source, task=named_task, need_answers=False, skip_bad_rows=True, limit=400, offline=True)
    except UserError:
        return []  # the adapter has come without its data, which is the usual case and no mistake
    asked: dict[Path, list[str]] = {}
    for example in rows.examples:
        path = example.images[0].path if len(example.images) == 1 and not example.history else None
        if path is not None and path.suffix.lower() in _SHOWN_BY_BROWSERS:
            questions = asked.setdefault(path, [])
            if example.question and example.question not in questions:
                questions.append(example.question)
    first: dict[Path, str] = {}
    for new_only in (True, False):
        for path, questions in asked.items():
            if len(first) == COUNT or path in first:
                continue
            fresh = [text for text in questions if text not in first.values()]
            if fresh or not new_only:
                first[path] = (fresh or questions or [""])[0]
    return [
        ExamplePicture(path, tuple(filter(None, dict.fromkeys([text, *asked[path]])))[:_QUESTIONS])
        for path, text in first.items()
    ]


def photos() -> Iterator[ExamplePicture]:
    """The photos that come with the page; their licences allow it, and `CREDITS` names who took them."""
    for name, questions in _PHOTOS.items():
        yield ExamplePicture(Path(__file__).parent / "photos" / name, questions)


def copied(example: ExamplePicture, folder: Path) -> ExamplePicture:
    """The same picture in a folder, under its own name if that is free."""
    if example.path.parent == folder:
        return example
    place = folder / example.path.name
    number = 2
    while place.exists():
        place = folder / f"{example.path.stem} {number}{example.path.suffix}"
        number += 1
    shutil.copy(example.path, place)
    return replace(example, path=place)


def drawn_scenes(folder: Path, count: int) -> Iterator[ExamplePicture]:
    """Scenes of coloured shapes, drawn into a folder."""
    for number, scene in enumerate(make_scenes(count, seed=1), start=1):
        path = folder / f"scene {number}.png"
        draw_scene(scene).save(path)
        asked = sorted(questions_of(scene, random.Random(number)), key=lambda question: -question.steps)
        yield ExamplePicture(path, tuple(question.question for question in asked)[:_QUESTIONS])


def _is_easy_vqa(train: Sequence[str]) -> bool:
    """Whether an adapter knows nothing but drawn shapes, for which a photo is no fair trial."""
    return all(source.startswith("easy-vqa") for source in train)
