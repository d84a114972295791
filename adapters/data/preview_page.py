"""Rows of a data file as one HTML page that stands by itself: pictures are inside it, and nothing is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from adapters.data.examples import Example, Fault
from adapters.data.image_ref import ImageRef
from adapters.data.preview import Preview, chosen_rows, thumbnail
from qformer.errors import UserError

SHOWN_FAULTS = 100
_MARK = "<!-- querybridge data preview -->"  # so that no other file is overwritten
_WIDTH = 320  # pixels
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2rem;color:#222;background:#fff}h1{font-size:1.2rem}"
    ".rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:1.5rem}"
    ".row{border:1px solid #ddd;border-radius:6px;padding:.8rem;overflow-wrap:anywhere}"
    "img{max-width:100%;background:#f0f0f0;display:block;margin-bottom:.4rem}"
    ".place{color:#777;font-size:.85rem}.answer{color:#00695c}.said{color:#777}.wrong{color:#b00020}"
    "p{margin:.2rem 0;white-space:pre-wrap}"
)


def preview_page(
    source: str | Path,
    out: Path | str,
    *,
    rows: int = 12,
    sample: int | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
) -> Preview:
    """Write rows of a data file as an HTML page, with the bad rows that were met below.

    Args:
        source: as `adapters.data.reading.read_data` takes it; answers may be absent.
        out: the HTML file. An earlier page is replaced, any other file is not.
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
    drawn = [[_picture(image) for image in example.images] for example in chosen]
    title = f"{found.name}: {found.task}, {len(chosen)} rows"
    try:
        out.write_text(_page(title, chosen, drawn, found.faults), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {out}: cannot be written ({error.strerror or error}); name another file") from error
    broken = sum(any(wrong for wrong, _ in pictures) for pictures in drawn)
    return Preview(out, tuple(example.row for example in chosen), len(found.faults), broken, escaped=False)


def _page(
    title: str, examples: Sequence[Example], drawn: Sequence[Sequence[tuple[bool, str]]], faults: Sequence[Fault]
) -> str:
    cells = "\n".join(_row(example, pictures) for example, pictures in zip(examples, drawn, strict=True))
    bad = ""
    if faults:
        listed = "\n".join(f"<li>{_text(str(fault))}</li>" for fault in faults[:SHOWN_FAULTS])
        more = f"<p>… and {len(faults) - SHOWN_FAULTS} more</p>" if len(faults) > SHOWN_FAULTS else ""
        bad = f'<h1 class="wrong">{len(faults)} bad rows</h1><ol class="wrong">{listed}</ol>{more}'
    return (
        f'<!doctype html>\n{_MARK}\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src'
        f" 'unsafe-inline'\"><style>{_STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n"
        f'<div class="rows">\n{cells}\n</div>\n{bad}</body></html>\n'
    )


def _row(example: Example, pictures: Sequence[tuple[bool, str]]) -> str:
    place = f"row {example.row}" + (f", id {example.id}" if example.id != str(example.row) else "")
    place += f", {example.language}" if example.language != "en" else ""
    place += f", {example.kind}" if example.kind else ""
    lines = [f'<p class="place">{_text(place)}</p>', *(shown for _, shown in pictures)]
    lines += [f'<p class="said">{turn.role}: {_text(turn.text)}</p>' for turn in example.history]
    for name, value in (
        ("", example.question), ("context: ", example.context), ("choices: ", ", ".join(example.choices)),
        ("reasons: ", example.rationale),
    ):  # fmt: skip
        if value:
            lines.append(f"<p>{name}{_text(value)}</p>")
    lines += [f'<p class="answer">{_text(answer)}</p>' for answer in dict.fromkeys(example.answers)]
    return f'<div class="row">{"".join(lines)}</div>'


def _picture(image: ImageRef) -> tuple[bool, str]:
    """Whether a picture is broken, and what shows it."""
    picture = thumbnail(image, _WIDTH)
    if isinstance(picture, str):
        return True, f'<p class="wrong">{_text(picture)}</p>'
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return False, f'<img alt="{_text(image.label)}" src="data:image/jpeg;base64,{data}">'


def _text(text: str) -> str:
    return escape(text.encode(errors="backslashreplace").decode())


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {out}: name a file that ends in .html, such as preview.html")
    if out.is_dir() or not out.parent.is_dir():
        kind = "this is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(f"--html {out}: {kind}; name a file such as preview.html")
    if out.exists():
        with out.open("rb") as file:
            if _MARK.encode() not in file.read(200):
                raise UserError(f"--html {out}: another file stands there; name a new one, or delete it")
