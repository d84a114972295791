"""What the page says about an adapter: its head, its facts, and notes if it was not taught what a tab does."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from adapters.inference.request import LOW
from serve.adapter import LoadedAdapter
from serve.engine.pending import Answer
from serve.page.examples import CREDITS

_MARKS = re.compile(r"([\\`*_\[\]#|~])")  # of Markdown
_KINDS = {
    "vqa": "Answers questions about pictures.",
    "caption": "Describes pictures.",
    "reason": "Answers questions about pictures, with its reasons.",
    "mixed": "Describes pictures and answers questions about them.",
}
_PRACTISED = {
    "vqa": "questions; captions are outside what it practised",
    "caption": "captions; questions are outside what it practised",
    "reason": "reasons and answers; captions are outside what it practised",
    "mixed": "captions and questions",
}


def head(adapter: LoadedAdapter) -> str:
    """The page's head: the product, the adapter, what it does."""
    assembly = adapter.assembly
    return (
        f"<h1>querybridge <span class='name'>{escape(adapter.name)}</span></h1>"
        f"<p class='what'>{escape(assembly.description or _KINDS[assembly.task])}</p>"
    )


def about(adapter: LoadedAdapter) -> str:
    """The adapter's facts as a list, and what becomes of pictures."""
    assembly, facts = adapter.assembly, adapter.facts
    learned = []
    if {"answers", "pictures", "train"} <= facts.data.keys():
        learned.append(
            f"{facts.data['answers']:,} answers about {facts.data['pictures']:,} pictures ({facts.data['train']})"
        )
    if "val_exact_match" in facts.metrics:
        learned.append(f"{facts.metrics['val_exact_match']:.1%} right on its validation questions")
    bits = {"nf4": "4-bit NF4", "int8": "8-bit", "none": "unquantised"}[assembly.quantization]
    rows = {
        "What it does": assembly.description or _KINDS[assembly.task],
        "Trained for": _PRACTISED[assembly.task],
        "Learned from": " · ".join(learned) or "not stated",
        "Image encoder": " and ".join(assembly.vision_side.encoder_sources) + ", frozen",
        "Language model": f"{assembly.language_source}, frozen, {bits}",
        "Steps": f"{facts.steps:,}",
        "Terms of its data": "; ".join(facts.terms) or "not stated",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return (
        f"<dl>{listed}</dl><p>Pictures stay on this machine, and what is uploaded is deleted within two"
        f" hours. Answers can be wrong: check what matters.</p><p>{CREDITS}</p>"
    )


def note(text: str) -> str:
    """A note in a box of its own; nothing if there is no text."""
    return f"<p>{escape(text)}</p>" if text else ""


def shown_note(text: str) -> dict[str, Any]:
    """A note's settings on the page: if there is none, there is no gap for it."""
    return {"value": text, "visible": bool(text), "elem_classes": "note", "padding": False}


def reason_note(adapter: LoadedAdapter) -> str:
    """What to expect of an adapter's reasons."""
    taught = set(adapter.assembly.reasoning_stages)
    if not taught:
        return note(
            f"{adapter.name} was not trained to give reasons. It is asked for them all the same: expect words in the"
            " shape of a thought, and an answer that may be worse than one without."
        )
    if not {"rationale", "answer"} <= taught:
        what = "to answer directly" if "rationale" not in taught else "to give reasons, not to answer from them"
        return note(f"{adapter.name} was trained {what}: the other stage is outside what it practised.")
    return note("The answer is made from the thought. Neither is a proof: a thought can be wrong and its answer right.")


def caption_note(adapter: LoadedAdapter) -> str:
    """What to expect of an adapter's captions."""
    if adapter.assembly.task in ("caption", "mixed"):
        return ""
    return note(f"{adapter.name} was not trained on captions: it may answer in the way it answers questions.")


def search_note(adapter: LoadedAdapter) -> str:
    """Why an adapter cannot search, or how scores are meant."""
    if can_search(adapter):
        return ""
    return note(
        f"{adapter.name} was trained without its text side (bridge.text_branch), so it cannot compare words and"
        " pictures. An adapter from both stages can."
    )


def can_search(adapter: LoadedAdapter) -> bool:
    """Whether an adapter keeps what search needs."""
    return adapter.assembly.vision_side.has_text_side


def look_note(adapter: LoadedAdapter) -> str:
    """Why there is nothing to look at, if the bridge is a simple one."""
    kind = adapter.assembly.vision_side.bridge_kind
    if kind == "qformer":
        return ""
    return note(
        f"The bridge of {adapter.name} ({kind}) has no queries that look at places: it hands the image encoder's"
        " features on, so there is nothing to show."
    )


def how_it_went(answer: Answer, seconds: float | None = None) -> str:
    """One line about an answer: its confidence, or that of each choice, who gave it, how long it took, what ended it.

    Args:
        answer: the answer.
        seconds: it took, if that is to be told.
    """
    parts = [f"{choice} {share:.0%}" for choice, share in (answer.choices or {}).items()]
    if answer.confidence is not None and not parts:
        parts.append(f"{answer.confidence:.0%} sure of its words")
    if answer.confidence is not None and answer.confidence < LOW:
        parts.append("low confidence: check it")
    parts.append(answer.adapter)
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    if answer.finish == "stopped":
        parts.append("stopped")
    if answer.finish == "length":
        parts.append("cut off: allow longer answers under Settings")
    return " · ".join(parts)


def footnote(answer: Answer, seconds: float) -> str:
    """What came of an answer, as the last line of its message in Markdown."""
    told = escape(how_it_went(answer, seconds), quote=False)
    return "*" + _MARKS.sub(r"\\\1", told.replace("\n", " ")) + "*"


def waiting_note(ahead: int, seconds: float) -> str:
    """What a visitor reads while nothing is written yet: how many are before them, and how long it has been."""
    who = f"{ahead} ahead of you · " if ahead else ""
    return f"{who}{seconds:.0f} s"
