"""Gradio's client for programs, with an end to its waiting."""

from __future__ import annotations

from typing import Any

from gradio_client import Client

SECONDS = 45


class PageClient(Client):
    """Asks again once if nothing came back.

    Gradio closes a client's stream of events when none is pending; an event that is sent at that moment can be lost
    on the way (seen once in some two hundred), and `Client.predict` would wait for it without end.
    """

    def predict(self, *args: Any, **options: Any) -> Any:
        """As `Client.predict`; TimeoutError if nothing comes twice."""
        try:
            return self.submit(*args, **options).result(timeout=SECONDS)
        except TimeoutError:
            return self.submit(*args, **options).result(timeout=SECONDS)
