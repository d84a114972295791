"""Image encoders against transformers' own hidden states and image processors; the norm after them against torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    OPTConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qformer.efficientnet import LITE2
from qformer.errors import UserError
from qformer.feature_norm import FeatureNorm
from qformer.image_encoders import ImageEncoder
from qformer.vision_loading import build_image_encoder, load_image_encoder

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 28, "patch_size": 14}
TEXT = {**TINY, "vocab_size": 50, "max_position_embeddings": 16}


def whole_model(kind: str) -> Any:
    """A tiny model as a hub holds it, text tower, Q-Former and LLM included."""
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**VISION), text_config=CLIPTextConfig(**TEXT)))
    if kind == "siglip":
        return SiglipModel(
            SiglipConfig(vision_config=SiglipVisionConfig(**VISION), text_config=SiglipTextConfig(**TEXT))
        )
    if kind == "dinov2":
        return Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14)
        )
    opt = OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
                    word_embed_proj_dim=32)  # fmt: skip
    qformer = Blip2QFormerConfig(**TINY, encoder_hidden_size=32, vocab_size=50)
    return Blip2ForConditionalGeneration(
        Blip2Config(vision_config=Blip2VisionConfig(**VISION), qformer_config=qformer, text_config=opt)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the four tiny models; the random starts are widened so that blocks matter."""
    found = {}
    for kind in ("clip", "siglip", "dinov2", "blip2"):
        model = whole_model(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        found[kind] = tmp_path_factory.mktemp("vision") / kind
        model.save_pretrained(found[kind])
    return found


def reference(kind: str, folder: Path) -> Any:
    """transformers' own tower."""
    if kind == "blip2":
        return Blip2ForConditionalGeneration.from_pretrained(folder).eval().vision_model
    names = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel, "dinov2": Dinov2Model}
    return names[kind].from_pretrained(folder).eval()


def pictures(count: int = 2) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "blip2"])
def test_every_layer_is_transformers_hidden_state(kind: str, folders: dict[str, Path]) -> None:
    tower = reference(kind, folders[kind])
    pixels = torch.randn(2, 3, tower.config.image_size, tower.config.image_size)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    # BLIP-2's checkpoints lack the last block, which counts all the same: -2 is the last state that there is
    shift = 1 if kind == "blip2" else 0
    for layer in range(-len(states) - shift, -shift):
        encoder = load_image_encoder(str(folders[kind]), layer=layer)
        features = encoder(pixels)
        torch.testing.assert_close(features, states[layer + shift])
        assert features.shape == (2, encoder.num_tokens, encoder.width)
        assert encoder.layer == len(states) + layer + shift
        assert torch.equal(load_image_encoder(str(folders[kind]), layer=encoder.layer)(pixels), features)


@pytest.mark.parametrize("kind", ["clip", "siglip", "blip2"])
def test_a_tower_saved_on_its_own_is_the_same_tower(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    reference(kind, folders[kind]).save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    alone = load_image_encoder(str(tmp_path))
    assert torch.equal(alone(pixels), load_image_encoder(str(folders[kind]))(pixels))


def test_blip2s_default_layer_is_the_whole_tower_and_its_norm_is_left_to_the_bridge(folders: dict[str, Path]) -> None:
    tower = reference("blip2", folders["blip2"])
    encoder = load_image_encoder(str(folders["blip2"]))
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        normed = tower(pixels).last_hidden_state  # transformers applies BLIP-2's trainable norm inside the tower
        torch.testing.assert_close(tower.post_layernorm(encoder(pixels)), normed)
    assert not torch.allclose(encoder(pixels), normed)
    with pytest.raises(UserError, match="layer -1: blip2"):
        load_image_encoder(str(folders["blip2"]), layer=-1)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "blip2"])
def test_the_class_token_goes_where_it_is_not_wanted(kind: str, folders: dict[str, Path]) -> None:
    with_token = load_image_encoder(str(folders[kind]), image_size=28)
    without = load_image_encoder(str(folders[kind]), image_size=28, class_token=False)
    pixels = torch.randn(1, 3, 28, 28)
    extra = 0 if kind == "siglip" else 1
    assert (with_token.num_tokens, without.num_tokens) == (4 + extra, 4)
    assert without.grid == (2, 2)
    assert with_token.grid == (None if extra else (2, 2))
    assert torch.equal(with_token(pixels)[:, extra:], without(pixels))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "blip2"])
def test_another_picture_size_interpolates_positions(kind: str, folders: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(folders[kind]), layer=0, image_size=56)
    pixels = encoder.preprocess(pictures())
    assert pixels.shape == (2, 3, 56, 56)
    tower = reference(kind, folders[kind])
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True, **options).hidden_states[0]
    torch.testing.assert_close(encoder(pixels), expected)
    assert encoder.num_tokens == expected.shape[1]


def test_what_is_past_the_layer_is_gone(folders: dict[str, Path]) -> None:
    whole = load_image_encoder(str(folders["siglip"]), layer=-1)
    cut = load_image_encoder(str(folders["siglip"]), layer=1)
    block = sum(p.numel() for p in whole.model.encoder.layers[0].parameters())
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in (whole, cut)]
    assert sizes[0] - sizes[1] == 2 * block
    names = {name.split(".")[1] for name, _ in whole.named_parameters()}
    assert names == {"embeddings", "encoder"}  # neither the final norm nor the pooling head


def test_frozen_means_frozen(folders: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(folders["clip"]))
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 28, 28, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_said(dtype: torch.dtype, folders: dict[str, Path]) -> None:
    full = load_image_encoder(str(folders["clip"]))
    half = load_image_encoder(str(folders["clip"]), dtype=dtype)
    pixels = torch.randn(1, 3, 28, 28)
    assert half(pixels).dtype == dtype
    assert half.identity()["dtype"] == str(dtype).removeprefix("torch.")
    error = (half(pixels).float() - full(pixels)).norm() / full(pixels).norm()
    assert error < 0.02


def test_identity_tells_apart_all_that_changes_features(folders: dict[str, Path], tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return json.dumps(load_image_encoder(str(folders["clip"]), **options).identity(), sort_keys=True)

    keys = {
        key(),
        key(layer=-1),
        key(class_token=False),
        key(image_size=56),
        key(dtype=torch.bfloat16),
        json.dumps(load_image_encoder(str(folders["siglip"])).identity(), sort_keys=True),
    }
    assert len(keys) == 6
    assert key() == key(layer=2)  # the same layer, counted from the front


# Preprocessing ------------------------------------------------------------


def with_preprocessing(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model's folder with a preprocessing file of its own."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    CLIPImageProcessorPil(**settings).save_pretrained(target)
    return target


def test_the_folders_preprocessing_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3]}
    folder = with_preprocessing(folders["clip"], tmp_path / "m", **settings)
    published = CLIPImageProcessorPil(**settings)(images=pictures(), return_tensors="pt")["pixel_values"]
    to_the_letter = load_image_encoder(str(folder), whole_image=False)
    assert torch.equal(to_the_letter.preprocess(pictures()), published)
    squashed = load_image_encoder(str(folder))
    by_hand = [np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC), np.float32) / 255 for image in pictures()]
    expected = (torch.tensor(np.stack(by_hand)) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(
        CLIPImageProcessorPil.image_std
    )
    torch.testing.assert_close(squashed.preprocess(pictures()), expected.permute(0, 3, 1, 2))
    assert squashed.identity() != to_the_letter.identity()


def test_nothing_at_the_edge_is_cut_off(folders: dict[str, Path]) -> None:
    wide = Image.new("RGB", (280, 28), "black")
    wide.paste("white", (252, 0, 280, 28))  # only the last tenth is lit
    pixels = load_image_encoder(str(folders["clip"])).preprocess([wide])
    assert pixels[0, :, :, -1].mean() > pixels[0, :, :, 0].mean() + 1


def test_a_crop_keeps_its_share_at_another_size(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    folder = with_preprocessing(folders["clip"], tmp_path / "m", **settings)
    encoder = load_image_encoder(str(folder), whole_image=False, image_size=56)
    twice = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    expected = twice(images=pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.preprocess(pictures()), expected)


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("clip", 0.48145466, 0.26862954),
        ("siglip", 0.5, 0.5),
        ("dinov2", 0.485, 0.229),
        ("blip2", 0.48145466, 0.26862954),
    ],
)
def test_without_a_file_each_architecture_has_its_own_scaling(
    kind: str, mean: float, std: float, folders: dict[str, Path]
) -> None:
    encoder = load_image_encoder(str(folders[kind]), image_size=28)
    pixels = encoder.preprocess([Image.new("L", (1, 7), 255), Image.new("RGBA", (50, 3))])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, 0], torch.full((28, 28), (1 - mean) / std))
    torch.testing.assert_close(pixels[1, 0], torch.full((28, 28), -mean / std))
    assert encoder.preprocess([]).shape == (0, 3, 28, 28)


# Mistakes ------------------------------------------------------------


def test_mistakes_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    clip = folders["clip"]
    with pytest.raises(UserError, match=r"layer 4: clip .* -4…-1 \(or 0…3\)"):
        load_image_encoder(str(clip), layer=4)
    with pytest.raises(UserError, match=r"image_size 30 is not a multiple .* 14 px: take 28"):
        load_image_encoder(str(clip), image_size=30)
    broken = with_preprocessing(clip, tmp_path / "broken")
    (broken / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(UserError, match="preprocessing file cannot be used"):
        load_image_encoder(str(broken))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(folders["siglip"] / "model.safetensors")
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="no image encoder is known for model_type 'bert'"):
        load_image_encoder(str(other))
    (other / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(
        UserError, match=r"tensors of CLIPVisionModel are missing or of another shape, first .*class_embedding"
    ):
        load_image_encoder(str(other))
    (other / "config.json").write_text("[")
    with pytest.raises(UserError, match="not a JSON object"):
        load_image_encoder(str(other))
    (other / "config.json").write_text(json.dumps(LITE2.to_dict()))
    with pytest.raises(UserError, match=r"model\.safetensors does not fit config\.json"):
        load_image_encoder(str(other))


# Configs without weights ------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "tokens", "width", "millions"),
    [
        # parameters of the towers as published: 303.2 M and 303.5 M less one of 24 blocks, 986 M less the final norm
        (
            CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                             patch_size=14),
            {}, 257, 1024, 303.18 - 12.60,
        ),
        (
            CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                             patch_size=14, image_size=336),
            {"class_token": False}, 576, 1024, 303.51 - 12.60,
        ),
        (Blip2VisionConfig(), {}, 257, 1408, 985.95),
        (LITE2, {"layer": -1}, 81, 1280, 4.79),
    ],
)  # fmt: skip
def test_the_towers_of_gpu_recipes_on_the_meta_device(
    config: Any, options: dict[str, Any], tokens: int, width: int, millions: float
) -> None:
    encoder = build_image_encoder(config, **options)
    assert (encoder.num_tokens, encoder.width) == (tokens, width)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.03)
    assert encoder(torch.empty(2, 3, encoder.image_size, encoder.image_size, device="meta")).shape == (2, tokens, width)
    assert next(encoder.parameters()).is_meta


# The norm after the towers ------------------------------------------------------------


class FakeTower:
    def __init__(self, width: int, tokens: int, grid: tuple[int, int] | None, has_positions: bool) -> None:
        self.width, self.num_tokens, self.grid, self.has_positions = width, tokens, grid, has_positions


def test_one_tower_with_positions_is_just_normalised() -> None:
    norm = FeatureNorm([FakeTower(8, 5, None, True)])
    x = torch.randn(2, 5, 8, dtype=torch.float16)
    assert torch.equal(norm([x]), nn.functional.layer_norm(x.float(), (8,), eps=1e-6))
    assert set(norm.state_dict()) == {"norms.0.weight", "norms.0.bias"}


def test_two_towers_lie_side_by_side_at_the_wider_ones_width() -> None:
    torch.manual_seed(0)
    narrow, wide = FakeTower(6, 4, (2, 2), False), FakeTower(8, 5, None, True)
    norm = FeatureNorm([narrow, wide])
    x, y = torch.randn(3, 4, 6), torch.randn(3, 5, 8)
    out = norm([x, y])
    assert out.shape == (3, norm.num_tokens, norm.width) == (3, 9, 8)
    assert torch.equal(out[:, 4:], nn.functional.layer_norm(y, (8,), eps=1e-6))
    widened = norm.widen[0](nn.functional.layer_norm(x, (6,), eps=1e-6))
    positions = (out[:, :4] - widened).detach()
    torch.testing.assert_close(positions, positions[:1].expand(3, -1, -1))  # fixed: the same for every picture
    assert set(norm.state_dict()) == {
        "norms.0.weight", "norms.0.bias", "norms.1.weight", "norms.1.bias", "widen.0.weight", "widen.0.bias",
    }  # fmt: skip
    assert all(parameter.requires_grad for parameter in norm.parameters())


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    norm = FeatureNorm([FakeTower(8, 6, (2, 3), False)])
    nn.init.zeros_(norm.norms[0].weight)
    out = norm([torch.randn(1, 6, 8)])[0]
    for row in range(2):
        for column in range(3):
            angles = [row, row / 100, column, column / 100]  # frequencies 1 and 1/100 of four channels an axis
            expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (np.sin, np.cos) for a in pair]
            np.testing.assert_allclose(out[3 * row + column].detach(), expected, atol=1e-6)


def test_a_tower_without_positions_needs_a_grid() -> None:
    with pytest.raises(ValueError, match="neither positions nor a grid"):
        FeatureNorm([FakeTower(8, 5, None, False)])


def test_the_real_encoders_fit_the_norm(folders: dict[str, Path]) -> None:
    towers: list[ImageEncoder] = [load_image_encoder(str(folders[kind])) for kind in ("clip", "siglip")]
    norm = FeatureNorm(towers)
    images = pictures()
    out = norm([tower(tower.preprocess(images)) for tower in towers])
    assert out.shape == (2, 5 + 4, 32)


def test_the_middles_of_patches_are_told_along_the_side(folders: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(folders["clip"]), image_size=56)

    assert encoder.centres().tolist() == pytest.approx([7 / 56, 21 / 56, 35 / 56, 49 / 56])


def test_the_middles_of_a_convolutional_map_lie_near_the_border() -> None:
    centres = build_image_encoder(LITE2, layer=-1).centres()

    assert len(centres) == 9
    assert 0 < centres[0] < 1 / 18 and 17 / 18 < centres[-1] < 1
