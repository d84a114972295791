"""EfficientNet-Lite against its published figures, TensorFlow's padding worked out by hand, and itself unfolded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qformer.efficientnet import LITE2, ConvNorm, EfficientNetLite, EfficientNetLiteConfig


def tiny() -> EfficientNetLite:
    """Real depth, few channels, and norms with statistics of their own."""
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(0.1, 0.5, 33, num_classes=5, stem_channels=8, head_channels=24)
    model = EfficientNetLite(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


@pytest.mark.parametrize(
    ("config", "millions"),
    # the factors, resolutions and parameter counts of TensorFlow's release of the Lite variants, 0 to 4
    [
        (EfficientNetLiteConfig(1.0, 1.0, 224), 4.7),
        (EfficientNetLiteConfig(1.0, 1.1, 240), 5.4),
        (LITE2, 6.1),
        (EfficientNetLiteConfig(1.2, 1.4, 280), 8.2),
        (EfficientNetLiteConfig(1.4, 1.8, 300), 13.0),
    ],
)
def test_each_variant_has_its_published_size(config: EfficientNetLiteConfig, millions: float) -> None:
    with torch.device("meta"):
        model = EfficientNetLite(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_lite2_has_its_published_blocks() -> None:
    assert [(count, width) for count, *_, width in LITE2.stages()] == [
        (1, 16), (3, 24), (3, 48), (4, 88), (4, 120), (5, 208), (1, 352),
    ]  # fmt: skip
    with torch.device("meta"):
        assert EfficientNetLite(LITE2).output_shape(260) == (9, 1280)


def test_the_config_survives_json() -> None:
    content = LITE2.to_dict()
    assert content["model_type"] == "efficientnet-lite"
    assert EfficientNetLiteConfig.from_dict({**content, "later_key": 1}) == LITE2


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        # an even side is padded below and to the right only, an odd one all round (TensorFlow's "same")
        (4, [[9, 6], [6, 4]]),
        (5, [[4, 6, 4], [6, 9, 6], [4, 6, 4]]),
    ],
)
def test_padding_is_tensorflows(side: int, expected: list[list[int]]) -> None:
    layer = ConvNorm(1, 1, kernel=3, stride=2, activate=False)
    nn.init.ones_(layer.conv.weight)
    layer.norm = nn.Identity()
    assert layer(torch.ones(1, 1, side, side))[0, 0].tolist() == expected


def test_relu6_ends_at_six() -> None:
    layer = ConvNorm(1, 1, kernel=1)
    nn.init.constant_(layer.conv.weight, 10)
    layer.norm = nn.Identity()
    with torch.no_grad():
        assert layer(torch.tensor([[[[-1.0, 0.5, 1.0]]]])).flatten().tolist() == [0, 5, 6]


def test_folding_changes_nothing_but_the_speed() -> None:
    model, pixels = tiny(), torch.randn(2, 3, 33, 40)
    folded = copy.deepcopy(model).fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for before, after in zip(model.hidden_states(pixels), folded.hidden_states(pixels), strict=True):
            torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(folded(pixels), model(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [32, 33])
def test_a_cut_network_gives_the_same_maps_and_knows_their_shape(side: int) -> None:
    model, pixels = tiny(), torch.randn(1, 3, side, side)
    with torch.no_grad():
        maps = list(model.hidden_states(pixels))
        assert len(maps) == 9
        for layer, expected in enumerate(maps):
            part = copy.deepcopy(model)
            part.cut(layer)
            *_, last = part.hidden_states(pixels)
            assert torch.equal(last, expected)
            rows, width = part.output_shape(side)
            assert last.shape == (1, width, rows, rows)
            assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("side", [260, 257, 224])
def test_a_row_of_the_map_lies_where_its_gradient_does(side: int) -> None:
    model = EfficientNetLite(EfficientNetLiteConfig(0.1, 0.5, side, stem_channels=8, head_channels=8)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # means, so that nothing is cut off and all that is seen counts alike
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    pixels = torch.full((1, 3, side, side), 1e-4, requires_grad=True)  # far below where ReLU6 ends
    *_, last = model.hidden_states(pixels)
    centres = model.centres(side)
    middle = len(centres) // 2
    (gradient,) = torch.autograd.grad(last[0, :, middle, middle].sum(), pixels)
    share = gradient[0].sum(dim=(0, 2))
    share = share / share.sum()

    assert len(centres) == last.shape[-1]
    assert (share * (torch.arange(side) + 0.5)).sum().item() == pytest.approx(centres[middle].item(), abs=4)
    assert torch.allclose(centres.diff(), torch.tensor(32.0))
