"""AdamW's groups and the learning rate, against torch's AdamW set up by hand and values calculated by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.recipe import load_recipe
from adapters.training.optimiser import Schedule, build_optimiser
from qformer.errors import UserError


class Bridge(nn.Module):
    """Query tokens, which BLIP-2 does not decay, beside a matrix and a bias, and a norm that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, 2, 4))
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4).requires_grad_(False)


def small_model(*, lora: bool = True) -> nn.Module:
    """The names are a VisionLanguageModel's: what trains under `language` is LoRA."""
    torch.manual_seed(0)
    model = nn.Module()
    model.bridge = Bridge()
    model.language = nn.Module()
    model.language.base = nn.Linear(4, 4).requires_grad_(False)
    if lora:
        model.language.lora_A = nn.Linear(4, 2, bias=False)
    return model


def groups_by_name(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Each parameter's group, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in optimiser.param_groups for parameter in group["params"]}


def test_each_parameter_gets_its_weight_decay_and_its_peak() -> None:
    model = small_model()
    optimiser = build_optimiser(
        model, learning_rate=1e-3, lora_learning_rate=1e-4, weight_decay=0.07, betas=(0.8, 0.95)
    )
    found = groups_by_name(model, optimiser)
    assert {name: (group["weight_decay"], group["peak"]) for name, group in found.items()} == {
        "bridge.query_tokens": (0.0, 1e-3),
        "bridge.layer.weight": (0.07, 1e-3),
        "bridge.layer.bias": (0.0, 1e-3),
        "language.lora_A.weight": (0.07, 1e-4),
    }
    assert {(group["lr"], group["betas"], group["eps"]) for group in found.values()} == {(1e-3, (0.8, 0.95), 1e-8)}
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(found)  # none is in two groups


@pytest.mark.parametrize("lora", [True, False])
def test_one_rate_for_all_if_lora_has_none_of_its_own(lora: bool) -> None:
    optimiser = build_optimiser(small_model(lora=lora), learning_rate=2e-3)
    assert {group["peak"] for group in optimiser.param_groups} == {2e-3}


def test_steps_are_those_of_adamw_with_groups_made_by_hand() -> None:
    ours, theirs = small_model(), small_model()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    mine = build_optimiser(ours, learning_rate=1e-2, lora_learning_rate=3e-2, weight_decay=0.5, betas=(0.9, 0.98))
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.bridge.layer.weight], "weight_decay": 0.5, "lr": 1e-2},
            {"params": [theirs.bridge.layer.bias, theirs.bridge.query_tokens], "weight_decay": 0.0, "lr": 1e-2},
            {"params": [theirs.language.lora_A.weight], "weight_decay": 0.5, "lr": 3e-2},
        ],
        betas=(0.9, 0.98),
        eps=1e-8,
        fused=False,
    )
    for group in mine.param_groups:
        group["lr"] = group["peak"]  # as a run sets it at its peak
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        for model, optimiser in ((ours, mine), (theirs, reference)):
            optimiser.zero_grad()
            loss(model, inputs).backward()
            optimiser.step()
    for (name, got), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)
    assert torch.equal(ours.language.base.weight, small_model().language.base.weight)  # frozen


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    """A number that depends on every parameter."""
    bridge = model.bridge
    hidden = bridge.norm(bridge.layer(inputs)) + bridge.query_tokens.sum(dim=1)
    return (model.language.base(hidden) + model.language.lora_A(hidden).sum(-1, keepdim=True)).square().mean()


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # the first of four steps of warm-up already learns
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),  # the cosine begins at the peak
        (7, 0.2 + 0.8 * 0.8535533905932737),  # a quarter of the way: (1 + cos 45°) / 2
        (10, 0.6),  # half of the way: half-way between the peak and the floor
        (13, 0.2 + 0.8 * 0.1464466094067263),
        (16, 0.2),
        (50, 0.2),  # a run that goes on beyond its total stays at the floor
    ],
)
def test_the_learning_rate_by_hand(step: int, expected: float) -> None:
    assert Schedule(16, 4, 0.2).share(step) == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    schedule = Schedule(10, 0)
    assert schedule.share(0) == 1.0
    assert schedule.share(5) == pytest.approx(0.5)
    assert schedule.share(10) == pytest.approx(0.0, abs=1e-12)


def test_warm_up_takes_a_quarter_of_a_short_run() -> None:
    assert [Schedule(total, 100).warmup for total in (1, 3, 4, 22, 399, 400, 5000)] == [0, 0, 1, 5, 99, 100, 100]
    rates = [Schedule(22, 100).share(step) for step in range(22)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[21] < 0.01
    assert Schedule(1, 100).share(0) == 1.0


def test_a_run_says_once_that_its_warm_up_is_shorter() -> None:
    sentence = Schedule(22, 100).shortened()
    assert sentence is not None and "\n" not in sentence
    assert all(words in sentence for words in ("22 steps", "takes 5 of them", "not 100 (train.warmup_steps)", "25%"))
    assert Schedule(400, 100).shortened() is None
    assert Schedule(3, 0).shortened() is None


@pytest.mark.parametrize(
    ("name", "total"), [("quickstart", 335), ("easy_vqa_cpu", 1600), ("photo_stage1", 552), ("scenes_stage1", 251),
                        ("scenes_stage2", 150), ("scenes_reason", 325)]
)  # fmt: skip
def test_the_recipes_own_runs_are_long_enough_for_their_warm_up(name: str, total: int) -> None:
    assert Schedule(total, load_recipe(name).train.warmup_steps).shortened() is None


def test_eight_bit_moments_need_a_gpu() -> None:
    with pytest.raises(UserError, match=r"paged_adamw_8bit: it needs an NVIDIA GPU, and this runs on cpu"):
        build_optimiser(nn.Linear(2, 2), learning_rate=1e-3, kind="paged_adamw_8bit")
