"""The reader of classes: ridge regression with left-out scores, and a classifier's own names beside it."""

from __future__ import annotations

import pytest
import torch

from qformer.class_reader import TRUST, WEIGHT, Classifier, ClassNames, ClassNumbers
from qformer.imagenet import imagenet_names


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(torch.randn(3, 5), torch.randn(3), ("cat", "dog", "harp"))


def test_numbers_are_the_mean_and_what_the_classes_say_of_it(classifier: Classifier) -> None:
    features = torch.randn(2, 7, 5, dtype=torch.float16)
    numbers = ClassNumbers(classifier)([features])
    mean = features.float().mean(dim=1)
    torch.testing.assert_close(numbers[:, :5], mean)
    shares = (mean @ classifier.weight.T + classifier.bias).softmax(dim=1)
    torch.testing.assert_close(numbers[:, 5:], WEIGHT * shares)


def test_left_out_scores_are_those_of_fits_without_the_row() -> None:
    torch.manual_seed(0)
    numbers, said = torch.randn(40, 6), (torch.randn(40, 2) > 0).float()
    columns = torch.tensor([1, 2])  # the second of two classes is no name of the regression
    found, left_out = ClassNames.fit(numbers, said, columns)
    kept = torch.arange(40) != 7
    # the offset and the ridge's scale move a little with the row, so that this agrees to a few per cent
    again, _ = ClassNames.fit(numbers[kept], said[kept], columns)
    assert found(numbers).shape == left_out.shape == (40, 3)
    torch.testing.assert_close(left_out[7, :1], again(numbers[7:8])[0, :1], atol=0.05, rtol=0.1)
    assert (left_out[7, 0] - said[7, 0]).abs() > (found(numbers)[7, 0] - said[7, 0]).abs()


def test_a_class_scores_as_likely_as_it_is_at_least() -> None:
    found = ClassNames(torch.zeros(5, 2), torch.tensor([0.9, 0.1]), torch.tensor([0, 1, 2]))
    numbers = torch.tensor([[0.0, 0.0, 0.0, WEIGHT * 0.7, WEIGHT * 0.3]])  # two features, three classes
    torch.testing.assert_close(found(numbers), torch.tensor([[0.9, TRUST * 0.7, TRUST * 0.3]]))


def test_a_thousand_names_of_imagenet_no_two_alike() -> None:
    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "tench" and names[923] == "plate" and names[-1] == "toilet tissue"
