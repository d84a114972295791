"""Vectors of pictures and texts over the API, against those that search has."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_server import CHAT, data_uri, error_of, http, openai_client, served, user
from tiny import draw_data, save_tiny_bert, tiny_values

from adapters.data.image_ref import ImageRef
from adapters.finetune import finetune
from adapters.inference.retrieval import Retriever
from adapters.recipe import parse_recipe
from serve.engine.engine import Engine


@pytest.fixture(scope="module")
def hall(
    run_folder: Path, vision_folder: Path, language_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An adapter with a text side, and one without."""
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(folder / "cache"))
        values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(folder / "data"), max_steps=2)
        values["bridge"] |= {"start": str(save_tiny_bert(folder / "bert")), "text_branch": True}
        finetune(parse_recipe(values, "test"), folder / "text", device="cpu", dtype="float32", quiet=True)
        with Engine([folder / "text", run_folder], device="cpu", dtype="float32") as engine:
            yield engine


@pytest.fixture(scope="module")
def url(hall: Engine) -> Iterator[str]:
    with served(hall) as url:
        yield url


def test_texts_and_pictures_are_in_the_space_of_search(hall: Engine, url: str, data_file: Path) -> None:
    picture = data_file.parent / "1.png"
    retriever = Retriever(hall.adapter("text").assembly.vision_side)
    (queries,) = retriever.embed_images([ImageRef("it", path=picture)])
    (words,) = retriever.embed_texts(["a red square"])
    shown = {"type": "image_url", "image_url": data_uri(picture)}
    asked = {"input": ["a red square", shown], "queries": True}
    with http(url) as client:
        reply = client.post("/v1/embeddings", json=asked).json()
        packed = client.post("/v1/embeddings", json=asked | {"encoding_format": "base64"}).json()

    text, image = reply["data"]
    torch.testing.assert_close(torch.tensor(text["embedding"]), words, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(image["queries"]), queries, rtol=1e-4, atol=1e-5)
    mean = torch.nn.functional.normalize(queries.mean(dim=0), dim=0)
    torch.testing.assert_close(torch.tensor(image["embedding"]), mean, rtol=1e-4, atol=1e-5)
    unpacked = np.frombuffer(base64.b64decode(packed["data"][1]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(unpacked, image["embedding"], rtol=1e-6)
    assert reply["model"] == "text"
    found = openai_client(url).embeddings.create(model="text", input="a red square")
    assert found.data[0].embedding == pytest.approx(text["embedding"], abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"input": "a", "model": "tiny"}, "model", "'tiny' has no text side .*take text"),
        ({"input": []}, "input", "at least 1"),
        ({"input": " "}, "input", "a text is empty"),
        ({"input": [1, 2]}, "input[0]", "dictionary"),
        ({"input": "a", "dimensions": 8}, "dimensions", "not known here"),
        ({"input": {"type": "image_url", "image_url": "/etc/passwd"}}, "input", "is no data URI"),
        ({"input": {"type": "image_url", "image_url": data_uri(b"none")}}, "input", "is not a picture"),
    ],
)
def test_what_cannot_be_embedded_is_told(url: str, asked: dict[str, Any], param: str, says: str) -> None:
    with http(url) as client:
        reply = client.post("/v1/embeddings", json=asked)
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param
    assert re.search(says, error_of(reply)["message"])


def test_models_say_what_they_can_do(url: str) -> None:
    with http(url) as client:
        listed = client.get("/v1/models").json()["data"]
        client.post(CHAT, json={"messages": [user("hm?")], "model": "tiny", "max_tokens": 1})
    can = {model["id"]: model["querybridge"] for model in listed}
    assert can["text"]["embeddings"] and not can["tiny"]["embeddings"]
    assert can["tiny"] == {
        "task": "vqa", "pictures": True, "longest_prompt": 2048, "reasons": False, "embeddings": False, "forms": True,
        "logprobs": True,
    }  # fmt: skip
