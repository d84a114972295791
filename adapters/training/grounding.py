"""Training of the grounding head on encoded pictures and phrases (`adapters.training.grounding_maps`).

A run that is stopped goes on at the last saved step, as if it had not been stopped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.loading.grounding_head import LONGEST_PHRASE
from adapters.training.grounding_maps import MapStore
from qformer.atomic import whole_file
from qformer.errors import UserError
from qformer.grounding import Found, GroundingHead, grounding_loss, places_inside

_SIDES = ("left", "right")  # words that a mirrored picture makes wrong


@dataclass(frozen=True)
class GroundingSettings:
    """How the head is trained.

    Attributes:
        epochs: passes over the pictures.
        pictures: of a step.
        phrases: at most so many of a picture in a step, drawn anew each time.
        tokens: at most so many of a phrase; the encoder has read the others all the same.
        learning_rate: at its highest, after the warm-up; it falls along a cosine to a hundredth.
        warmup: steps.
        weight_decay: AdamW's, on matrices.
        clip_norm: of the gradient.
        averaging: share that the mean of the weights keeps at each step; this mean is the result (EMA).
        mirrored: share of the pictures that are shown mirrored.
        zoomed: share of the pictures of which a part is shown, cut out of their maps.
        smallest: side of the smallest part.
        seed: of weights, order and draws.
        save_every: steps between two saved states.
    """

    epochs: int = 10
    pictures: int = 16
    phrases: int = 8
    tokens: int = 8
    learning_rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    averaging: float = 0.998
    mirrored: float = 0.5
    zoomed: float = 0.0
    smallest: float = 0.6
    seed: int = 1
    save_every: int = 250


@dataclass(frozen=True)
class PhraseBoxes:
    """A phrase to be found.

    Attributes:
        picture: its number among the encoded pictures.
        text: its number among the encoded phrases.
        boxes: [K, 4], all that it means.
        sided: whether it says left or right.
    """

    picture: int
    text: int
    boxes: Tensor
    sided: bool = False


def says_a_side(phrase: str) -> bool:
    """Whether a mirrored picture would make a phrase wrong."""
    return any(word in _SIDES for word in phrase.lower().split())


class GroundingTrainer:
    """Trains a head.

    Args:
        head: with fresh weights.
        store: the pictures' maps, all there.
        text: hidden states [U, T, W] of the phrases, and their mask.
        rows: what is to be found.
        settings: how.
        state: a file from which a stopped run goes on, and in which it is saved; None saves nothing.
    """

    def __init__(
        self,
        head: GroundingHead,
        store: MapStore,
        text: tuple[Tensor, Tensor],
        rows: Sequence[PhraseBoxes],
        settings: GroundingSettings,
        state: Path | None = None,
    ) -> None:
        self.head, self.store, self.settings, self.state = head, store, settings, state
        self.hidden, self.mask = text
        self.of_picture: defaultdict[int, list[PhraseBoxes]] = defaultdict(list)
        for row in rows:
            self.of_picture[row.picture].append(row)
        self.pictures = sorted(self.of_picture)
        self.averaged = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
        matrices = [parameter for parameter in head.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate, betas=(0.9, 0.98),
        )  # fmt: skip
        self.steps_an_epoch = math.ceil(len(self.pictures) / settings.pictures)
        self.steps = self.steps_an_epoch * settings.epochs
        self.step = 0
        if state is not None and state.is_file():
            self._resume(state)

    def run(self, on_step: Callable[[int, int, float], None] | None = None) -> None:
        """Train to the end; the head then has the averaged weights.

        Args:
            on_step: called with (step, steps in all, its loss).
        """
        self.head.train()
        while self.step < self.steps:
            loss = self._train_step()
            self.step += 1
            if self.state is not None and (self.step % self.settings.save_every == 0 or self.step == self.steps):
                self._save(self.state)
            if on_step is not None:
                on_step(self.step, self.steps, loss)
        self.head.load_state_dict(self.averaged)
        self.head.eval()

    def _train_step(self) -> float:
        """One step; all draws depend on the seed and the step's number alone, so a stopped run goes on alike."""
        settings = self.settings
        epoch, place = divmod(self.step, self.steps_an_epoch)
        order = torch.randperm(len(self.pictures), generator=_generator(settings.seed, epoch, 0)).tolist()
        chosen = [self.pictures[row] for row in order[place * settings.pictures : (place + 1) * settings.pictures]]
        generator = _generator(settings.seed, epoch, place + 1)
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))  # dropout
        rows = [self._drawn(picture, generator) for picture in chosen]
        maps, shown = _augmented(self.store.load(chosen), rows, settings, generator)
        texts, right, inside = _laid_out(shown, len(chosen), self.head.config.rows)
        found = self.head(self.head.see(maps), *_text_of(texts, self.hidden, self.mask, settings.tokens))
        loss = grounding_loss(found, right, inside)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), settings.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate()
        self.optimiser.step()
        keep = min(settings.averaging, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, tensor in self.head.state_dict().items():
                self.averaged[name].lerp_(tensor, 1 - keep)
        return float(loss.detach())

    def _drawn(self, picture: int, generator: torch.Generator) -> list[PhraseBoxes]:
        rows = self.of_picture[picture]
        if len(rows) <= self.settings.phrases:
            return rows
        return [rows[row] for row in torch.randperm(len(rows), generator=generator)[: self.settings.phrases].tolist()]

    def _learning_rate(self) -> float:
        settings = self.settings
        if self.step < settings.warmup:
            return settings.learning_rate * (self.step + 1) / settings.warmup
        done = (self.step - settings.warmup) / max(1, self.steps - settings.warmup)
        return settings.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def _save(self, path: Path) -> None:
        with whole_file(path) as partial:
            torch.save(
                {
                    "settings": self._described(),
                    "step": self.step,
                    "head": self.head.state_dict(),
                    "averaged": self.averaged,
                    "optimiser": self.optimiser.state_dict(),
                },
                partial,
            )

    def _described(self) -> dict[str, object]:
        """What a run that goes on must have alike: settings, sizes, and how much there is to learn from."""
        rows = sum(map(len, self.of_picture.values()))
        return {**asdict(self.settings), **asdict(self.head.config), "learned": rows}

    def _resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        if saved["settings"] != self._described():
            raise UserError(f"{path}: the stopped run had other settings; give the same, or name another --out")
        self.step, self.averaged = saved["step"], saved["averaged"]
        self.head.load_state_dict(saved["head"])
        self.optimiser.load_state_dict(saved["optimiser"])


@torch.no_grad()
def find_all(
    head: GroundingHead,
    store: MapStore,
    text: tuple[Tensor, Tensor],
    rows: Sequence[PhraseBoxes],
    *,
    pictures: int = 32,
) -> Iterator[tuple[PhraseBoxes, Found]]:
    """What the head says of each row (one phrase a `Found`), a few pictures at a time, in the pictures' order."""
    hidden, mask = text
    of_picture: defaultdict[int, list[PhraseBoxes]] = defaultdict(list)
    for row in rows:
        of_picture[row.picture].append(row)
    numbers = sorted(of_picture)
    for start in range(0, len(numbers), pictures):
        batch = numbers[start : start + pictures]
        asked = [of_picture[number] for number in batch]
        texts = torch.full((len(batch), max(map(len, asked))), -1)
        for place, rows_here in enumerate(asked):
            texts[place, : len(rows_here)] = torch.tensor([row.text for row in rows_here])
        found = head(head.see(store.load(batch)), *_text_of(texts, hidden, mask))
        for place, rows_here in enumerate(asked):
            for number, row in enumerate(rows_here):
                yield row, Found(*(part[place : place + 1, number : number + 1] for part in found))


def unions(boxes: Sequence[Tensor]) -> Tensor:
    """The box around all of each phrase's boxes: N tensors [K, 4] → [N, 4]."""
    return torch.stack([torch.cat((part[:, :2].amin(dim=0), part[:, 2:].amax(dim=0))) for part in boxes])


def _text_of(texts: Tensor, hidden: Tensor, mask: Tensor, most: int = LONGEST_PHRASE) -> tuple[Tensor, Tensor]:
    """Hidden states [I, K, T, W] and mask [I, K, T] of phrases by their numbers [I, K]; -1 is none; cut to `most`."""
    present = mask[texts] & (texts >= 0).unsqueeze(-1)
    longest = min(most, max(1, int(present.sum(dim=-1).max())))
    return hidden[texts, :longest].float(), present[..., :longest]


def _laid_out(shown: Sequence[tuple[int, PhraseBoxes, Tensor]], count: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Phrases side by side in their pictures: numbers [I, K] (-1 is none), boxes [I, K, 4], places inside [I, K, P]."""
    counts = [0] * count
    places = []
    for image, _, _ in shown:
        places.append((image, counts[image]))
        counts[image] += 1
    images, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    shape = (count, max(counts))
    texts, right = torch.full(shape, -1), torch.zeros(*shape, 4)
    inside = torch.zeros(*shape, rows * rows, dtype=torch.bool)
    texts[images, columns] = torch.tensor([row.text for _, row, _ in shown])
    boxes = [kept for _, _, kept in shown]
    right[images, columns] = unions(boxes)
    owners = torch.tensor([number for number, part in enumerate(boxes) for _ in part])
    inside[images, columns] = places_inside(torch.cat(boxes), owners, len(boxes), rows)
    return texts, right, inside


def _augmented(
    maps: list[Tensor],
    rows: Sequence[Sequence[PhraseBoxes]],
    settings: GroundingSettings,
    generator: torch.Generator,
) -> tuple[list[Tensor], list[tuple[int, PhraseBoxes, Tensor]]]:
    """Pictures mirrored and cut, as their maps are: an approximation, since the tower saw the whole picture.

    Returns:
        The maps, and for each phrase that is still to be seen its picture's place, itself and its boxes.
    """
    count, whole = len(rows), maps
    chance = torch.rand(count, 5, generator=generator)
    mirrored = chance[:, 0] < settings.mirrored
    side = torch.where(
        chance[:, 1] < settings.zoomed, settings.smallest + (1 - settings.smallest) * chance[:, 2], torch.ones(count)
    )
    left, top = chance[:, 3] * (1 - side), chance[:, 4] * (1 - side)
    cut = (side < 1).nonzero().flatten()
    if len(cut):
        share, zero = side[cut], torch.zeros(len(cut))
        placed = torch.stack(  # of the sampled square, in units of half the picture
            (
                torch.stack((share, zero, 2 * left[cut] + share - 1), dim=1),
                torch.stack((zero, share, 2 * top[cut] + share - 1), dim=1),
            ),
            dim=1,
        )  # [cut, 2, 3]
        maps = [part.index_copy(0, cut, _sampled(part[cut], placed)) for part in maps]
    if bool(mirrored.any()):
        maps = [torch.where(mirrored[:, None, None, None], part.flip(-1), part) for part in maps]
    shown: list[tuple[int, PhraseBoxes, Tensor]] = []
    for number, asked in enumerate(rows):
        corner = torch.stack((left[number], top[number]) * 2)
        for row in asked:
            if row.sided and bool(mirrored[number]):
                continue
            boxes = (row.boxes - corner) / side[number]
            clipped = boxes.clamp(0, 1)
            kept = _areas(clipped) >= 0.5 * _areas(boxes)
            if not bool(kept.all()):  # a phrase that is not all to be seen would have another box
                continue
            if bool(mirrored[number]):
                clipped = torch.stack((1 - clipped[:, 2], clipped[:, 1], 1 - clipped[:, 0], clipped[:, 3]), dim=1)
            shown.append((number, row, clipped))
    if not shown:  # all were cut away: show everything as it is
        return _augmented(whole, rows, _PLAIN, generator)
    return maps, shown


def _sampled(part: Tensor, placed: Tensor) -> Tensor:
    """Parts [I, C, R, R] of maps by their affine places [I, 2, 3], at as many places as before."""
    grid = F.affine_grid(placed, list(part.shape), align_corners=False)
    return F.grid_sample(part, grid, padding_mode="border", align_corners=False)


_PLAIN = GroundingSettings(mirrored=0.0, zoomed=0.0)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _generator(seed: int, epoch: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_003 + place)
