"""What the server tells Prometheus about itself."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from serve.engine.pending import Answer

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one app, in a registry of its own.

    Args:
        waiting: how many requests wait for the engine.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU seconds, open files
        self.requests = Counter(
            "querybridge_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self.registry
        )
        self.in_flight = Gauge("querybridge_requests_in_flight", "Requests being handled.", registry=self.registry)
        queue = Gauge("querybridge_requests_waiting", "Requests in the engine's queue.", registry=self.registry)
        queue.set_function(waiting)
        self.prompt_tokens = Counter(
            "querybridge_prompt_tokens", "Tokens read, pictures' included.", ["adapter"], registry=self.registry
        )
        self.generated_tokens = Counter(
            "querybridge_generated_tokens", "Tokens written.", ["adapter"], registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "querybridge_first_token_seconds", "From a request's arrival in the queue to its first token.", ["adapter"],
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self.answer_seconds = Histogram(
            "querybridge_answer_seconds", "From a request's arrival in the queue to its whole answer.", ["adapter"],
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip

    def answered(self, answer: Answer, *, first: float, whole: float) -> None:
        """Count an answer, with the seconds to its first token and to its end."""
        self.prompt_tokens.labels(answer.adapter).inc(answer.prompt_tokens)
        self.generated_tokens.labels(answer.adapter).inc(answer.tokens)
        self.first_token_seconds.labels(answer.adapter).observe(first)
        self.answer_seconds.labels(answer.adapter).observe(whole)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
