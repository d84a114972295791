"""How much people may send: a request of the API, and what is uploaded on the page."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROMPT = 8192  # tokens that a request may ask a model to read
MAX_FILE_SIZE = "64mb"  # of a file that is uploaded on the page
MAX_UPLOADS = 2 * 2**30  # bytes of all files that are uploaded on the page; then old ones go
UPLOAD_SECONDS = 600.0  # that an upload stays at the least
MAX_TURN_PICTURES = 8  # in a turn of a conversation on the page
MAX_SEARCHED_UPLOADS = 200  # pictures that are uploaded on the page to be searched


@dataclass(frozen=True)
class Limits:
    """What a request to the API may ask for; `querybridge serve` takes its defaults from here.

    Attributes:
        request_timeout: seconds for a whole request, its waiting included.
        max_body: bytes of a request's body; and of its pictures that are fetched from elsewhere, together.
        max_images: pictures of one request.
        max_tokens: the longest answer; what is given to who asks for more, or names no number. No reasons are longer.
        max_per_client: requests of one address that are handled at a time; None sets no bound but that of all.
    """

    request_timeout: float = 120.0
    max_body: int = 20 * 2**20
    max_images: int = 8
    max_tokens: int = 512
    max_per_client: int | None = None
