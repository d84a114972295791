"""An adapter as a model of lmms-eval, so that its tasks score it as they score others.

    python -m serve.lmms_eval --model querybridge --model_args adapter=runs/mine --tasks vqav2_val_lite --batch_size 16

lmms-eval is not installed with this project (`pip install lmms-eval`). `register` tells it of the model; the command
above does so and then runs lmms-eval's own command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, load_adapter, user_turn

NAME = "querybridge"
_IGNORED = {"do_sample", "image_aspect_ratio", "image_sizes", "use_cache"}  # they change nothing in what is asked here
_UNSET = {"temperature": 0, "top_p": 1, "num_beams": 1}


def model_class() -> type:
    """The class that lmms-eval makes models of: its own `lmms`, answered by an adapter.

    Raises:
        UserError: lmms-eval is not installed.
    """
    try:
        base = import_module("lmms_eval.api.model").lmms
    except ImportError as error:
        raise UserError(f"lmms-eval cannot be imported ({error}): pip install lmms-eval") from error
    return type("QueryBridge", (QueryBridgeMethods, base), {"__doc__": QueryBridgeMethods.__doc__})


def register() -> None:
    """Tell lmms-eval of the model `querybridge`.

    Raises:
        UserError: lmms-eval is not installed.
    """
    made = model_class()
    globals()["QueryBridge"] = made  # lmms-eval looks the class up by its path
    models = import_module("lmms_eval.models")
    manifest = import_module("lmms_eval.models.registry_v2").ModelManifest(
        model_id=NAME, simple_class_path=f"{__name__}.QueryBridge"
    )
    models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


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
        if name == "max_new_tokens" or name == "num_beams":
            decoding = replace(decoding, **{name: int(value)})
        elif name in ("temperature", "top_p"):
            decoding = replace(decoding, **{name: float(value)})
        else:
            raise UserError(f"--gen_kwargs {name}={value}: {NAME} does not have this setting; leave it out")
    return decoding if decoding.num_beams > 1 else replace(decoding, length_penalty=Decoding.length_penalty)


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the strings that end it."""
    for end in [until] if isinstance(until, str) else until or []:
        if end:
            text = text.split(end)[0]
    return text.strip()


if __name__ == "__main__":
    try:
        # as `serve.lmms_eval`, not `__main__`: lmms-eval imports the class by that name
        import_module("serve.lmms_eval").register()
    except UserError as mistake:
        print(f"querybridge: {mistake}", file=sys.stderr)
        sys.exit(2)
    import_module("lmms_eval.cli.dispatch").main()
