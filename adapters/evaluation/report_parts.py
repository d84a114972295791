"""The pieces of a report's page: every text is escaped, every picture is small and inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.preview import thumbnail

MARK = "<!-- querybridge evaluation -->"  # so that no other file is overwritten
_WIDTH = 260  # pixels
_LONG = 400  # characters of a text that are shown
_STYLE = (
    ":root{color-scheme:light dark;--ink:#222;--paper:#fff;--soft:#667;--line:#ddd;--main:#00695c;--bad:#b00020}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#16181b;--soft:#9aa;--line:#3a3f44;--main:#4db6ac;"
    "--bad:#ff8a80}}"
    "*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:60rem;"
    "color:var(--ink);background:var(--paper);overflow-wrap:anywhere}"
    "h1{font-size:1.35rem;margin:.4rem 0 1rem}h2{font-size:1.1rem;margin:2rem 0 .6rem}p{margin:.3rem 0}"
    "ul{margin:.4rem 0;padding-left:1.2rem}li{margin:.3rem 0}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem}"
    ".tile{border:1px solid var(--line);border-radius:8px;padding:.6rem .7rem}.tile b{display:block;font-size:1.35rem}"
    ".tile span,.tile small,.soft{color:var(--soft);font-size:.85rem}.tile small{display:block}"
    "figure{margin:0}figure img{width:100%;max-width:38rem;height:auto;background:#fff;border-radius:8px;padding:.3rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}"
    "th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}"
    "th{font-weight:600}th,td{white-space:nowrap}td:first-child{white-space:normal;min-width:7rem}"
    ".bar{display:inline-block;width:5rem;height:.7rem;margin-right:.5rem;border-radius:3px;background:"
    "linear-gradient(to right,var(--main) calc(var(--share)*100%),var(--line) calc(var(--share)*100%))}"
    ".confusion td{text-align:right;min-width:2.6rem;background:color-mix(in srgb,var(--tone) calc(var(--share)*75%),"
    "transparent)}.hit{--tone:#26a69a}.miss{--tone:#ef5350}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:.9rem}"
    ".card{border:1px solid var(--line);border-radius:8px;padding:.6rem}"
    ".card img{max-width:100%;max-height:15rem;display:block;margin:0 auto .4rem;border-radius:4px}"
    ".right{color:var(--main)}.wrong{color:var(--bad)}"
    "@media(max-width:30rem){.bar{width:2rem}th,td{padding:.25rem .3rem}table{font-size:.85rem}}"
)


def words(text: str, *, most: int = _LONG) -> str:
    """A text as HTML: escaped, cut if it has more characters, and writable whatever is in it."""
    cut = text if len(text) <= most else text[:most].rstrip() + "…"
    return escape(cut.encode(errors="backslashreplace").decode())


def page(title: str, body: str) -> str:
    """A whole page whose policy lets nothing in from elsewhere and runs no script."""
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src'
        f" 'unsafe-inline'\"><title>{words(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{words(title)}</h1>\n{body}\n</body></html>\n"
    )


def tile(title: str, value: str, below: str) -> str:
    """One score: its name, its value, and its interval if there is one."""
    small = f"<small>{words(below)}</small>" if below else ""
    return f'<div class="tile"><span>{words(title)}</span><b>{words(value)}</b>{small}</div>'


def sentences(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{words(line)}</li>' for line in lines)}</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; it scrolls by itself if it is wider than the screen."""
    top = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if any(head) else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{lines}</table></div>'


def figure(svg: bytes, alt: str) -> str:
    """A plot."""
    return f'<figure><img alt="{words(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"></figure>'


def card(
    example: Example, said: str, confidence: float, score: float, *, captions: bool, rationale: str | None = None
) -> str:
    """A row with its pictures, what was asked, what was said and why, and what is right."""
    lines = [_picture(image) for image in example.images]
    lines += [f'<p class="soft">{turn.role}: {words(turn.text)}</p>' for turn in example.history]
    for name, value in (
        ("", "" if captions else example.question), ("context: ", example.context),
        ("choices: ", ", ".join(example.choices)),
    ):  # fmt: skip
        if value:
            lines.append(f"<p>{name}{words(value)}</p>")
    sure = f"{confidence:.0%}".replace("%", " %") + " sure"
    marked = "" if captions else ' class="right"' if score == 1 else ' class="wrong"'
    detail = f"CIDEr {score:.2f}, {sure}" if captions else sure
    lines.append(f'<p{marked}>said: {words(said) or "(nothing)"} <span class="soft">({detail})</span></p>')
    if rationale is not None:
        lines.append(f'<p class="soft">its reasons: {words(rationale) or "(none)"}</p>')
    if captions or score < 1:
        lines.append(f'<p class="right">right: {words(_counted(example.answers))}</p>')
    if rationale is not None and example.rationale:
        lines.append(f'<p class="soft">given reasons: {words(example.rationale)}</p>')
    place = f"row {example.row}" if example.row else example.id
    lines.append(f'<p class="soft">{words(place)}{f", {words(example.kind)}" if example.kind else ""}</p>')
    return f'<div class="card">{"".join(lines)}</div>'


def _counted(answers: Sequence[str]) -> str:
    """Answers, each once, with how often it was given."""
    counts = {answer: answers.count(answer) for answer in dict.fromkeys(answers)}
    return "; ".join(answer if count == 1 else f"{answer} (×{count})" for answer, count in counts.items())


def _picture(image: ImageRef) -> str:
    picture = thumbnail(image, _WIDTH)
    if isinstance(picture, str):
        return f'<p class="wrong">{words(picture)}</p>'
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{words(image.label)}" src="data:image/jpeg;base64,{data}">'
