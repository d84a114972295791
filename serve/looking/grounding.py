"""Where a phrase is in a picture: a box and a heat map from an adapter's grounding head, a heat map alone without one.

Without a head the heat is where the matching head's judgement of picture and phrase comes from: GradCAM on the bridge's
cross-attention, as in ALBEF (Li et al. 2021, arXiv 2107.07651, section 6.5; Selvaraju et al. 2017, arXiv 1610.02391).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from adapters.artefact.artefact import load_vision_side_artefact
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.evaluation.grounding import Box, Point
from adapters.loading.grounding_head import LoadedHead, load_grounding_head
from adapters.loading.vision_side import MAX_TEXT, VisionSide, default_device
from qformer.attention import matching_mask
from qformer.bridge import QFormer
from qformer.errors import UserError
from qformer.grounding import Found
from serve.adapter import ImageInput, picture_ref
from serve.looking.attention import heat_over, overlay, places_of

NO_HEAD = (
    "This adapter has no grounding head, so there is no box, and the heat map may hardly depend on the phrase"
    " (docs/grounding.md)."
)
ALWAYS = "A place is always given, even if what you look for is not in the picture."
_COLOURS = ("#ff3b30", "#34c759", "#0a84ff", "#ff9f0a", "#bf5af2", "#64d2ff")


@dataclass(frozen=True)
class Grounding:
    """Where a phrase is.

    Attributes:
        phrase: what was looked for.
        box: left, top, right and bottom edge as fractions of the picture; None if the adapter has no grounding head.
        point: x and y of its likeliest place, as fractions.
        heat: [R, R], how likely each place of a grid is; it adds up to 1.
        rows: middles of the grid's rows, and of its columns, along the side of what the tower sees (0 to 1).
        seen: the part of the picture that the tower sees, as left, top, right and bottom in pixels.
        size: width and height of the picture, in pixels.
    """

    phrase: str
    box: Box | None
    point: Point
    heat: np.ndarray
    rows: tuple[float, ...]
    seen: tuple[float, float, float, float]
    size: tuple[int, int]

    def pixels(self) -> tuple[int, int, int, int] | None:
        """The box in whole pixels of the picture; None if there is none."""
        if self.box is None:
            return None
        left, top, right, bottom = self.box
        width, height = self.size
        return round(left * width), round(top * height), round(right * width), round(bottom * height)


class Grounder:
    """Finds phrases in pictures with one adapter; its head and what that reads are loaded when they are first needed.

    Args:
        vision_side: the adapter's loaded towers and bridge.
        device: where the head runs; that of the bridge if left out.
        offline: take frozen weights from the cache only.
    """

    def __init__(self, vision_side: VisionSide, *, device: str | None = None, offline: bool = False) -> None:
        self.vision_side = vision_side
        self.device = device or str(next(vision_side.bridge.parameters()).device)
        self.offline = offline
        self._head: LoadedHead | None = None

    @property
    def has_head(self) -> bool:
        """Whether it gives boxes."""
        return self.vision_side.grounding is not None

    @property
    def head(self) -> LoadedHead | None:
        """The head; None if the adapter has none.

        Raises:
            UserError: its file or what it reads cannot be loaded.
        """
        path = self.vision_side.grounding
        if path is not None and self._head is None:
            self._head = load_grounding_head(path, device=self.device, offline=self.offline, artefact=path.parent)
        return self._head

    def find(self, picture: ImageInput, phrases: Sequence[str]) -> list[Grounding]:
        """Where each phrase is in a picture; a phrase's place does not depend on the others.

        Raises:
            UserError: the picture cannot be read, a phrase is empty, or the adapter has neither a grounding head nor a
                text side.
        """
        image = picture_ref(picture)
        for phrase in phrases:
            if not phrase.strip():
                raise UserError("PHRASE: it is empty; say what to look for, such as the man in red")
        if not phrases:
            return []
        opened = open_image(image)
        head = self.head
        if head is None:
            return [phrase_heat(self.vision_side, image, phrase) for phrase in phrases]
        return found_by_head(head, opened, phrases)


def load_grounder(name: str | Path | None = None, *, device: str | None = None, offline: bool = False) -> Grounder:
    """Load what finds phrases: an adapter's towers, bridge and grounding head, without its language model.

    Args:
        name: a run's folder, an artefact's folder, or a shipped adapter's name; left out, the default adapter.
        device: "cpu", "cuda", …; a GPU if there is one.
        offline: take frozen weights from the cache only.

    Raises:
        UserError: there is no such adapter, or it does not fit its frozen models.
    """
    from serve.adapter import default_adapter

    device = device or default_device()
    vision_side, _ = load_vision_side_artefact(
        name if name is not None else default_adapter(), device=device, offline=offline, need_text=False
    )
    return Grounder(vision_side, device=device, offline=offline)


def ground(picture: ImageInput, phrase: str, *, grounder: Grounder | None = None) -> Grounding:
    """Find one phrase in one picture.

    Args:
        picture: a path, the bytes of a file, or a Pillow image.
        phrase: in English, such as "the man in red".
        grounder: what `load_grounder` loaded; left out, the default adapter is loaded, anew at each call.

    Raises:
        UserError: as `Grounder.find`.
    """
    return (grounder or load_grounder()).find(picture, [phrase])[0]


@torch.no_grad()
def found_by_head(head: LoadedHead, picture: Image.Image, phrases: Sequence[str]) -> list[Grounding]:
    """What a head finds in an opened picture; each phrase is read by itself."""
    seen = head.head.see(head.maps(head.encoder.preprocess([picture])))
    found = []
    for phrase in phrases:
        hidden, mask = head.phrases([phrase])
        said = head.head(seen, hidden[None], mask[None])  # one phrase in one picture
        box, point = box_and_point(said)
        rows = head.head.config.rows
        heat = said.heat[0, 0].softmax(dim=-1).unflatten(0, (rows, rows)).cpu().double().numpy()
        middles = tuple((number + 0.5) / rows for number in range(rows))
        whole = (0.0, 0.0, float(picture.width), float(picture.height))
        found.append(Grounding(phrase, box, point, heat, middles, whole, picture.size))
    return found


def box_and_point(found: Found) -> tuple[Box, Point]:
    """The box of one phrase, cut at the picture's borders, and its likeliest place."""
    heat = found.heat.flatten()
    rows = round(len(heat) ** 0.5)
    left, top, right, bottom = found.boxes.flatten().clamp(0, 1).tolist()
    row, column = divmod(int(heat.argmax()), rows)
    return (left, top, max(left, right), max(top, bottom)), ((column + 0.5) / rows, (row + 0.5) / rows)


def phrase_heat(vision_side: VisionSide, image: ImageRef, phrase: str) -> Grounding:
    """Where ITM's judgement that a phrase fits a picture comes from, by GradCAM; no box.

    The cross-attention of the last layer that looks is weighed by the gradient of ITM's log-odds, what speaks for the
    phrase is kept, and heads and queries are added up.

    Args:
        vision_side: loaded, with its text side.
        image: the picture.
        phrase: in English.

    Raises:
        UserError: the adapter has no text side, or its places cannot be laid onto the picture.
    """
    bridge, tokenizer = vision_side.bridge, vision_side.tokenizer
    if not isinstance(bridge, QFormer) or vision_side.heads is None or tokenizer is None:
        raise UserError(
            "--adapter: it has neither a grounding head nor a text side (bridge.text_branch), so it cannot look for a"
            " phrase; train one (docs/grounding.md)"
        )
    size = open_image(image).size
    weights = match_relevance(vision_side, vision_side.features([image]), [phrase])[0].cpu()  # [P]
    (tower, *others) = places_of(vision_side, size)
    if others:
        raise UserError("--adapter: it sees through two towers, for which there is no heat map of a phrase")
    side = len(tower.rows)
    heat = weights[int(tower.class_token) :].unflatten(0, (side, side)).double().numpy()
    heat = heat / heat.sum() if heat.sum() > 0 else np.full_like(heat, 1 / heat.size)  # nothing speaks for it anywhere
    row, column = divmod(int(heat.argmax()), side)
    left, top, right, bottom = tower.box
    point = (
        (left + tower.rows[column] * (right - left)) / size[0],
        (top + tower.rows[row] * (bottom - top)) / size[1],
    )
    return Grounding(phrase, None, point, heat, tower.rows, tower.box, size)


def match_relevance(vision_side: VisionSide, features: Sequence[Tensor], phrases: Sequence[str]) -> Tensor:
    """How much each place speaks for each phrase, by GradCAM on ITM: [N, P] of N pairs.

    Args:
        vision_side: loaded, with its text side.
        features: [N, P, D] of each tower, or [1, P, D] for phrases on one picture.
        phrases: N.
    """
    bridge = vision_side.bridge
    assert isinstance(bridge, QFormer) and vision_side.heads is not None and vision_side.tokenizer is not None
    device = bridge.query_tokens.device
    ids, mask = (part.to(device) for part in vision_side.tokenizer(phrases, longest=MAX_TEXT))
    bridge.eval()
    with torch.enable_grad():
        maps = [tower.to(device=device, dtype=torch.float32).expand(len(phrases), -1, -1) for tower in features]
        normed = vision_side.feature_norm(maps).detach().requires_grad_()  # all else may be frozen
        read = bridge(
            normed, text_ids=ids, self_mask=matching_mask(bridge.config.num_queries, mask), return_attentions=True
        )
        logits = vision_side.heads.matching_logits(read.queries)
        seen = read.cross_attentions[-1]  # [N, H, Q, P]
        (slopes,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), seen)
    return (slopes * seen).clamp_min(0).sum(dim=(1, 2)).detach()


def draw_found(picture: Image.Image, found: Sequence[Grounding], *, heat: bool = True) -> Image.Image:
    """The picture with what was found: the heat of a single phrase in colours over grey, and a box for each.

    Args:
        picture: as `open_image` gives it.
        found: what was found in it.
        heat: draw the heat, if there is one phrase alone.
    """
    if heat and len(found) == 1:
        one = found[0]
        shown = overlay(picture, lambda size: heat_over(one.heat, one.rows, one.seen, one.size, size))
    else:
        shown = overlay(picture, None)
    draw = ImageDraw.Draw(shown)
    width = max(2, max(shown.size) // 200)
    for number, one in enumerate(found):
        colour = _COLOURS[number % len(_COLOURS)]
        if one.box is not None:
            left, top, right, bottom = (
                part * side for part, side in zip(one.box, (*shown.size, *shown.size), strict=True)
            )
            edges = [(left, top), (max(left + 1, right - 1), max(top + 1, bottom - 1))]
            draw.rectangle(edges, outline=colour, width=width)
            corner = (left + width + 2, top + width)
        else:
            x, y = one.point[0] * shown.width, one.point[1] * shown.height
            draw.ellipse([(x - 3 * width, y - 3 * width), (x + 3 * width, y + 3 * width)], outline=colour, width=width)
            corner = (x + 4 * width, y)
        _label(draw, corner, one.phrase, colour)
    return shown


def _label(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: str) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(16)
    known = text.encode("latin-1", "replace").decode("latin-1")  # what the font that comes with Pillow can draw
    box = draw.textbbox(corner, known, font=font)
    draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill=colour)
    draw.text(corner, known, fill="white" if colour in (_COLOURS[0], _COLOURS[2], _COLOURS[4]) else "black", font=font)


def describe_found(found: Grounding) -> str:
    """In words: where the phrase is, or that there is no box."""
    if found.box is None:
        x, y = found.point
        return f"{found.phrase}: warmest at {x:.0%} from the left and {y:.0%} from the top. {NO_HEAD}"
    left, top, right, bottom = found.box
    return f"{found.phrase}: {left:.0%} to {right:.0%} from the left, {top:.0%} to {bottom:.0%} from the top. {ALWAYS}"
