"""A closed-form reader of frozen features: ridge regression from pictures, and from pairs of picture and question.

A few hundred pictures do not teach a Q-Former more than a linear map of the frozen features already says. The two maps
here are exact solutions of one linear system each:

* `NameRidge` scores the words that answers name, from a picture alone;
* `PairRidge` scores whole answers from a picture and a question, with the product kernel
  `<q, q'> · (SHARED + <x, x'>)` (Schölkopf and Smola 2002, section 13.1): a question learns from those like it.

The ridge's strength is chosen by leaving each training picture out in turn, which has a closed form as well. The
left-out scores are kept for training: they are as unsure on the training pictures as scores are on new ones, so that
the language model learns how far to trust them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARED = 0.3
"""What the kernel of any two pictures has in common, beside 1 of a picture with itself: a question's own share."""
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CHANNELS = 64
"""Principal channels that are kept of a place in the picture."""
NUMBERS = 256
"""Principal directions that are kept of what a tower shows of a picture, at most."""
_FLOOR = 0.05  # share of the mean deviation that is added to each, so that a channel that hardly fires stays small


@dataclass(frozen=True)
class PictureNumbers:
    """Features of the towers to r numbers a picture, by a fixed linear map: those of the first tower, then the next.

    Of each tower it reads the mean and the maximum over all places, and each place's principal channels if wanted.

    Attributes:
        tensors: of tower i "i.center" [N_i], "i.spread" [N_i] and "i.basis" [N_i, r_i]; if places are read also
            "i.channels" [D_i, C], "i.mean" [D_i] and "i.scale" [D_i].
    """

    tensors: dict[str, Tensor]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many numbers come from each tower."""
        names = sorted(name for name in self.tensors if name.endswith(".basis"))
        return tuple(self.tensors[name].shape[1] for name in names)

    @classmethod
    def fit(cls, features: Sequence[Tensor], *, places: bool = True) -> PictureNumbers:
        """Fit the map to M pictures.

        Args:
            features: [M, P_i, D_i] of each tower i, of any float dtype.
            places: read each place too; False reads the mean and the maximum alone.
        """
        tensors: dict[str, Tensor] = {}
        for index, tower in enumerate(features):
            if places:
                patches = tower.flatten(0, 1).float()  # [M · P_i, D_i]
                mean, scale = patches.mean(dim=0), patches.std(dim=0) + 1e-3
                directions = torch.linalg.eigh(_gram((patches - mean) / scale).double())[1].float()
                tensors[f"{index}.channels"] = directions[:, -CHANNELS:].contiguous()
                tensors[f"{index}.mean"], tensors[f"{index}.scale"] = mean, scale
            parts = cls(tensors)._parts(index, tower)
            center = torch.cat([part.mean(dim=0) for part in parts])
            spread = torch.cat([_spread(part, len(parts) * len(features)) for part in parts])
            numbers = (torch.cat(parts, dim=1) - center) / spread  # [M, N_i]
            values, vectors = torch.linalg.eigh((numbers @ numbers.T).double())
            kept = (values > 1e-6 * values.max()).nonzero().flatten()[-NUMBERS:]
            basis = numbers.T @ (vectors[:, kept] / values[kept].sqrt()).float()  # [N_i, r_i], orthonormal
            tensors |= {f"{index}.center": center, f"{index}.spread": spread, f"{index}.basis": basis}
        return cls(tensors)

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """[B, P_i, D_i] of each tower, of any float dtype → [B, r] in fp32."""
        numbers = []
        for index, tower in enumerate(features):
            read = torch.cat(self._parts(index, tower), dim=1) - self.tensors[f"{index}.center"]
            numbers.append((read / self.tensors[f"{index}.spread"]) @ self.tensors[f"{index}.basis"])
        return torch.cat(numbers, dim=1)

    def _parts(self, index: int, tower: Tensor) -> list[Tensor]:
        """A tower's mean and maximum [B, 2 · D_i], and every place's channels [B, P_i · C] if they are read."""
        tower = tower.float()
        parts = [torch.cat([tower.mean(dim=1), tower.amax(dim=1)], dim=1)]
        if f"{index}.channels" in self.tensors:
            placed = (tower - self.tensors[f"{index}.mean"]) / self.tensors[f"{index}.scale"]
            parts.append((placed @ self.tensors[f"{index}.channels"]).flatten(1))
        return parts


def _spread(part: Tensor, parts: int) -> Tensor:
    """What a part [M, N] is divided by: every part weighs the same, and a picture's kernel with itself is about 1."""
    deviation = part.std(dim=0)
    deviation = deviation + _FLOOR * deviation.mean() + 1e-6
    size = (((part - part.mean(dim=0)) / deviation).square().sum(dim=1).mean() * parts).sqrt().clamp_min(1e-6)
    return deviation * size


@dataclass(frozen=True)
class Fit:
    """What a ridge regression came to.

    Attributes:
        weights: [N, K], of the training rows.
        offset: [K].
        strength: of the ridge.
        left_out: [N, K], each row's scores by all groups but its own.
        error: the mean square of `left_out` minus what was wanted.
    """

    weights: Tensor
    offset: Tensor
    strength: float
    left_out: Tensor
    error: float


def fit_ridge(kernel: Tensor, wanted: Tensor, groups: Sequence[Sequence[int]]) -> Fit:
    """Kernel ridge regression with an offset that is not punished, of the strength with the least left-out error.

    Leaving a group of rows out of a linear smoother has a closed form, as leaving one row out has (Hastie, Tibshirani
    and Friedman 2009, section 7.10): with H the matrix that gives the weights, the residuals of a group are
    `H[group, group]⁻¹ · weights[group]`.

    Args:
        kernel: [N, N] of the training rows.
        wanted: [N, K].
        groups: the rows of one picture each; together they are every row once.
    """
    values, vectors = torch.linalg.eigh(kernel.double())
    target = wanted.double()
    rotated, sums = vectors.T @ target, vectors.sum(dim=0)  # [N, K], [N]
    best: Fit | None = None
    for strength in STRENGTHS:
        shrunk = 1 / (values.clamp_min(0) + strength)  # [N], the inverse's eigenvalues
        ones = vectors @ (shrunk * sums)  # [N], the inverse times ones
        offset = (ones @ target) / ones.sum()
        weights = vectors @ (shrunk.unsqueeze(1) * rotated) - ones.unsqueeze(1) * offset
        left_out = torch.empty_like(target)
        for rows in map(torch.tensor, groups):
            own = (vectors[rows] * shrunk) @ vectors[rows].T - torch.outer(ones[rows], ones[rows]) / ones.sum()
            left_out[rows] = target[rows] - torch.linalg.solve(own, weights[rows])
        error = (left_out - target).square().mean().item()
        if best is None or error < best.error:
            best = Fit(weights.float(), offset.float(), strength, left_out.float(), error)
    assert best is not None
    return best


@dataclass(frozen=True)
class NameRidge:
    """Scores of W names from a picture's r numbers.

    Attributes:
        weight: [r, W].
        offset: [W].
    """

    weight: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, numbers: Tensor, names: Tensor) -> tuple[NameRidge, Tensor]:
        """Fit to M pictures.

        Args:
            numbers: [M, r].
            names: [M, W], 1.0 if a picture's answers say the name.

        Returns:
            The map, and the left-out scores of the training pictures, [M, W].
        """
        fit = fit_ridge(numbers @ numbers.T, names, [[row] for row in range(len(numbers))])
        return cls(numbers.T @ fit.weights, fit.offset), fit.left_out

    def __call__(self, numbers: Tensor) -> Tensor:
        """[B, r] → [B, W]."""
        return numbers @ self.weight + self.offset


@dataclass(frozen=True)
class PairRidge:
    """Scores of K answers from a picture and a question: R regressions, of which each question has the best one.

    The first regression reads all numbers of a picture, the others those of one tower each: what a thing is and how
    high a bar stands are seen best in different layers. A question is answered by the regression with the smallest
    left-out error on the training questions, those that are like it weighing more.

    Attributes:
        pictures: [M, r], of the training pictures.
        questions: [U, V], of the training questions, each of length 1.
        pairs: [N, 2] long: the picture and the question of each training pair.
        weights: [R, N, K].
        offset: [R, K].
        spans: [R, 2] long: the numbers that each regression reads, from and up to.
        errors: [R, U], the sum of the left-out square errors on each training question's pairs.
    """

    pictures: Tensor
    questions: Tensor
    pairs: Tensor
    weights: Tensor
    offset: Tensor
    spans: Tensor
    errors: Tensor

    @classmethod
    def fit(
        cls, pictures: Tensor, questions: Tensor, pairs: Tensor, answers: Tensor, widths: Sequence[int] = ()
    ) -> tuple[PairRidge, Tensor]:
        """Fit to N pairs of M pictures and U questions.

        Args:
            pictures: [M, r].
            questions: [U, V], each of length 1.
            pairs: [N, 2] long: a row of `pictures` and one of `questions`.
            answers: [N, K], each row a distribution over the answers.
            widths: how many of the numbers come from each tower; with fewer than two there is one regression.

        Returns:
            The map, and the scores of each training pair with its picture left out, [N, K].
        """
        groups: dict[int, list[int]] = {}
        for row, picture in enumerate(pairs[:, 0].tolist()):
            groups.setdefault(picture, []).append(row)
        spans = [(0, pictures.shape[1])]
        if len(widths) > 1:
            spans += [(sum(widths[:place]), sum(widths[: place + 1])) for place in range(len(widths))]
        alike = questions @ questions.T
        fits = [
            fit_ridge(
                _pair_kernel(_picture_kernel(pictures, pictures, span), alike, pairs, pairs),
                answers,
                list(groups.values()),
            )
            for span in spans
        ]
        errors = torch.zeros(len(spans), len(questions))
        for row, fit in enumerate(fits):
            errors[row].index_add_(0, pairs[:, 1], (fit.left_out - answers).square().sum(dim=1))
        weights, offset = (torch.stack([getattr(fit, name) for fit in fits]) for name in ("weights", "offset"))
        found = cls(pictures, questions, pairs, weights, offset, torch.tensor(spans), errors)
        left_out = torch.stack([fit.left_out for fit in fits])  # [R, N, K]
        best = found.best(questions)[pairs[:, 1]]  # [N]
        return found, left_out[best, torch.arange(len(pairs))]

    def best(self, questions: Tensor) -> Tensor:
        """Which regression answers each of B questions [B, V]: [B] long; the first, if no word of it is known."""
        counts = torch.bincount(self.pairs[:, 1], minlength=len(self.questions)).to(self.errors)
        alike = (questions @ self.questions.T).clamp_min(0).square()  # [B, U]
        return ((alike @ self.errors.T) / (alike @ counts).clamp_min(1e-6).unsqueeze(1)).argmin(dim=1)

    def __call__(self, pictures: Tensor, questions: Tensor) -> Tensor:
        """Scores [B, K] of pairs: pictures [B, r] and questions [B, V], each of length 1 or 0."""
        scores = pictures.new_zeros(len(pictures), self.offset.shape[1])
        best = self.best(questions)
        for place, span in enumerate(self.spans.tolist()):
            rows = (best == place).nonzero().flatten()
            if not len(rows):
                continue
            each = torch.arange(len(rows), device=pictures.device)
            kernel = _pair_kernel(
                _picture_kernel(pictures[rows], self.pictures, span),
                questions[rows] @ self.questions.T,
                torch.stack([each, each], dim=1),
                self.pairs,
            )
            scores[rows] = kernel @ self.weights[place] + self.offset[place]
        return scores


def _picture_kernel(one: Tensor, other: Tensor, span: Sequence[int]) -> Tensor:
    """The kernel of some numbers of pictures [A, r] and [B, r]: [A, B], of one with itself as large as that of all."""
    start, stop = span
    whole = other.square().sum(dim=1).mean()
    part = other[:, start:stop].square().sum(dim=1).mean().clamp_min(1e-12)
    return (one[:, start:stop] @ other[:, start:stop].T) * (whole / part)


def _pair_kernel(pictures: Tensor, questions: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The product kernel of pairs, [R, C], from those of pictures and of questions; `rows` [R, 2], `columns` [C, 2]."""
    one = questions[rows[:, 1]][:, columns[:, 1]]
    return one * (SHARED + pictures[rows[:, 0]][:, columns[:, 0]])


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)
