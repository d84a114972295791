"""A contact sheet of a data file: pictures with what is asked and answered about them, as one PNG."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.data.lettering import Lettering
from adapters.data.reading import ReadRows, no_rows, read_rows
from qformer.errors import UserError

COLUMNS = 4
CELL = 320  # pixels, in width
PICTURE = 240  # pixels, in height
GAP = 16
TEXT_LINES = 8  # of a question, and of its answers
_MAKER = "querybridge data preview"  # written into the file, so that no other picture is overwritten


@dataclass(frozen=True)
class Preview:
    """What was drawn.

    Args:
        out: the PNG.
        rows: numbers of the rows on it.
        bad_rows: rows that could not be read, which are not on it.
        bad_pictures: rows on it with a picture that could not be decoded; what is wrong is written in its place.
        escaped: whether some letters are written as escapes, such as \\u4e2d, because no font here has them.
    """

    out: Path
    rows: tuple[int, ...]
    bad_rows: int
    bad_pictures: int
    escaped: bool


def preview_data(
    source: str | Path,
    out: Path | str = "preview.png",
    *,
    rows: int = 12,
    sample: int | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
) -> Preview:
    """Draw rows of a data file onto a contact sheet.

    Args:
        source: as `adapters.data.reading.read_data` takes it; answers may be absent.
        out: the PNG to write. An earlier sheet is replaced, any other file is not.
        rows: how many, the first of the file.
        sample: draw them at random instead, with this seed; the whole file is read.
        task: "vqa", "caption" or "reason"; if left out, inferred from the rows.
        columns: as `read_data` takes them.
        allow_outside: as `read_data` takes it.
        offline: do not fetch a packaged set.

    Raises:
        UserError: the file cannot be read or no row is good, or `out` cannot be written.
    """
    out = Path(out)
    _check_out(out)
    found, chosen = chosen_rows(
        source, rows=rows, sample=sample, task=task, columns=columns, allow_outside=allow_outside, offline=offline
    )
    sheet, bad_pictures, escaped = draw_sheet(chosen, f"{found.name}: {found.task}, {len(chosen)} rows")
    mark = PngInfo()
    mark.add_text("Software", _MAKER)
    try:
        sheet.save(out, format="PNG", pnginfo=mark)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); name another file") from error
    return Preview(out, tuple(example.row for example in chosen), len(found.faults), bad_pictures, escaped)


def chosen_rows(
    source: str | Path,
    *,
    rows: int,
    sample: int | None,
    task: str | None,
    columns: Mapping[str, str] | None,
    allow_outside: bool,
    offline: bool,
) -> tuple[ReadRows, list[Example]]:
    """What was read of a data file, and the rows of it to look at. Arguments and errors as of `preview_data`."""
    limit = rows if sample is None else None
    found = read_rows(
        source, task=task, need_answers=False, limit=limit, columns=columns, allow_outside=allow_outside,
        offline=offline,
    )  # fmt: skip
    if not found.examples:
        raise UserError(str(found.faults[0]) if found.faults else no_rows(source))
    chosen = list(found.examples)
    if sample is not None:
        chosen = sorted(random.Random(sample).sample(chosen, min(rows, len(chosen))), key=lambda row: row.row)
    return found, chosen


def draw_sheet(examples: Sequence[Example], title: str) -> tuple[Image.Image, int, bool]:
    """Draw rows as cells of a table, each a picture (or several) with its texts below.

    Returns:
        The sheet, how many rows have a picture that cannot be decoded, and whether letters were written as escapes.
    """
    text, small = Lettering(18), Lettering(14)
    cells = [_Cell(example, text, small) for example in examples]
    columns = min(COLUMNS, len(cells))
    table = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in table]
    head = GAP + small.line_height
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), head + GAP + sum(heights) + GAP * len(heights)), "white")
    canvas = ImageDraw.Draw(sheet)
    heading = small.wrap(small.drawable(title), sheet.width - 2 * GAP, 1)
    small.draw(canvas, (GAP, GAP), heading[0], "#555555")
    y = head + GAP
    for line, height in zip(table, heights, strict=True):
        for column, cell in enumerate(line):
            cell.draw(sheet, canvas, GAP + column * (CELL + GAP), y)
        y += height + GAP
    return sheet, sum(cell.broken for cell in cells), text.escaped or small.escaped


class _Cell:
    """One row: its pictures side by side in a box, its number, its question and its answers, wrapped."""

    def __init__(self, example: Example, text: Lettering, small: Lettering) -> None:
        self.text, self.small = text, small
        self.pictures = [thumbnail(image, CELL // len(example.images)) for image in example.images]
        self.broken = any(isinstance(picture, str) for picture in self.pictures)
        pictures = f", {len(example.images)} pictures" if len(example.images) > 1 else ""
        language = f", {example.language}" if example.language != "en" else ""
        own_id = f", id {example.id}" if example.id != str(example.row) else ""
        self.head = small.wrap(small.drawable(f"row {example.row}{own_id}{pictures}{language}"), CELL, 1)
        said = "".join(f"{turn.role}: {turn.text} / " for turn in example.history) + example.question
        self.question = text.wrap(text.drawable(said), CELL, TEXT_LINES) if said else []
        counted = Counter(example.answers)
        answers = [answer if number == 1 else f"{answer} ({number} times)" for answer, number in counted.items()]
        shown = "; ".join(answers) if answers else "(no answer)"
        self.answers = text.wrap(text.drawable(shown), CELL, TEXT_LINES)

    @property
    def height(self) -> int:
        """Pixels from the top of the picture to the end of the text."""
        lines = len(self.question) + len(self.answers)
        return PICTURE + GAP // 2 + self.small.line_height + lines * self.text.line_height

    def draw(self, sheet: Image.Image, canvas: ImageDraw.ImageDraw, x: int, y: int) -> None:
        width = CELL // len(self.pictures)
        for number, picture in enumerate(self.pictures):
            left = x + number * width
            if isinstance(picture, str):
                canvas.rectangle((left, y, left + width - 1, y + PICTURE - 1), outline="#b00020", width=2)
                lines = self.small.wrap(
                    self.small.drawable(picture), width - GAP, PICTURE // self.small.line_height - 1
                )
                for line_number, line in enumerate(lines):
                    place = (left + GAP // 2, y + GAP // 2 + line_number * self.small.line_height)
                    self.small.draw(canvas, place, line, "#b00020")
            else:
                canvas.rectangle((left, y, left + width - 1, y + PICTURE - 1), fill="#f0f0f0")
                sheet.paste(picture, (left + (width - picture.width) // 2, y + (PICTURE - picture.height) // 2))
        y += PICTURE + GAP // 2
        self.small.draw(canvas, (x, y), self.head[0], "#777777")
        y += self.small.line_height
        for colour, lines in (("black", self.question), ("#00695c", self.answers)):
            for line in lines:
                self.text.draw(canvas, (x, y), line, colour)
                y += self.text.line_height


def thumbnail(image: ImageRef, width: int) -> Image.Image | str:
    """A picture, opened, within `width` and the box's height, enlarged 8 times at most; or what is wrong with it."""
    try:
        picture = open_image(replace(image, where=""))
    except UserError as error:
        return str(error)
    scale = min(width / picture.width, PICTURE / picture.height, 8.0)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return picture.resize(size, smooth)


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the sheet is a PNG; name a file that ends in .png, such as preview.png")
    if out.is_dir() or not out.parent.is_dir():
        kind = "this is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(f"--out {out}: {kind}; name a file such as preview.png")
    if out.exists():
        try:
            with Image.open(out) as found:
                ours = found.info.get("Software") == _MAKER
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            ours = False
        if not ours:
            raise UserError(f"--out {out}: another file stands there; name a new one, or delete it")
