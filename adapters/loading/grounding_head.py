"""An artefact's grounding head: one file with its weights and what it needs to know, and the frozen parts it reads.

    grounding.safetensors  the head's weights in bfloat16; its facts as JSON in the file's own metadata

It depends on the image encoder (with its weight delta) and on a text encoder, both frozen, and not on the bridge: it
stays valid if the bridge is trained further. Both are known by their fingerprints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.loading.bridge_start import BridgeTokenizer, bridge_tokenizer
from adapters.loading.bundled import bundled
from adapters.loading.vision_side import GROUNDING_FILE
from adapters.loading.weight_deltas import read_weight_delta
from qformer.atomic import whole_file
from qformer.errors import UserError
from qformer.grounding import GroundingConfig, GroundingHead
from qformer.image_encoders import EfficientNetLiteEncoder, ImageEncoder
from qformer.quiet import quiet_transformers
from qformer.sources import fingerprint, resolve
from qformer.tensor_names import describe_differences
from qformer.vision_loading import load_image_encoder

__all__ = ["GROUNDING_FILE"]
LONGEST_PHRASE = 32  # tokens
_VERSION = 1
_FACTS = "querybridge.grounding"


@dataclass(frozen=True)
class GroundingFacts:
    """What is known about a grounding head besides its weights.

    Attributes:
        config: its sizes.
        tower: source of the image encoder.
        difference: the weight delta that is added to it, or None.
        image_size: side in pixels of the square picture.
        layers: hidden states of the tower that it reads, the finest map's first.
        text: source of the text encoder, a BERT.
        fingerprints: of both, "tower" and "text".
        data: name and size of the training data.
        metrics: what was measured, by name; fractions.
        terms: of the training data, and of the weight delta's, one a line.
        version: of this file's layout.
    """

    config: GroundingConfig
    tower: str
    difference: str | None
    image_size: int
    layers: tuple[int, ...]
    text: str
    fingerprints: Mapping[str, str]
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    terms: tuple[str, ...] = ()
    version: int = _VERSION


class PhraseEncoder(nn.Module):
    """A frozen BERT that reads phrases.

    Args:
        source: see `qformer.sources.resolve`.
        offline: fetch nothing.

    Attributes:
        width: of its hidden states.
        fingerprint: of its weights.

    Raises:
        UserError: the source cannot be had, or is no BERT with a tokenizer.
    """

    def __init__(self, source: str, *, offline: bool = False) -> None:
        super().__init__()
        from transformers import BertModel

        folder = resolve(source, offline=offline)
        self.tokenizer: BridgeTokenizer = bridge_tokenizer(folder, "text_branch")
        try:
            with quiet_transformers():
                model = BertModel.from_pretrained(
                    folder, add_pooling_layer=False, local_files_only=True, dtype=torch.float32
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{source}: its BERT cannot be loaded ({str(error).splitlines()[0][:200]})") from error
        self.model: Any = model.eval().requires_grad_(False)
        self.width = int(model.config.hidden_size)
        self.fingerprint = fingerprint(folder)

    def train(self, mode: bool = True) -> PhraseEncoder:
        """Stay in evaluation mode: frozen means frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Phrases as hidden states [N, T, width] and mask [N, T] bool; case and repeated blanks do not matter."""
        device = next(self.model.parameters()).device
        plain = [" ".join(phrase.lower().split()) for phrase in phrases]
        ids, mask = (part.to(device) for part in self.tokenizer(plain, longest=LONGEST_PHRASE))
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return hidden, mask


class TowerMaps(nn.Module):
    """Maps of a frozen EfficientNet-Lite, from one pass.

    Args:
        encoder: the tower, uncut or cut at the last of the layers or after it.
        layers: hidden states, the finest map's first.

    Raises:
        UserError: the tower is of another architecture, or has no such layers.
    """

    def __init__(self, encoder: ImageEncoder, layers: tuple[int, ...]) -> None:
        super().__init__()
        if not isinstance(encoder, EfficientNetLiteEncoder):
            raise UserError(f"a grounding head reads maps of an EfficientNet-Lite, not {encoder.architecture}'s tokens")
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= encoder.layer:
            raise UserError(f"--layers {list(layers)}: take some of 0 to {encoder.layer}, in rising order")
        self.encoder = encoder
        self.layers = layers

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [B, 3, S, S] → a map [B, C, R, R] for each layer, in fp32."""
        weight = next(self.encoder.model.parameters())
        pixels = pixels.to(device=weight.device, dtype=weight.dtype).contiguous(memory_format=torch.channels_last)
        found: list[Tensor] = []
        for number, part in enumerate(self.encoder.model.hidden_states(pixels)):
            if number in self.layers:
                found.append(part.float())
            if number == self.layers[-1]:
                break
        return found


@dataclass
class LoadedHead:
    """A grounding head with the frozen parts that it reads.

    Attributes:
        head: the trained part.
        maps: of the tower.
        phrases: the text encoder.
        facts: what is known of it.
    """

    head: GroundingHead
    maps: TowerMaps
    phrases: PhraseEncoder
    facts: GroundingFacts

    @property
    def encoder(self) -> ImageEncoder:
        """The tower."""
        return self.maps.encoder


def load_tower(
    source: str,
    difference: str | None,
    image_size: int,
    layers: tuple[int, ...],
    *,
    device: str = "cpu",
    offline: bool = False,
    artefact: Path | None = None,
) -> TowerMaps:
    """The tower that a head reads.

    Raises:
        UserError: it cannot be had, or is of another architecture.
    """
    added = read_weight_delta(difference, artefact) if difference is not None else None
    encoder = load_image_encoder(
        bundled(source, artefact),
        layer=-1,  # a weight delta may name tensors up to the head
        image_size=image_size,
        weight_delta=added.folder if added is not None else None,
        device=device,
        offline=offline,
    )
    return TowerMaps(encoder, layers)


def save_grounding_head(path: Path, head: GroundingHead, facts: GroundingFacts) -> None:
    """Write a head into a file, in bfloat16, replacing an earlier one in a single step.

    Raises:
        UserError: it cannot be written.
    """
    state = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    try:
        with whole_file(path) as partial:
            save_file(state, partial, metadata={"format": "pt", _FACTS: json.dumps(asdict(facts), ensure_ascii=False)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the grounding head cannot be written ({error}); free space") from error


def read_grounding_facts(path: Path) -> GroundingFacts:
    """The facts in a head's file.

    Raises:
        UserError: it is damaged, of a newer layout, or none of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_FACTS])
        if values["version"] > _VERSION:
            raise UserError(f"{path}: layout {values['version']} is newer than this querybridge reads; update it")
        config = values["config"]
        values["config"] = GroundingConfig(**config | {"widths": tuple(config["widths"])})
        values["layers"], values["terms"] = tuple(values["layers"]), tuple(values["terms"])
        return GroundingFacts(**values)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or no grounding head ({error}); fetch a fresh copy") from error


def load_grounding_head(
    path: Path, *, device: str = "cpu", offline: bool = False, artefact: Path | None = None
) -> LoadedHead:
    """Load a head and the frozen parts it names, and check that they are the very ones.

    Args:
        path: its file.
        device: where it runs.
        offline: take frozen weights from the cache only.
        artefact: the folder that a bundled tower or a copied weight delta lies in.

    Raises:
        UserError: the file or a frozen part cannot be had, is another one, or does not fit.
    """
    facts = read_grounding_facts(path)
    maps = load_tower(
        facts.tower, facts.difference, facts.image_size, facts.layers, device=device, offline=offline, artefact=artefact
    )
    phrases = PhraseEncoder(bundled(facts.text, artefact), offline=offline).to(device)
    found = {"tower": str(maps.encoder.weights), "text": phrases.fingerprint}
    for role, expected in facts.fingerprints.items():
        if found.get(role) != expected:
            raise UserError(
                f"{path}: it was trained on {role} weights {expected[:19]}…, here are {found.get(role, 'none')[:19]}…;"
                " use the ones it was trained on"
            )
    head = GroundingHead(facts.config)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
    if differences := describe_differences(state, head.state_dict()):
        raise UserError(f"{path}: its weights do not fit its sizes: {differences}")
    head.load_state_dict(state)
    return LoadedHead(head.to(device).eval().requires_grad_(False), maps, phrases, facts)
