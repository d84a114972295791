"""A small head that finds a phrase in a picture: a heat map over places, and one box.

It reads one map of a frozen tower, or several of which the first is the finest, and the hidden states of a frozen text
encoder; of both nothing is changed. The phrase's tokens look at the picture's places in a few decoder layers, as in
DETR and MDETR (arXiv 2005.12872; 2104.12763). Then each place says how likely it is the phrase's and how
far the box's edges are from it, as one-stage grounding and FCOS do (arXiv 1908.06354, section 3; 1904.01355, section
3.1), with the phrase's vector as scale and shift (FiLM, arXiv 1709.07871). The box is the mean of what the places say,
by weights of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.attention import KeysValues, MultiHeadAttention

_FIRST_REACH = -1.5  # softplus of it is 0.2: how far the edges are from a place before anything is learned
_L1_SHARE, _GIOU_SHARE = 5.0, 2.0  # of the box's losses (DETR, section 4)


@dataclass(frozen=True)
class GroundingConfig:
    """Sizes of the head.

    Attributes:
        widths: channels of each map, the finest first.
        text_width: of the text encoder's hidden states.
        rows: R, rows and columns of the first map.
        width: D, of the head's own vectors.
        heads: of its attention.
        layers: in which the phrase looks at the picture.
        mixing: convolutional layers over the places before that.
        dropout: in training.
    """

    widths: tuple[int, ...]
    text_width: int
    rows: int
    width: int = 128
    heads: int = 4
    layers: int = 1
    mixing: int = 1
    dropout: float = 0.1


class Places(NamedTuple):
    """What the head makes of pictures, for any number of phrases.

    Attributes:
        hidden: [I, P, D] for P = R · R places in reading order.
        looked_at: of each decoder layer, what the phrase looks at.
        modulated: [I, P, D], what the last step scales and shifts.
    """

    hidden: Tensor
    looked_at: tuple[KeysValues, ...]
    modulated: Tensor


class Found(NamedTuple):
    """Where K phrases are in each of I pictures.

    Attributes:
        heat: [I, K, P], logits over places.
        boxes: [I, K, 4], left, top, right, bottom, as fractions of the square that the tower sees.
        place_boxes: [I, K, P, 4], the box that each place says.
        weights: [I, K, P], of these boxes in `boxes`; they add up to 1.
    """

    heat: Tensor
    boxes: Tensor
    place_boxes: Tensor
    weights: Tensor


class _Mixing(nn.Module):
    """A depthwise convolution and two linear maps around a residual: places hear of their neighbours (ConvNeXt)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, rows: int) -> Tensor:
        """[I, P, D] → [I, P, D]."""
        grid = hidden.transpose(1, 2).unflatten(2, (rows, rows))  # [I, D, R, R]
        near = self.depthwise(grid).flatten(2).transpose(1, 2)  # [I, P, D]
        return hidden + self.dropout(self.outer(F.relu(self.inner(self.norm(near)))))


class _Looking(nn.Module):
    """The phrase's tokens read each other, then the picture's places, then a feed-forward; norms come first."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        width = config.width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.reading = MultiHeadAttention(width, config.heads, dropout=config.dropout)
        self.looking = MultiHeadAttention(width, config.heads, dropout=config.dropout)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, mask: Tensor, looked_at: KeysValues) -> Tensor:
        """Tokens [I, K, T, D] with their mask [I, K, T], keys and values [I, H, P, D/H] → [I, K, T, D]."""
        shape = tokens.shape
        each = self.norms[0](tokens).flatten(0, 1)  # [I · K, T, D]
        read = self.reading(each, mask=mask.flatten(0, 1)[:, None, None, :]).hidden
        tokens = tokens + self.dropout(read).view(shape)
        # all of a picture's tokens look at once: its keys are not copied for each phrase
        looked = self.looking(self.norms[1](tokens).flatten(1, 2), projected=looked_at).hidden  # [I, K · T, D]
        tokens = tokens + self.dropout(looked).view(shape)
        return tokens + self.dropout(self.outer(F.relu(self.inner(self.norms[2](tokens)))))


class GroundingHead(nn.Module):
    """The head; `torch.manual_seed` governs its fresh weights.

    Args:
        config: its sizes.
    """

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.map_norms = nn.ModuleList(nn.LayerNorm(channels) for channels in config.widths)
        self.maps = nn.ModuleList(nn.Linear(channels, width) for channels in config.widths)
        self.row, self.column = (nn.Parameter(0.02 * torch.randn(config.rows, width)) for _ in range(2))
        self.mixing = nn.ModuleList(_Mixing(width, config.dropout) for _ in range(config.mixing))
        self.places_norm = nn.LayerNorm(width)
        self.text_norm, self.text = nn.LayerNorm(config.text_width), nn.Linear(config.text_width, width)
        self.decoder = nn.ModuleList(_Looking(config) for _ in range(config.layers))
        self.phrase_norm = nn.LayerNorm(width)
        self.modulated = nn.Linear(width, width)
        self.scale_and_shift = nn.Linear(width, 2 * width)
        self.deeper = nn.Linear(width, width)
        self.said = nn.Linear(width, 6)  # heat, the box's weight, and the distances of its four edges
        self.sought, self.offered = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.zeros_(self.scale_and_shift.bias)
        with torch.no_grad():
            self.said.bias.copy_(torch.tensor([0.0, 0.0, *[_FIRST_REACH] * 4]))

    def see(self, maps: Sequence[Tensor]) -> Places:
        """Read pictures once, for all phrases.

        Args:
            maps: [I, C, r, r] of the same pictures, the first with r = R.

        Raises:
            ValueError: the maps are not of the configuration's sizes.
        """
        rows = self.config.rows
        if tuple(part.shape[1] for part in maps) != self.config.widths or tuple(maps[0].shape[2:]) != (rows, rows):
            raise ValueError(f"maps {[tuple(part.shape) for part in maps]} do not fit {self.config}")
        hidden = (self.row[:, None] + self.column[None]).flatten(0, 1)  # [P, D]
        for part, norm, linear in zip(maps, self.map_norms, self.maps, strict=True):
            tokens = linear(norm(part.flatten(2).transpose(1, 2)))  # [I, r · r, D]
            if part.shape[2] != rows:
                grid = tokens.transpose(1, 2).unflatten(2, part.shape[2:])  # [I, D, r, r]
                grid = F.interpolate(grid, size=(rows, rows), mode="bilinear", align_corners=False)
                tokens = grid.flatten(2).transpose(1, 2)  # [I, P, D]
            hidden = hidden + tokens
        for layer in self.mixing:
            hidden = layer(hidden, rows)
        hidden = self.places_norm(hidden)
        looked_at = tuple(layer.looking.project(hidden) for layer in self.decoder if isinstance(layer, _Looking))
        return Places(hidden, looked_at, self.modulated(hidden))

    def forward(self, places: Places, text: Tensor, mask: Tensor) -> Found:
        """Find K phrases in each of I pictures.

        Args:
            places: what `see` made of the pictures.
            text: [I, K, T, text_width], the phrases' hidden states.
            mask: [I, K, T], true for a token; a phrase without any only fills the place of one.
        """
        tokens = self.text(self.dropout(self.text_norm(text)))  # [I, K, T, D]
        for layer, looked_at in zip(self.decoder, places.looked_at, strict=True):
            tokens = layer(tokens, mask, looked_at)
        phrase = self.phrase_norm(tokens[:, :, 0])  # [I, K, D], at [CLS]
        scale, shift = self.scale_and_shift(phrase).unsqueeze(2).chunk(2, dim=-1)  # [I, K, 1, D]
        hidden = F.relu(places.modulated.unsqueeze(1) * (1 + scale) + shift)  # [I, K, P, D]
        hidden = F.relu(self.deeper(self.dropout(hidden)))
        said = self.said(hidden).float()  # [I, K, P, 6]
        near = self._nearness(places.hidden, phrase)  # [2, I, K, P]
        heat, weigh = said[..., 0] + near[0], said[..., 1] + near[1]
        place_boxes = self._boxes(F.softplus(said[..., 2:]))
        weights = weigh.softmax(dim=-1)
        return Found(heat, (weights.unsqueeze(-2) @ place_boxes).squeeze(-2), place_boxes, weights)

    def _nearness(self, hidden: Tensor, phrase: Tensor) -> Tensor:
        """Scaled products of phrases [I, K, D] with places [I, P, D], twice: [2, I, K, P]."""
        sought = torch.stack(self.sought(phrase).chunk(2, dim=-1))  # [2, I, K, D]
        offered = torch.stack(self.offered(hidden).chunk(2, dim=-1))  # [2, I, P, D]
        return (sought @ offered.transpose(2, 3)).float() * self.config.width**-0.5

    def _boxes(self, reach: Tensor) -> Tensor:
        """Distances [..., P, 4] from each place to the left, top, right and bottom edge → boxes [..., P, 4]."""
        middles = place_centres(self.config.rows, reach.device)  # [P, 2]
        low, high = middles - reach[..., :2], middles + reach[..., 2:]
        return torch.cat((low, high), dim=-1)


def place_centres(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Middles (x, y) of the places of a square grid, in reading order, as fractions: [rows · rows, 2]."""
    along = (torch.arange(rows, device=device) + 0.5) / rows
    return torch.stack(torch.meshgrid(along, along, indexing="xy"), dim=-1).flatten(0, 1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and its generalised form, of boxes [..., 4] with the boxes at the same places.

    GIoU takes away the share of the smallest box around both that neither covers (Rezatofighi et al. 2019,
    arXiv 1902.09630, algorithm 1): it is -1 to 1, and tells how far apart boxes are that do not meet.
    """
    shared = _area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    either = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - shared
    around = _area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    iou = shared / either.clamp_min(1e-9)
    return iou, iou - (around - either) / around.clamp_min(1e-9)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp_min(0).prod(dim=-1)


def box_loss(found: Tensor, right: Tensor) -> Tensor:
    """L1 and GIoU, weighed as in DETR, of boxes [..., 4] against the right ones: [...]."""
    return _L1_SHARE * (found - right).abs().sum(dim=-1) / 4 + _GIOU_SHARE * (1 - overlaps(found, right)[1])


def grounding_loss(found: Found, right: Tensor, inside: Tensor) -> Tensor:
    """What training minimises, a mean over phrases.

    The heat's loss is the negative log of its share that falls inside the phrase's boxes, wherever inside: what the
    pointing game asks. The box's is taken of the mean box, and of each place's by its weight.

    Args:
        found: of K phrases in each of I pictures.
        right: [I, K, 4], the box around all of a phrase's boxes.
        inside: [I, K, P] bool, whether a place lies in any of them; a phrase for which none does only fills a place.
    """
    asked = inside.any(dim=-1)  # [I, K]
    pointing = found.heat.logsumexp(dim=-1) - found.heat.masked_fill(~inside, -1e4).logsumexp(dim=-1)  # [I, K]
    each = (found.weights * box_loss(found.place_boxes, right.unsqueeze(2))).sum(dim=-1)  # [I, K]
    loss = pointing + box_loss(found.boxes, right) + 0.5 * each
    return (loss * asked).sum() / asked.sum()


def places_inside(boxes: Tensor, owners: Tensor, count: int, rows: int) -> Tensor:
    """Which places lie in any of a phrase's boxes; of a box that holds none, the nearest to its middle.

    Args:
        boxes: [M, 4].
        owners: [M], the phrase that each box belongs to.
        count: N, phrases.
        rows: of the grid.

    Returns:
        bool [N, rows · rows].
    """
    middles = place_centres(rows, boxes.device)  # [P, 2]
    within = ((middles >= boxes[:, None, :2]) & (middles <= boxes[:, None, 2:])).all(dim=-1)  # [M, P]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    nearest = (middles - centres[:, None]).square().sum(dim=-1).argmin(dim=-1)  # [M]
    within = within | (F.one_hot(nearest, rows * rows).bool() & ~within.any(dim=-1, keepdim=True))
    inside = torch.zeros(count, rows * rows, dtype=torch.int32, device=boxes.device)
    return inside.index_add_(0, owners, within.int()) > 0
