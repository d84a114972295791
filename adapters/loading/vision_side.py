"""What a recipe names up to the bridge, loaded: towers with their caches, norm, Q-Former, and its text side.

Enough by itself for BLIP-2's first stage and for retrieval; `adapters.loading.assembly` adds the
language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.data.image_ref import ImageRef
from adapters.features.cache import FeatureCache, pictures_together
from adapters.features.reading import FeatureSource
from adapters.loading.bridge_start import BridgeStart, BridgeTokenizer, start_bridge
from adapters.loading.bundled import bundled
from adapters.loading.weight_deltas import WeightDelta, read_weight_delta
from adapters.recipe import BridgeSection, Recipe, TowerSection
from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.feature_norm import FeatureNorm
from qformer.image_encoders import ImageEncoder
from qformer.language import LanguageModel
from qformer.objectives import Heads
from qformer.precision import limit_kernel_cache
from qformer.representation import RepresentationModel
from qformer.simple_bridges import SimpleBridge, vectors_of
from qformer.vision_loading import load_image_encoder

MAX_INSTRUCTION = 128  # tokens of an instruction that the bridge reads, as in InstructBLIP
GROUNDING_FILE = "grounding.safetensors"
"""Of an artefact: its grounding head, if it has one."""
MAX_TEXT = 32  # tokens of a caption in the first stage, as in BLIP-2


@dataclass
class VisionSide:
    """Everything up to the bridge.

    Attributes:
        recipe: what it was built from.
        encoders: the frozen towers.
        caches: one feature cache a tower.
        feature_norm: norm over the towers' features.
        bridge: the Q-Former, or what it is measured against.
        heads: of the first stage's objectives, if the bridge has a text branch.
        tokenizer: the bridge's own, if it reads text.
        fingerprints: of the frozen weights, by role: "vision.0", "bridge.start".
        differences: what was added to towers' weights, by the tower's place.
        start: what the bridge started from, if its recipe names it.
        sources: in training, one a tower: where features come from in place of its cache; else empty.
        grounding: the file of the artefact's grounding head, if it has one.
    """

    recipe: Recipe
    encoders: list[ImageEncoder]
    caches: list[FeatureCache]
    feature_norm: FeatureNorm
    bridge: QFormer | SimpleBridge
    heads: Heads | None
    tokenizer: BridgeTokenizer | None
    fingerprints: dict[str, str]
    differences: dict[int, WeightDelta]
    start: BridgeStart | None = None
    sources: list[FeatureSource] = field(default_factory=list)
    grounding: Path | None = None

    @property
    def encoder_sources(self) -> tuple[str, ...]:
        """Where each tower is from, in their order: `pypi:NAME`, a hub's name or a folder."""
        return tuple(tower.source for tower in self.recipe.vision.towers)

    @property
    def bridge_kind(self) -> str:
        """The kind of bridge: "qformer", or a simpler one: "mean", "patches" or "gated"."""
        return self.recipe.bridge.kind

    @property
    def reads_instructions(self) -> bool:
        """Whether the bridge reads a question together with the picture (InstructBLIP)."""
        return self.recipe.bridge.instruction_aware

    @property
    def has_text_side(self) -> bool:
        """Whether the bridge compares texts with pictures, as search does."""
        return self.recipe.bridge.text_branch

    @property
    def terms(self) -> list[str]:
        """Of the pictures that its towers were trained further on; what is trained behind them inherits them."""
        return [difference.terms for difference in self.differences.values() if difference.terms]

    def features(self, images: Sequence[ImageRef]) -> list[Tensor]:
        """Features of pictures, one tensor [B, P, D] a tower, from the cache if it has them."""
        return [source.load(images) for source in self.sources or self.caches]

    def expect(self, images: Sequence[ImageRef]) -> None:
        """Begin to prepare the features of pictures that will be asked for soon, in training; nothing else changes."""
        for source in self.sources:
            source.expect(images)

    def parts(self) -> Mapping[str, nn.Module]:
        """The modules that are trained, by name."""
        parts: dict[str, nn.Module] = {"feature_norm": self.feature_norm, "bridge": self.bridge}
        return parts if self.heads is None else parts | {"heads": self.heads}

    def representation(self, compute_dtype: torch.dtype = torch.float32) -> RepresentationModel:
        """The model of the first stage over these very modules.

        Raises:
            UserError: the recipe's bridge has no text branch.
        """
        if self.heads is None or self.tokenizer is None or isinstance(self.bridge, SimpleBridge):
            raise UserError("bridge.text_branch: it is off, so pictures and texts cannot be compared; set it to true")
        return RepresentationModel(
            self.feature_norm, self.bridge, self.heads, decode_id=self.tokenizer.decode_id, compute_dtype=compute_dtype
        )


@dataclass
class FrozenModels:
    """Towers and LLMs that are loaded already, so that several adapters share them.

    Attributes:
        towers: with its feature cache, by what the recipe says of it.
        languages: by source, quantisation, dtype and device; each further adapter gets a sibling.
    """

    towers: dict[tuple[object, ...], tuple[ImageEncoder, FeatureCache]] = field(default_factory=dict)
    languages: dict[tuple[object, ...], LanguageModel] = field(default_factory=dict)


def load_vision_side(
    recipe: Recipe,
    *,
    device: str = "cpu",
    offline: bool = False,
    frozen: FrozenModels | None = None,
    artefact: Path | None = None,
) -> VisionSide:
    """Load the towers a recipe names and build norm, bridge and heads, with fresh weights drawn from the recipe's seed.

    Args:
        recipe: what to build.
        device: where it runs.
        offline: take frozen weights from the cache only.
        frozen: towers that are loaded already; new ones join them.
        artefact: the folder that the recipe is from, if it is an artefact's.

    Raises:
        UserError: weights cannot be had, or parts do not fit.
    """
    limit_kernel_cache()
    check_device(device)
    fingerprints: dict[str, str] = {}
    frozen = frozen or FrozenModels()
    towers: list[tuple[ImageEncoder, FeatureCache]] = []
    differences: dict[int, WeightDelta] = {}
    for index, tower in enumerate(recipe.vision.towers):
        if tower.difference is not None:
            differences[index] = read_weight_delta(tower.difference, artefact)
        added = differences.get(index)
        key = (
            *tower.model_dump(exclude={"difference"}).values(),
            added.digest() if added is not None else None,
            device,
        )
        if key not in frozen.towers:
            encoder = load_image_encoder(
                bundled(tower.source, artefact),
                layer=tower.layer,
                class_token=tower.class_token,
                image_size=tower.image_size,
                weight_delta=added.folder if added is not None else None,
                device=device,
                dtype=tower_dtype(tower, device),
                offline=offline,
            )
            cache = FeatureCache(encoder, together=pictures_together(device), half=tower.features == "float16")
            frozen.towers[key] = (encoder, cache)
        towers.append(frozen.towers[key])
        fingerprints[f"vision.{index}"] = str(towers[-1][0].identity()["fingerprint"])
    encoders, caches = [encoder for encoder, _ in towers], [cache for _, cache in towers]
    torch.manual_seed(recipe.train.seed)  # fresh weights depend on the seed and on nothing before
    feature_norm = FeatureNorm(encoders)
    bridge = build_bridge(recipe.bridge, feature_norm)
    start = _bridge_start(recipe.bridge, bridge, feature_norm, fingerprints, offline=offline, artefact=artefact)
    heads = Heads(bridge.config).to(device) if recipe.bridge.text_branch else None
    if start is not None and heads is not None:
        start.put_heads(heads)
    feature_norm, bridge = feature_norm.to(device), bridge.to(device)
    tokenizer = start.tokenizer if start is not None else None
    head = artefact / GROUNDING_FILE if artefact is not None else None
    return VisionSide(
        recipe, encoders, caches, feature_norm, bridge, heads, tokenizer, fingerprints, differences, start,
        grounding=head if head is not None and head.is_file() else None,
    )  # fmt: skip


def tower_dtype(tower: TowerSection, device: str) -> torch.dtype:
    """What a tower computes in: as its recipe says, else float32 on a CPU and float16 elsewhere."""
    if tower.dtype is not None:
        chosen: torch.dtype = getattr(torch, tower.dtype)
        return chosen
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def bridge_config(section: BridgeSection, encoder_width: int) -> BridgeConfig:
    """A recipe's bridge section as the Q-Former's configuration."""
    given = section.model_dump(exclude={"kind", "preset", "start", "reader", "hide_queries"}, exclude_none=True)
    return BridgeConfig.preset(section.preset, encoder_width=encoder_width, **given)


def build_bridge(section: BridgeSection, feature_norm: FeatureNorm) -> QFormer | SimpleBridge:
    """The bridge of a recipe, with fresh weights.

    Raises:
        UserError: a simpler bridge with what only the Q-Former has.
    """
    if section.hide_queries and section.reader is None:
        raise UserError(
            f"bridge.hide_queries={section.hide_queries:g}: without a reader the LLM would see nothing; set it to 0, or"
            " set bridge.reader"
        )
    config = bridge_config(section, feature_norm.width)
    if section.kind == "qformer":
        return QFormer(config)
    for name in ("start", "text_branch", "instruction_aware", "num_queries", "num_layers", "patch_dropout"):
        if getattr(section, name):
            raise UserError(f"bridge.{name}: only the Q-Former has it; leave it out, or set bridge.kind=qformer")
    count = vectors_of(section.kind, feature_norm.num_tokens)
    return SimpleBridge(replace(config, num_queries=count), section.kind)


def _bridge_start(
    section: BridgeSection,
    bridge: QFormer | SimpleBridge,
    feature_norm: FeatureNorm,
    fingerprints: dict[str, str],
    *,
    offline: bool,
    artefact: Path | None,
) -> BridgeStart | None:
    """Copy published weights into a bridge, if its recipe names any."""
    reads = "instruction_aware" if section.instruction_aware else "text_branch" if section.text_branch else None
    if section.start is None or isinstance(bridge, SimpleBridge):
        if reads is not None:
            raise UserError(f"bridge.{reads}: needs bridge.start, whose tokenizer reads the text")
        return None
    source = bundled(section.start, artefact)
    return start_bridge(source, bridge, feature_norm, fingerprints, reads=reads, offline=offline)


def check_device(device: str) -> None:
    """Raise a UserError if the device is not one torch has here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {device}: torch cannot use it here; take cpu, or see querybridge doctor") from error


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
