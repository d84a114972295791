"""Vectors of pictures and texts in the first stage's space, as OpenAI's endpoint for embeddings has them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator
from pydantic_core import from_json
from starlette.responses import JSONResponse, Response
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.inference.retrieval import Retriever
from qformer.errors import UserError
from serve.adapter import LoadedAdapter
from serve.api.chat import ChatService
from serve.api.errors import ApiError, invalid, too_busy, too_slow, unsupported
from serve.api.schemas import IGNORED, Part, Shape
from serve.engine.engine import Engine
from serve.engine.pending import Busy

MAX_INPUTS = 64
MAX_EMBEDDED_TEXT = 10_000  # characters of one text; the first stage reads far fewer


class EmbeddingRequest(Shape):
    """The body of `/v1/embeddings`."""

    input: Annotated[list[Part], Field(min_length=1, max_length=MAX_INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    queries: bool | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _parts(cls, given: Any) -> Any:
        listed = given if isinstance(given, list) else [given]
        return [{"type": "text", "text": one} if isinstance(one, str) else one for one in listed]

    @field_validator("input")
    @classmethod
    def _words(cls, parts: list[Part]) -> list[Part]:
        for part in parts:
            if part.type == "text" and not (part.text or "").strip():
                raise ValueError("a text is empty")
            if len(part.text or "") > MAX_EMBEDDED_TEXT:
                raise ValueError(f"a text has more than {MAX_EMBEDDED_TEXT:,} characters; shorten it")
        return parts


def parse_embedding_request(body: bytes | bytearray) -> EmbeddingRequest:
    """Read a request's body.

    Raises:
        ApiError: it is not JSON, has not the right form, or asks for what is not done here.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    for field in values:
        if values[field] is not None and field not in (EmbeddingRequest.model_fields.keys() | IGNORED):
            raise unsupported(field, "it is not known here, and might change the vectors; leave it out")
    try:
        return EmbeddingRequest.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None


class Embedder:
    """Embeds for all requests, with the first stages of an engine's adapters.

    Args:
        engine: whose thread does it, in its turn.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._retrievers: dict[str, Retriever] = {}

    def check(self, model: str) -> None:
        """Refuse an adapter without a text side.

        Raises:
            ApiError: it has none.
        """
        if not self.engine.adapter(model).assembly.vision_side.has_text_side:
            able = [name for name in self.engine.names if self.engine.adapter(name).assembly.vision_side.has_text_side]
            others = f"take {' or '.join(able)}" if able else "start the server with an adapter that has it"
            raise ApiError(
                400,
                f"model: '{model}' has no text side (bridge.text_branch) to compare pictures and texts with; {others}",
                param="model",
                code="unsupported_model",
            )

    def embed(self, model: str, inputs: Sequence[str | ImageRef]) -> Future[list[Tensor]]:
        """Unit vectors in the order of the inputs: [Q, E] of a picture, [1, E] of a text.

        Raises:
            Busy: too many wait.
        """

        def work(adapter: LoadedAdapter) -> list[Tensor]:
            if model not in self._retrievers:
                self._retrievers[model] = Retriever(adapter.assembly.vision_side)
            retriever = self._retrievers[model]
            pictures = [one for one in inputs if isinstance(one, ImageRef)]
            texts = [one for one in inputs if isinstance(one, str)]
            of_pictures = iter(retriever.embed_images(pictures) if pictures else ())
            of_texts = iter(retriever.embed_texts(texts) if texts else ())
            return [next(of_pictures) if isinstance(one, ImageRef) else next(of_texts)[None] for one in inputs]

        return self.engine.run(work, adapter=model)


async def embed_with(chat: ChatService, embedder: Embedder, body: bytearray, deadline: float) -> Response:
    """Answer the body of a request for embeddings.

    Args:
        chat: has pictures and the names of models.
        embedder: embeds.
        body: as it came.
        deadline: in the loop's time.

    Raises:
        ApiError: it is wrong, or it cannot be answered now or in time.
    """
    request = parse_embedding_request(body)
    model = chat.model(request.model)
    embedder.check(model)
    urls = [
        (f"input[{place}]", part.image_url.url)
        for place, part in enumerate(request.input)
        if part.image_url is not None
    ]
    try:
        async with asyncio.timeout_at(deadline):
            pictures = iter(await chat.pictures(urls))
            inputs = [part.text or "" if part.image_url is None else next(pictures) for part in request.input]
            vectors = await asyncio.wrap_future(embedder.embed(model, inputs))
    except TimeoutError:
        raise too_slow(chat.limits.request_timeout) from None
    except UserError as error:
        raise ApiError(400, str(error), param="input") from error
    except Busy as error:
        raise too_busy(str(error)) from error
    return JSONResponse(embedding_reply(request, model, vectors))


def embedding_reply(request: EmbeddingRequest, model: str, vectors: Sequence[Tensor]) -> dict[str, Any]:
    """The body of a response; a picture's single vector is the mean of its queries', at unit length.

    Args:
        request: what was asked.
        model: the adapter's name.
        vectors: as `Embedder.embed` gives them.
    """

    def told(vector: Tensor) -> Any:
        if request.encoding_format == "base64":
            return base64.b64encode(vector.float().contiguous().numpy().astype("<f4").tobytes()).decode()
        return vector.tolist()

    data = []
    for index, each in enumerate(vectors):
        single = torch.nn.functional.normalize(each.float().mean(dim=0), dim=0)
        entry: dict[str, Any] = {"object": "embedding", "index": index, "embedding": told(single)}
        if request.queries:
            entry["queries"] = [told(query) for query in each]
        data.append(entry)
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": 0, "total_tokens": 0}}
