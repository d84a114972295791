"""A closed-form reader of names that leans on the classes an image encoder was trained to tell apart.

A tower that was trained as a classifier knows its classes by name. Its classifier is a linear map of the mean feature,
so that reading them costs nothing; and the classes' probabilities are good numbers to read other names from, by ridge
regression. What is read are scores of names: those that the regression learned, and the classes' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT = 10.0
"""What the classes' probabilities are multiplied by, beside the mean feature."""
TRUST = 0.8
"""What a class's probability counts, beside scores by regression; chosen on photos."""
STRENGTHS = (0.01, 0.03, 0.1, 0.3)  # of the ridge, over the mean eigenvalue


@dataclass(frozen=True)
class Classifier:
    """The published classifier of a tower, over the mean of its last map.

    Attributes:
        weight: [C, D].
        bias: [C].
        names: of the C classes.
    """

    weight: Tensor
    bias: Tensor
    names: tuple[str, ...]

    def __call__(self, mean: Tensor) -> Tensor:
        """Probabilities [B, C] of mean features [B, D]."""
        return (mean @ self.weight.T + self.bias).softmax(dim=1)


@dataclass(frozen=True)
class ClassNumbers:
    """A picture's numbers: the mean feature of the first tower, and its classes' probabilities.

    Attributes:
        classifier: of the first tower.
    """

    classifier: Classifier

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """[B, P, D] of each tower, of any float dtype → [B, D + C] in fp32."""
        mean = features[0].float().mean(dim=1)
        return torch.cat([mean, WEIGHT * self.classifier(mean)], dim=1)


@dataclass(frozen=True)
class ClassNames:
    """Scores of W names: the first V by ridge regression, and those that are classes by their probability at least.

    Attributes:
        weight: [D + C, V].
        offset: [V].
        columns: [C] long, which name each class has; V and above are names of classes alone.
    """

    weight: Tensor
    offset: Tensor
    columns: Tensor

    def __call__(self, numbers: Tensor) -> Tensor:
        """[B, D + C] → [B, W]."""
        return self.joined(numbers @ self.weight + self.offset, numbers)

    def joined(self, scores: Tensor, numbers: Tensor) -> Tensor:
        """Scores by regression [B, V] with those of the classes in numbers [B, D + C]: [B, W]."""
        classes = len(self.columns)
        whole = max(scores.shape[1], int(self.columns.max()) + 1)
        every = scores.new_zeros(len(scores), whole)
        every[:, : scores.shape[1]] = scores
        known = numbers[:, -classes:] * (TRUST / WEIGHT)
        return every.scatter_reduce(1, self.columns.expand(len(scores), -1), known, "amax")

    @classmethod
    def fit(cls, numbers: Tensor, said: Tensor, columns: Tensor) -> tuple[ClassNames, Tensor]:
        """Fit to M pictures, in time linear in M; the ridge's strength has the least left-out error.

        Leaving a row out has a closed form (Hastie, Tibshirani and Friedman 2009, section 7.10): with h the diagonal
        of the hat matrix, the left-out score is `(score - h · said) / (1 - h)`.

        Args:
            numbers: [M, D + C].
            said: [M, V], 1.0 if a name is said of a picture.
            columns: as the attribute.

        Returns:
            The map, and each picture's scores by all others, [M, W].
        """
        center, mean = numbers.mean(dim=0), said.mean(dim=0)
        centred = numbers - center
        values, vectors = torch.linalg.eigh((centred.T @ centred).double())
        values, vectors = values.clamp_min(0).float(), vectors.float()
        turned = centred @ vectors  # [M, D + C]
        wanted = turned.T @ (said - mean)  # [D + C, V]
        best: tuple[float, Tensor, Tensor] | None = None
        for strength in STRENGTHS:
            shrunk = 1 / (values + strength * values.mean())
            hat = (turned.square() @ shrunk + 1 / len(numbers)).clamp(max=0.99).unsqueeze(1)  # [M, 1]
            scores = turned @ (shrunk.unsqueeze(1) * wanted) + mean
            left_out = (scores - hat * said) / (1 - hat)
            error = (left_out - said).square().mean().item()
            if best is None or error < best[0]:
                best = error, vectors @ (shrunk.unsqueeze(1) * wanted), left_out
        assert best is not None
        _, weight, left_out = best
        found = cls(weight, mean - center @ weight, columns)
        return found, found.joined(left_out, numbers)
