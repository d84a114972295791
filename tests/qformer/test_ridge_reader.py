"""The closed-form reader against regressions that are solved by hand, and refitted without a picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qformer.ridge_reader import SHARED, STRENGTHS, NameRidge, PairRidge, PictureNumbers, fit_ridge


def numbers_of(count: int, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def solve(kernel: Tensor, wanted: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights and offset of ridge regression in its dual, with an offset, as one bordered linear system."""
    count = len(kernel)
    system = torch.zeros(count + 1, count + 1, dtype=torch.double)
    system[:count, :count] = kernel.double() + strength * torch.eye(count, dtype=torch.double)
    system[:count, count] = system[count, :count] = 1.0
    target = torch.cat([wanted.double(), torch.zeros(1, wanted.shape[1], dtype=torch.double)])
    found = torch.linalg.solve(system, target)
    return found[:count], found[count]


def test_weights_and_offset_solve_the_bordered_system() -> None:
    numbers, wanted = numbers_of(30), numbers_of(30, 3, seed=1)
    kernel = numbers @ numbers.T
    fit = fit_ridge(kernel, wanted, [[row] for row in range(30)])
    weights, offset = solve(kernel, wanted, fit.strength)
    torch.testing.assert_close(fit.weights, weights.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fit.offset, offset.float(), atol=1e-5, rtol=1e-4)


def test_left_out_scores_are_those_of_a_fit_without_the_group() -> None:
    numbers, wanted = numbers_of(24), numbers_of(24, 2, seed=1)
    kernel = numbers @ numbers.T
    groups = [[0, 5, 6], [1], [2, 3], *([row] for row in (4, *range(7, 24)))]
    fit = fit_ridge(kernel, wanted, groups)
    for group in groups:
        others = [row for row in range(24) if row not in group]
        weights, offset = solve(kernel[others][:, others], wanted[others], fit.strength)
        expected = kernel[group][:, others].double() @ weights + offset
        torch.testing.assert_close(fit.left_out[group], expected.float(), atol=1e-4, rtol=1e-3)


def test_the_strength_has_the_least_left_out_error() -> None:
    numbers, wanted = numbers_of(40), numbers_of(40, 2, seed=1)
    kernel = numbers @ numbers.T
    fit = fit_ridge(kernel, wanted, [[row] for row in range(40)])
    errors = []
    for strength in STRENGTHS:
        left = torch.empty(40, 2, dtype=torch.double)
        for row in range(40):
            others = [other for other in range(40) if other != row]
            weights, offset = solve(kernel[others][:, others], wanted[others], strength)
            left[row] = kernel[row, others].double() @ weights + offset
        errors.append((left - wanted).square().mean().item())
    assert fit.strength == STRENGTHS[errors.index(min(errors))] and fit.error == pytest.approx(min(errors), rel=1e-4)


def test_names_are_scored_in_the_primal_as_in_the_dual() -> None:
    numbers = numbers_of(30)
    said = (numbers_of(30, 4, seed=1) > 0).float()
    ridge, left_out = NameRidge.fit(numbers, said)
    fit = fit_ridge(numbers @ numbers.T, said, [[row] for row in range(30)])
    new = numbers_of(3, seed=2)
    torch.testing.assert_close(ridge(new), new @ numbers.T @ fit.weights + fit.offset)
    assert torch.equal(left_out, fit.left_out)


def test_a_pair_is_scored_by_the_product_kernel() -> None:
    pictures, questions = numbers_of(8), torch.eye(3)
    pairs = torch.tensor([[picture, (picture + shift) % 3] for picture in range(8) for shift in (0, 1)])
    answers = torch.eye(2)[torch.arange(16) % 2]
    ridge, left_out = PairRidge.fit(pictures, questions, pairs, answers)
    new, asked = numbers_of(2, seed=3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    kernel = torch.zeros(2, 16)
    for row in range(2):
        for column, (picture, question) in enumerate(pairs.tolist()):
            kernel[row, column] = (asked[row] @ questions[question]) * (SHARED + new[row] @ pictures[picture])
    torch.testing.assert_close(ridge(new, asked), kernel @ ridge.weights[0] + ridge.offset[0])
    torch.testing.assert_close(ridge(new, asked)[1], ridge.offset[0])  # of a question without a known word
    assert left_out.shape == (16, 2)


def test_a_question_is_learned_apart_from_another() -> None:
    """Two questions about one picture with opposite answers: what one says of a picture, the other denies."""
    pictures = numbers_of(60)
    bright = pictures[:, 0] > 0
    pairs = torch.tensor([[picture, question] for picture in range(60) for question in range(2)])
    yes = torch.tensor([bool(bright[picture]) ^ bool(question) for picture, question in pairs.tolist()])
    ridge, _ = PairRidge.fit(pictures, torch.eye(2), pairs, torch.eye(2)[yes.long()])
    new = numbers_of(40, seed=4)
    clear = new[:, 0].abs() > 0.2
    for question in range(2):
        said = ridge(new, torch.eye(2)[[question] * 40]).argmax(dim=1).bool()
        assert (said == ((new[:, 0] > 0) ^ bool(question)))[clear].float().mean() > 0.9


def test_each_question_is_answered_by_the_layer_that_knows_it() -> None:
    """What the first question asks for shows in one layer's numbers, what the second asks for in the other's."""
    pictures = numbers_of(60, 16)
    pairs = torch.tensor([[picture, question] for picture in range(60) for question in range(2)])
    yes = torch.tensor([bool(pictures[picture, 8 * question] > 0) for picture, question in pairs.tolist()])
    answers, questions = torch.eye(2)[yes.long()], torch.eye(2)
    ridge, left_out = PairRidge.fit(pictures, questions, pairs, answers, (8, 8))
    assert ridge.spans.tolist() == [[0, 16], [0, 8], [8, 16]]
    assert ridge.best(questions).tolist() == [1, 2]
    assert ridge.best(torch.zeros(1, 2)).tolist() == [0]
    _, left_of_both = PairRidge.fit(pictures, questions, pairs, answers)
    assert (left_out - answers).square().mean() < (left_of_both - answers).square().mean()
    for place in range(2):  # each is a ridge of its own layer's numbers, as large as those of both
        own = pictures[:, 8 * place : 8 * place + 8]
        own = own * (pictures.square().sum(dim=1).mean() / own.square().sum(dim=1).mean()).sqrt()
        alone, left_alone = PairRidge.fit(own, questions, pairs, answers)
        rows = (pairs[:, 1] == place).nonzero().flatten()
        torch.testing.assert_close(left_out[rows], left_alone[rows], atol=1e-4, rtol=1e-3)
        new = numbers_of(5, 16, seed=7)
        scale = own[0, 0] / pictures[0, 8 * place]
        expected = alone(new[:, 8 * place : 8 * place + 8] * scale, questions[[place] * 5])
        torch.testing.assert_close(ridge(new, questions[[place] * 5]), expected, atol=1e-4, rtol=1e-3)
    mixed = ridge(new, questions[[0, 1, 0, 1, 0]])
    torch.testing.assert_close(mixed[1], ridge(new[1:2], questions[1:])[0])


def test_pictures_become_numbers_of_about_length_one_that_keep_their_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(20, 9, 70, generator=generator), torch.randn(20, 4, 80, generator=generator).half()]
    fitted = PictureNumbers.fit(features)
    numbers = fitted(features)
    assert numbers.dtype == torch.float32 and numbers.shape == (20, 38)  # of each tower; centred, one direction less
    assert fitted.widths == (19, 19)
    assert numbers.square().sum(dim=1).mean().item() == pytest.approx(1.0, abs=1e-3)
    for place, tower in enumerate(features):
        parts = torch.cat(fitted._parts(place, tower), dim=1) - fitted.tensors[f"{place}.center"]
        parts = parts / fitted.tensors[f"{place}.spread"]
        own = numbers[:, 19 * place : 19 * place + 19]
        torch.testing.assert_close(own @ own.T, parts @ parts.T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(fitted([part[:3] for part in features]), numbers[:3], atol=1e-5, rtol=1e-4)


def test_a_channel_that_never_changes_gives_finite_numbers() -> None:
    features = [torch.cat([torch.randn(6, 4, 66, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4, 2)], 2)]
    assert PictureNumbers.fit(features)(features).isfinite().all()


def test_few_plain_pictures_give_finite_numbers() -> None:
    """Many places and few directions: a covariance with hardly any rank, on which eigh in fp32 may not converge."""
    plain = torch.rand(3, 1, 1280, generator=torch.Generator().manual_seed(0)).expand(3, 81, 1280)
    features = [plain.contiguous().half()]
    assert PictureNumbers.fit(features)(features).isfinite().all()
