"""What a data set's name means: a file, a pattern of files, a folder, a packaged set, or one of the hub."""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.data.formats.hub import PREFIX, hub_rows
from adapters.data.formats.raw_rows import RawRow, shorten
from adapters.data.formats.registry import FOLDERS, FORMATS, SHARDS, format_of, reader_of
from adapters.data.formats.text_lines import COMPRESSED
from adapters.data.scienceqa import TERMS as SCIENCEQA_TERMS
from adapters.data.scienceqa import is_scienceqa, scienceqa_folder, scienceqa_rows
from qformer.errors import UserError

EASY_VQA = ("easy-vqa:train", "easy-vqa:test")


@dataclass(frozen=True)
class Source:
    """Rows to read.

    Attributes:
        name: the file's, or the packaged set's.
        rows: one after the other.
        base: the folder that their pictures' paths start from.
        terms: the licence of a packaged set.
        also: other folders where pictures may lie without being outside: where a link to the data leads.
    """

    name: str
    rows: Iterator[RawRow]
    base: Path
    terms: str | None = None
    also: tuple[Path, ...] = ()


def is_data(source: str) -> bool:
    """Whether a name is one of data rather than of a recipe, by how it is written and what is there."""
    if source in EASY_VQA or source.startswith(PREFIX) or scienceqa_folder(source) is not None:
        return True
    path = _path(source)
    return reader_of(path) is not None or _is_folder(path) or _folder_split(source) is not None


def _path(name: str | Path) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # a name that begins with ~ and is nobody's
        return Path(name)


def check_source(source: str | Path) -> None:
    """Say what is wrong with a source's name before anything slow is done; no row is read.

    Raises:
        UserError: there is no such file, it is of an unknown kind, or it is empty.
    """
    if not str(source).startswith((PREFIX, *EASY_VQA)):
        open_source(source)


def open_source(source: str | Path, *, offline: bool = False) -> Source:
    """Find out what a name means and open it.

    Args:
        source: a file in a format of `FORMATS`, compressed text included; a pattern of files, such as
            "shards/train-*.parquet"; a folder in a format of `FOLDERS`, with ":SPLIT" if it has splits;
            "easy-vqa:train" or "easy-vqa:test"; "FOLDER:SPLIT" of ScienceQA; "hub:OWNER/NAME:SPLIT".
        offline: take packaged sets and those of the hub from the cache.

    Raises:
        UserError: there is nothing of that name, it is of an unknown kind, or it is empty.
    """
    text = str(source)
    if text in EASY_VQA:
        return _open_packaged(text, offline)
    if text.startswith(PREFIX):
        return Source(text, hub_rows(text, offline=offline), Path())
    if (science := scienceqa_folder(source)) is not None:
        folder, split = science
        return Source(f"{folder.name}:{split}", scienceqa_rows(folder, split), folder, SCIENCEQA_TERMS)
    if (parted := _folder_split(text)) is not None:
        return _open_folder(*parted)
    path = _path(source)
    try:
        there = path.exists()
    except OSError as error:  # a name too long: rows given in place of a file's name, perhaps
        raise UserError(f"data '{shorten(text)}' is not a usable path: {error.strerror}") from None
    if path.is_dir():
        return _open_folder(path, None)
    if not there and set("*?[") & set(text):
        return _open_pattern(text)
    if not there:
        raise UserError(f"data '{path}' is not there: {_suggestion(path)}")
    return Source(path.name, _open_file(path), path.parent, also=(path.resolve().parent,))


def _open_file(path: Path) -> Iterator[RawRow]:
    read = reader_of(path)
    if read is None:
        ending = format_of(path)
        near = "; of compressed files, text alone is read" if ending in COMPRESSED else ""
        raise UserError(f"{path}: '{ending}' data files are not read: take {', '.join(FORMATS)}{near}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): give it at least one row")
    return read(path)


def _open_pattern(pattern: str) -> Source:
    """Several files of one folder as one, in the order of their names."""
    files = [Path(name) for name in sorted(glob.glob(str(_path(pattern)))) if Path(name).is_file()]
    if not files:
        raise UserError(f"data '{pattern}': no file has such a name")
    return Source(pattern, _one_after_the_other(files), files[0].parent)


def _one_after_the_other(files: list[Path]) -> Iterator[RawRow]:
    if len({file.parent for file in files}) > 1:
        raise UserError(f"{files[0]} and {files[-1]} lie in different folders: name files of one folder")
    number = 0
    for file in files:
        for row in _open_file(file):
            number += 1
            yield replace(row, number=number)


def _folder_split(text: str) -> tuple[Path, str] | None:
    """The folder and the split of FOLDER:SPLIT; None if it is none."""
    before, colon, split = text.rpartition(":")
    if not colon or not split or "/" in split or not _is_folder(_path(before)):
        return None
    return _path(before), split


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _open_folder(folder: Path, split: str | None) -> Source:
    if is_scienceqa(folder):
        raise UserError(f"{folder} is a folder of ScienceQA: name a split of it, such as {folder}:train")
    for kind in FOLDERS:
        splits = kind.splits(folder)
        if splits is None:
            continue
        if splits == ("",) and split is None:
            return Source(folder.name, kind.rows(folder, ""), folder, also=_behind_links(folder))
        if splits == ("",):
            raise UserError(f"{folder}:{split}: this folder has no splits: name the folder alone")
        if split not in splits:
            named = " or ".join(f"{folder}:{name}" for name in splits)
            raise UserError(f"{folder}{f':{split}' if split else ''} has splits: name one of them, {named}")
        assert split is not None
        part = folder / split
        return Source(f"{folder.name}:{split}", kind.rows(folder, split), part, also=_behind_links(part))
    return _open_shards(folder, split)


def _behind_links(folder: Path) -> tuple[Path, ...]:
    """Where the folder's table lies if it is a link, as in the hub's cache, where pictures are links beside it."""
    return tuple({file.resolve().parent for file in folder.glob("metadata.*")})


def _open_shards(folder: Path, split: str | None) -> Source:
    """A folder of files of one of the formats of `SHARDS`, or those of a split, whose names begin with it."""
    inside = sorted(file for file in folder.iterdir() if file.is_file() and reader_of(file) is not None)
    endings = {format_of(file) for file in inside}
    if any(endings <= {ending} for ending in SHARDS):
        parts = {file.name.partition("-")[0] for file in inside if "-" in file.name}
        if split is not None:
            inside = [file for file in inside if file.name.startswith(f"{split}-") or file.stem == split]
        elif len(parts & {"train", "test", "validation", "val"}) > 1:
            named = " or ".join(f"{folder}:{part}" for part in sorted(parts))
            raise UserError(f"{folder} holds files of several splits: name one of them, {named}")
        if inside:
            name = folder.name if split is None else f"{folder.name}:{split}"
            return Source(name, _one_after_the_other(inside), folder)
    if not inside:
        kinds = "a data file, a metadata table, or pictures in a folder for each class"
        raise UserError(f"{folder} is a folder without a data file ({', '.join(FORMATS)}): put there {kinds}")
    raise UserError(f"{folder} is a folder: name the data file in it, such as {inside[0]}")


def _suggestion(path: Path) -> str:
    """Say what was probably meant."""
    names = sorted(difflib.get_close_matches(str(path), EASY_VQA, n=2, cutoff=0.7), reverse=True)
    if not names and path.parent.is_dir():
        files = [file.name for file in path.parent.iterdir() if reader_of(file) is not None]
        near = difflib.get_close_matches(path.name, files, n=1, cutoff=0.7)
        names = [str(path.parent / name) for name in near]
    if names:
        return f"did you mean {' or '.join(names)}?"
    hub = f", hub:{path} if it is on Hugging Face's hub" if len(path.parts) == 2 and not path.suffix else ""
    return f"give a {', '.join(FORMATS)} file, {' or '.join(EASY_VQA)}, or FOLDER:SPLIT of ScienceQA{hub}"


def _open_packaged(name: str, offline: bool) -> Source:
    """easy-VQA from its wheel: rows [question, answer, image id] in questions.json, pictures beside it."""
    from qformer.sources import resolve_wheel_data

    part = name.partition(":")[2]
    folder = resolve_wheel_data("easy-vqa", offline=offline)
    table = folder / part / "questions.json"
    try:
        listed = json.loads(table.read_bytes())
        rows = [(str(question), str(answer), int(image)) for question, answer, image in listed]
    except (OSError, ValueError, TypeError) as error:
        reason = shorten(str(error), 100)
        raise UserError(f"{name}: {table} is damaged ({reason}): remove {folder} and run again") from error

    def raw_rows() -> Iterator[RawRow]:
        for number, (question, answer, image) in enumerate(rows, start=1):
            fields = {"image": f"{part}/images/{image}.png", "question": question, "answer": answer}
            yield RawRow(f"{name} row {number}", number, fields)

    return Source(name, raw_rows(), folder, "MIT (easy-VQA by Victor Zhou)")
