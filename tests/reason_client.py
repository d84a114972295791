"""The official client asks for reasons and an answer, whole or in a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from api_server import user
from openai import OpenAI

LONGEST = 8  # tokens of an answer


@dataclass(frozen=True)
class Told:
    """A reply, whole or gathered from its chunks."""

    rationale: str | None
    text: str
    confidence: float
    usage: Any


def gathered(chunks: Any) -> Told:
    *worded, last, usage = chunks
    deltas = [chunk.choices[0].delta for chunk in worded]
    reasons = [(delta.model_extra or {}).get("reasoning_content") for delta in deltas]
    begun = [number for number, delta in enumerate(deltas) if delta.content]
    assert not any(reasons[begun[0] :] if begun else []), "reasons after the answer had begun"
    rationale = "".join(part or "" for part in reasons) if any(reasons) else None
    text = "".join(delta.content or "" for delta in deltas)
    return Told(rationale, text, last.model_extra["querybridge"]["confidence"], usage.usage)


def ask(client: OpenAI, *parts: Any, stream: bool = False, extra: dict[str, Any] | None = None, **options: Any) -> Told:
    values: dict[str, Any] = {"model": "both", "max_tokens": LONGEST, "messages": [user(*parts)]} | options
    values["extra_body"] = {"reason": True} | (extra or {})
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return gathered(client.chat.completions.create(**values, **options))
    reply = client.chat.completions.create(**values)
    message = reply.choices[0].message
    extras = reply.model_extra["querybridge"]
    return Told(message.model_extra["reasoning_content"], message.content, extras["confidence"], reply.usage)
