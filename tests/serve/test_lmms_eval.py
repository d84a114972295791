"""The model of lmms-eval against a stand-in of its interface: what it asks, and how it finds and makes the class."""

from __future__ import annotations

import abc
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import serve.lmms_eval
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter
from serve.lmms_eval import cut, decoding_of


class Interface(abc.ABC):
    """`lmms_eval.api.model.lmms` as its version 0.7 has it: what is abstract, and how it is made from a flag."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), dict[str, Any]()

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arguments: str, more: dict[str, Any]) -> Any:
        given = dict(pair.split("=") for pair in arguments.split(","))
        return cls(**given, **{name: value for name, value in more.items() if value is not None})


class CacheHook:
    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, str]] = []

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        self.kept.append((attr, req, res))


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture
def lmms(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in (
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Interface  # type: ignore[attr-defined]
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    yield serve.lmms_eval
    vars(serve.lmms_eval).pop("QueryBridge", None)


def test_it_is_found_by_the_entry_point(lmms: Any) -> None:
    """As lmms-eval's registry does: the entry point's manifest names a path, and its class is a subclass of `lmms`."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (path,) = project["entry-points"]["lmms_eval.models"].values()
    manifest = EntryPoint("querybridge", path, "lmms_eval.models").load()()
    assert manifest.model_id == "querybridge"
    module, name = manifest.simple_class_path.rsplit(".", 1)
    made = getattr(sys.modules[module], name)
    assert issubclass(made, Interface) and made.is_simple and made.__name__ == "QueryBridge"
    assert getattr(lmms, name) is made
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        lmms.Other  # noqa: B018


def test_it_answers_as_the_adapter_does(lmms: Any, run_folder: Path, data_file: Path, engine: LoadedAdapter) -> None:
    model = lmms.QueryBridge.create_from_arg_string(
        f"adapter={run_folder},max_new_tokens=5", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    pictures = [Image.open(data_file.parent / f"{number}.png") for number in range(3)]
    model.task_dict = {"colours": {"test": [{"images": pictures[:1]}, {"images": pictures[1:]}, {"images": []}]}}

    def request(text: str, document: int, **settings: Any) -> Instance:
        return Instance((text, settings, lambda row: row["images"], document, "colours", "test"))

    asked = [
        request("what colour is it?", 0),
        request("which <image> or <image>?", 1, max_new_tokens=3, do_sample=False, until=["\n\n"]),
        request("is it red?", 0, temperature=0, num_beams=1),
        request("hello", 2),
    ]
    said = model.generate_until(asked)
    five, three = Decoding(max_new_tokens=5), Decoding(max_new_tokens=3)
    assert said == [
        engine.ask(pictures[0], "what colour is it?", decoding=five).strip(),
        cut(engine.ask(pictures[1:], "which <image> or <image>?", decoding=three), "\n\n"),
        engine.ask(pictures[0], "is it red?", decoding=five).strip(),
        engine.ask([], "hello", decoding=five).strip(),
    ]
    assert sorted(kept[2] for kept in model.cache_hook.kept) == sorted(said)
    assert model.batch_size == 2
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="--tasks: querybridge answers tasks"):
            refused(asked)
    with pytest.raises(UserError, match="--model_args pretrained: querybridge takes adapter"):
        lmms.QueryBridge(pretrained="x")


def test_settings_of_tasks() -> None:
    usual = Decoding(max_new_tokens=10, num_beams=5, length_penalty=-1.0)
    assert decoding_of({}, usual) == usual
    assert decoding_of({"num_beams": 1, "top_p": None, "max_new_tokens": "16"}, usual) == Decoding(max_new_tokens=16)
    assert decoding_of({"do_sample": False, "temperature": 0.7}, Decoding()).temperature == 0
    sampled = decoding_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "x"}, Decoding())
    assert (sampled.temperature, sampled.top_p) == (0.7, 0.9)
    with pytest.raises(UserError, match="--gen_kwargs stop_token=3: querybridge does not have this setting"):
        decoding_of({"stop_token": 3}, Decoding())


@pytest.mark.parametrize(
    ("text", "until", "left"),
    [("a b\n\nc", ["\n\n"], "a b"), ("a b", None, "a b"), ("yes. no", ".", "yes"), ("a;b,c", [",", ";", ""], "a")],
)
def test_texts_end_where_a_task_says(text: str, until: Any, left: str) -> None:
    assert cut(text, until) == left
