"""Where the bridge looks: the attention of its queries over the towers' places, laid back onto the picture.

Weights are what the Q-Former's cross-attention itself computes, averaged over heads. They say where it read, not why an
answer came out as it did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.loading.vision_side import MAX_INSTRUCTION, VisionSide
from qformer.bridge import QFormer
from qformer.errors import UserError
from qformer.transform import seen_box

CAVEAT = (
    "Attention shows where the bridge reads, not why an answer comes out: other places can matter as much, and a strong"
    " weight may do nothing."
)
CLASS_TOKEN = "the class token"
COLOUR_MAP = "inferno"
_SHOWN = 1024  # pixels, the longest side of a drawn picture
_COLDEST = 0.35  # where in the colour map the heat begins: what is darker would be lost on a dark picture
_VEIL = 0.85  # how much of the picture is covered where attention is strongest
_GROUND = 0.85  # brightness of the grey picture below


@dataclass(frozen=True)
class Places:
    """Where the tokens of one tower lie.

    Attributes:
        name: the tower's.
        rows: middles of the rows of tokens, and of the columns too, along the side of the square that it sees (0 to 1).
        box: the part of the picture that the square shows, as left, top, right and bottom in the picture's pixels.
        class_token: whether a token that is no place comes before them.
    """

    name: str
    rows: tuple[float, ...]
    box: tuple[float, float, float, float]
    class_token: bool

    @property
    def tokens(self) -> int:
        """How many tokens the tower has."""
        return len(self.rows) ** 2 + int(self.class_token)


@dataclass(frozen=True)
class Attention:
    """What the queries looked at in one picture.

    Attributes:
        weights: [L, Q, P], L layers that look at the picture, Q queries, P tokens of all towers; each row adds up to 1.
        layers: numbers of these layers in the bridge, counted from 1.
        towers: where the tokens lie, in their order.
        size: width and height of the picture, in pixels.
    """

    weights: Tensor
    layers: tuple[int, ...]
    towers: tuple[Places, ...]
    size: tuple[int, int]

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return self.weights.shape[1]

    def chosen(self, query: int = 0, layer: int = 0) -> Tensor:
        """Weights [P] of one query, counted from 1, in one layer, by its number; 0 takes the mean over all.

        Raises:
            UserError: there is no such query or layer.
        """
        if not 0 <= query <= self.queries:
            raise UserError(f"--query {query}: take 1 to {self.queries}, or 0 for all together")
        if layer != 0 and layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise UserError(f"--layer {layer}: it does not look at the picture; take one of {known}, or 0 for all")
        weights = self.weights.mean(dim=0) if layer == 0 else self.weights[self.layers.index(layer)]  # [Q, P]
        return weights.mean(dim=0) if query == 0 else weights[query - 1]

    def heat(self, size: tuple[int, int], query: int = 0, layer: int = 0) -> np.ndarray:
        """Attention over the picture [height, width], interpolated between places.

        1 is what every place would get if attention were spread evenly over all tokens; what no tower sees is 0.

        Args:
            size: width and height of what comes out.
            query: as in `chosen`.
            layer: as in `chosen`.
        """
        heat = np.zeros((size[1], size[0]))
        start = 0
        weights = self.chosen(query, layer).double().numpy()
        for tower in self.towers:
            side = len(tower.rows)
            first = start + int(tower.class_token)
            grid = weights[first : first + side * side].reshape(side, side)
            # a share of a place for a share of its ground: towers of fine and of coarse grids add up
            heat += heat_over(grid, tower.rows, tower.box, self.size, size) * side * side
            start += tower.tokens
        return heat * len(weights) / sum(len(tower.rows) ** 2 for tower in self.towers)

    def shares(self, query: int = 0, layer: int = 0) -> dict[str, float]:
        """How much of the attention rests on each tower's places, and on class tokens, if there are any."""
        weights = self.chosen(query, layer)
        found: dict[str, float] = {}
        start, classes = 0, 0.0
        for tower in self.towers:
            total = weights[start : start + tower.tokens].sum().item()
            own = weights[start].item() if tower.class_token else 0.0
            found[tower.name] = found.get(tower.name, 0.0) + total - own
            classes += own
            start += tower.tokens
        return found | ({CLASS_TOKEN: classes} if any(tower.class_token for tower in self.towers) else {})

    def strongest(self, query: int = 0, layer: int = 0) -> float:
        """How many times the even share the place with the most attention gets; near 1 it is spread evenly."""
        places = torch.ones(self.weights.shape[2], dtype=torch.bool)
        start = 0
        for tower in self.towers:
            places[start] = not tower.class_token
            start += tower.tokens
        return (self.chosen(query, layer)[places].max() * self.weights.shape[2]).item()


@torch.no_grad()
def look(vision_side: VisionSide, image: ImageRef, question: str = "") -> Attention:
    """Let the bridge read a picture, and keep where each of its queries looked.

    Args:
        vision_side: the loaded towers and bridge.
        image: the picture.
        question: what is asked about it, for a bridge that reads instructions.

    Raises:
        UserError: the picture cannot be read, or the bridge has no queries.
    """
    bridge = vision_side.bridge
    if not isinstance(bridge, QFormer):
        raise UserError(
            f"this adapter's bridge ({bridge.kind}) has no queries that look: it hands the image encoder's features on"
        )
    size = open_image(image).size
    device = bridge.query_tokens.device
    features = [tower.to(device=device, dtype=torch.float32) for tower in vision_side.features([image])]
    instruction: dict[str, Tensor] = {}
    if vision_side.reads_instructions and vision_side.tokenizer is not None:
        ids, mask = vision_side.tokenizer([question], longest=MAX_INSTRUCTION)
        instruction = {"text_ids": ids.to(device), "text_mask": mask.to(device)}
    bridge.eval()
    seen = bridge(vision_side.feature_norm(features), return_attentions=True, **instruction).cross_attentions
    weights = torch.stack([layer[0].float().mean(dim=0).cpu() for layer in seen])  # L of [1, H, Q, P] → [L, Q, P]
    looking = tuple(number for number, layer in enumerate(bridge.layers, start=1) if layer.cross_attention is not None)
    return Attention(weights, looking, places_of(vision_side, size), size)


def draw(picture: Image.Image, attention: Attention, query: int = 0, layer: int = 0) -> Image.Image:
    """The picture in grey with the attention over it in colours, from none to that of its strongest place.

    Args:
        picture: as `open_image` gives it.
        attention: what `look` found in it.
        query: as in `Attention.chosen`.
        layer: as in `Attention.chosen`.
    """
    return overlay(picture, lambda size: attention.heat(size, query, layer))


def overlay(picture: Image.Image, heat: Callable[[tuple[int, int]], np.ndarray] | None) -> Image.Image:
    """The picture at a size to be looked at, with heat over it in colours; as it is if there is none.

    Args:
        picture: as `open_image` gives it.
        heat: gives the heat [height, width] for a width and height in pixels; it is scaled to its own maximum.
    """
    import matplotlib

    shown = picture.copy()
    shown.thumbnail((_SHOWN, _SHOWN))
    if max(shown.size) < _SHOWN // 2:  # a small picture would come out in blocks
        scale = _SHOWN // 2 / max(shown.size)
        shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.BICUBIC)
    if heat is None:
        return shown.convert("RGB")
    found = heat(shown.size)
    strength = found / max(found.max(), 1e-12)  # [height, width]
    colours = matplotlib.colormaps[COLOUR_MAP](_COLDEST + (1 - _COLDEST) * strength)[..., :3] * 255
    grey = np.asarray(shown.convert("L"), dtype=np.float64)[..., None] * _GROUND  # [height, width, 1]
    veil = _VEIL * strength[..., None] ** 0.6
    return Image.fromarray((grey * (1 - veil) + colours * veil).round().clip(0, 255).astype(np.uint8))


def heat_over(
    grid: np.ndarray,
    rows: tuple[float, ...],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    shown: tuple[int, int],
) -> np.ndarray:
    """A grid of places laid over a picture and interpolated: [height, width].

    Args:
        grid: [R, R], a value a place.
        rows: as `Places.rows`.
        box: as `Places.box`.
        size: width and height of the picture, in pixels.
        shown: width and height of what comes out.
    """
    left, top, right, bottom = box
    across = _interpolation(rows, shown[0], left / size[0], right / size[0])  # [R, width]
    down = _interpolation(rows, shown[1], top / size[1], bottom / size[1])  # [R, height]
    return down.T @ grid @ across


def describe(attention: Attention, query: int = 0, layer: int = 0) -> str:
    """In words: what is shown, how far it is from an even spread, what is not shown, and the caveat."""
    who = "All queries together" if query == 0 else f"Query {query} of {attention.queries}"
    where = "all layers" if layer == 0 else f"layer {layer}"
    grids = " and ".join(f"{len(tower.rows)}×{len(tower.rows)}" for tower in attention.towers)
    times = attention.strongest(query, layer)
    sample_evenly = f"The strongest of {grids} places gets {times:.1f} times an even share."
    if times < 1.5:
        sample_evenly = f"Spread almost evenly: the strongest of {grids} places gets {times:.1f} times an even share."
    shares = attention.shares(query, layer)
    if len(attention.towers) == 1:
        shares = {"the places" if name != CLASS_TOKEN else name: share for name, share in shares.items()}
    parts = [f"{share:.0%} on {name}" for name, share in shares.items()] if len(shares) > 1 else []
    if CLASS_TOKEN in shares:
        parts[-1] += ", which is no place and is not drawn"
    divided = f" It rests {', '.join(parts)}." if parts else ""
    return f"{who}, {where}, mean over heads. {sample_evenly}{divided} {CAVEAT}"


def describe_plainly(attention: Attention, query: int = 0, layer: int = 0) -> str:
    """As `describe`, in words for people who know nothing of queries and layers."""
    who = f"All {attention.queries} glances together"
    if query:
        who = f"Glance {query} of {attention.queries}"
    when = ""
    if layer and len(attention.layers) > 1:
        when = f", at look {attention.layers.index(layer) + 1} of {len(attention.layers)}"
    times = attention.strongest(query, layer)
    spread = "It rests on a few places" if times >= 1.5 else "It is spread almost evenly"
    return f"{who}{when}. {spread}: the strongest gets {times:.1f} times an even share. {CAVEAT}"


def places_of(vision_side: VisionSide, size: tuple[int, int]) -> tuple[Places, ...]:
    """Where the tokens of each tower lie in a picture of a width and height in pixels."""
    return tuple(
        Places(
            Path(source).name,
            tuple(encoder.centres().tolist()),
            seen_box(encoder.processor, size),
            encoder.class_token,
        )
        for source, encoder in zip(vision_side.encoder_sources, vision_side.encoders, strict=True)
    )


def _interpolation(places: tuple[float, ...], pixels: int, low: float, high: float) -> np.ndarray:
    """How much each place counts at each pixel, [places, pixels]: eased from one to the next, constant beyond the last.

    Args:
        places: along the side of a square.
        pixels: along the side of the picture.
        low: where the square begins in the picture, as a share of the picture's side.
        high: where it ends.
    """
    along = ((np.arange(pixels) + 0.5) / pixels - low) / (high - low)
    weights = np.stack([np.interp(along, places, unit) for unit in np.eye(len(places))])
    weights = weights**2 * (3 - 2 * weights)  # at a pixel there are two, t and 1 - t: so eased, they add up to 1 still
    return np.where((along >= 0) & (along <= 1), weights, 0.0)
