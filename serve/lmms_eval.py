"""An adapter as a model of lmms-eval, so that its tasks score it as they score others.

    lmms-eval eval --model querybridge --model_args adapter=runs/mine --tasks pope --batch_size 16

lmms-eval is not installed with this project. If it is (`pip install lmms-eval`), it finds the model by this
distribution's entry point `lmms_eval.models`, which names `manifest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, load_adapter, user_turn

NAME = "querybridge"
_IGNORED = {"do_sample", "image_aspect_ratio", "image_sizes", "use_cache"}  # they change nothing in what is asked here


def manifest() -> Any:
    """What lmms-eval registers: the model's name, and where its class is."""
    registry = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.QueryBridge")


def __getattr__(name: str) -> type:
    """`QueryBridge`, a subclass of lmms-eval's own `lmms`, once it is asked for: only then is lmms-eval imported."""
    if name != "QueryBridge":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = import_module("lmms_eval.api.model").lmms
    made = type("QueryBridge", (QueryBridgeMethods, base), {"__doc__": QueryBridgeMethods.__doc__})
    globals()[name] = made
    return made


class QueryBridgeMethods:
    """What lmms-eval asks of a model, answered by an adapter.

    Args:
        adapter: a run's folder, an artefact's folder or a shipped adapter's name; the default one if left out.
        batch_size: prompts generated together.
        device: "cpu", "cuda", …; a GPU if there is one.
        dtype: "float32" or "bfloat16".
        max_new_tokens: the longest answer if a task does not say it; as the adapter's recipe says if left out.

    Raises:
        UserError: the adapter cannot be loaded, or an argument is not known.
    """

    is_simple = True  # requests are (context, settings, visuals, doc_id, task, split)
    task_dict: Any
    cache_hook: Any

    def __init__(
        self,
        adapter: str | None = None,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int | str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        given = sorted(name for name, value in unknown.items() if value is not None and name != "max_batch_size")
        if given:
            raise UserError(f"--model_args {given[0]}: {NAME} takes adapter, batch_size, device, dtype, max_new_tokens")
        self.adapter: LoadedAdapter = load_adapter(adapter, device=device, dtype=dtype)
        self._batch = int(batch_size)
        decoding = self.adapter.default_decoding("vqa")
        longest = decoding.max_new_tokens if max_new_tokens is None else int(max_new_tokens)
        self._decoding = replace(decoding, max_new_tokens=longest)

    @property
    def batch_size(self) -> int:
        """Prompts generated together."""
        return self._batch

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests whose `args` are (context, settings, doc_to_visual, doc_id, task, split), in their order.

        `<image>` marks in a context place its pictures; without marks they come first. A task's `max_new_tokens`,
        `temperature`, `top_p`, `num_beams` and `until` are heeded.

        Raises:
            UserError: a task sets something else, or asks about something that is no picture.
        """
        decodings, made = [], []
        for request in requests:
            context, settings, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            flat = [one for visual in visuals for one in (visual if isinstance(visual, list) else [visual])]
            made.append(self.adapter.chat_request([user_turn(flat, context)]))
            decodings.append(decoding_of(settings, self._decoding))
        answers = [""] * len(requests)
        for decoding in dict.fromkeys(decodings):
            places = [place for place, other in enumerate(decodings) if other == decoding]
            for start in range(0, len(places), self._batch):
                chosen = places[start : start + self._batch]
                said = self.adapter.generator([made[place] for place in chosen], decoding)
                for place, one in zip(chosen, said, strict=True):
                    context, settings = requests[place].args[:2]
                    answers[place] = cut(one.text, settings.get("until"))
                    self.cache_hook.add_partial("generate_until", (context, settings), answers[place])
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: tasks of several rounds are not supported."""
        raise UserError(f"--tasks: {NAME} answers tasks of one round; leave out those of several")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: tasks that rank given answers by likelihood are not supported."""
        raise UserError(f"--tasks: {NAME} answers tasks that generate; leave out those that rank by likelihood")


def decoding_of(settings: dict[str, Any], usual: Decoding) -> Decoding:
    """What a task's generation settings mean here.

    Raises:
        UserError: a setting is not known.
    """
    values = {name: value for name, value in settings.items() if value is not None and name not in _IGNORED}
    values.pop("until", None)
    if settings.get("do_sample") is False:
        values["temperature"] = 0
    decoding = usual
    for name, value in values.items():
        if name == "max_new_tokens":
            decoding = replace(decoding, max_new_tokens=int(value))
        elif name == "num_beams":
            decoding = replace(decoding, num_beams=int(value))
        elif name == "temperature":
            decoding = replace(decoding, temperature=float(value))
        elif name == "top_p":
            decoding = replace(decoding, top_p=float(value))
        else:
            raise UserError(f"--gen_kwargs {name}={value}: {NAME} does not have this setting; leave it out")
    return decoding if decoding.num_beams > 1 else replace(decoding, length_penalty=Decoding.length_penalty)


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the strings that end it."""
    for end in [until] if isinstance(until, str) else until or []:
        if end:
            text = text.split(end)[0]
    return text.strip()
