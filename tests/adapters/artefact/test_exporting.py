"""Adapters in the formats of others: what transformers and PEFT make of them, and what no format can hold."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from published import KINDS, answers_of, draw_pictures, save_published
from references import stir_lora
from safetensors.torch import load_file
from tiny import draw_data, save_tiny_bert, tiny_values

from adapters.artefact.artefact import adapter_fingerprint, load_artefact, read_recipe, save_artefact
from adapters.artefact.exporting import export_adapter
from adapters.artefact.facts import Facts, read_facts
from adapters.artefact.importing import import_published
from adapters.data.image_ref import ImageRef
from adapters.inference.generator import Generator
from adapters.inference.request import Request
from adapters.loading.assembly import assemble
from adapters.loading.vision_side import load_vision_side
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from qformer.errors import UserError

TEXTS = ("what is the picture of?", "is it red?", "a")


@pytest.fixture(scope="module", autouse=True)
def cache_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache folder for all of them: what is encoded and hashed once is known to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def tuned(published: Path, folder: Path, *, lora: bool = True, **changes: Any) -> Path:
    """An adapter as if it had been tuned from a checkpoint: bridge and LoRA are not what they were."""
    import_published(str(published), folder.with_name(folder.name + "-imported"))
    values = read_recipe(folder.with_name(folder.name + "-imported")).model_dump(mode="json")
    values["language"]["lora"] = {"rank": 3, "alpha": 6} if lora else None
    values["prompt"]["question"] = "{question}"  # transformers adds no words either
    for key, section in changes.items():
        values[key] |= section
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in made.parts().values():
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if lora:
        stir_lora(made.model, seed=3)
    save_artefact(folder, made, Facts(made.fingerprints))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tuned adapter of a kind, made once and left as it is; "imported" is one without LoRA."""
    known: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in known:
            folder = tmp_path_factory.mktemp("adapters")
            if kind == "imported":  # what the tuned one was tuned from
                known[kind] = make("blip2-opt").with_name("adapter-imported")
            else:
                save_published(folder / "published", kind)
                known[kind] = tuned(folder / "published", folder / "adapter")
        return known[kind]

    return make


Answers = dict[int, list[list[int]]]  # by the number of beams


def answers(artefact: Path, pictures: list[Path], *beams: int) -> Answers:
    """What the adapter writes, up to and with the end token."""
    adapter, _ = load_artefact(artefact, dtype="float32")
    asked = [
        Request(adapter.prompts.vqa(text), (ImageRef(str(path), path=path),))
        for path, text in zip(pictures, TEXTS, strict=True)
    ]
    return {
        count: [list(row) for row in Generator(adapter).write(asked, Decoding(max_new_tokens=8, num_beams=count))]
        for count in beams
    }


@pytest.fixture(scope="module")
def right(adapters: Callable[[str], Path], pictures: list[Path]) -> Callable[[str], Answers]:
    """What a tuned adapter of a kind writes, greedily and with five beams; asked once."""
    known: dict[str, Answers] = {}

    def ask(kind: str) -> Answers:
        if kind not in known:
            known[kind] = answers(adapters(kind), pictures, 1, 5)
        return known[kind]

    return ask


@pytest.fixture(scope="module")
def exported(
    adapters: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A tuned adapter of a kind as a BLIP-2 of transformers, and what the export says; made once."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp("exported") / kind
            known[kind] = folder, dict(export_adapter(str(adapters(kind)), "blip2", folder))
        return known[kind]

    return make


def opened(folder: Path) -> tuple[Any, Any]:
    """What transformers makes of a folder: the model and its processor."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(tf, name).from_pretrained(folder, dtype=torch.float32)
    return model.eval(), tf.AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_answers_as_the_adapter_does(
    exported: Callable[[str], tuple[Path, dict[str, Any]]],
    right: Callable[[str], Answers],
    pictures: list[Path],
    kind: str,
) -> None:
    folder, found = exported(kind)
    assert found["format"] == "blip2" and "with LoRA merged" in found["what"]
    model, processor = opened(folder)
    for beams, expected in right(kind).items():
        assert answers_of(model, processor, pictures, TEXTS, beams=beams) == expected
    assert len({tuple(row) for row in expected}) > 1


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-llama"])
def test_lora_apart_is_peft_s_on_the_exported_folder(
    adapters: Callable[[str], Path], right: Callable[[str], Answers], pictures: list[Path], tmp_path: Path, kind: str
) -> None:
    export_adapter(str(adapters(kind)), "blip2", tmp_path / "out", lora_apart=True)
    model, processor = opened(tmp_path / "out")
    expected = right(kind)[5]
    assert answers_of(model, processor, pictures, TEXTS, beams=5) != expected
    patched = PeftModel.from_pretrained(model, str(tmp_path / "out" / "lora"))
    assert answers_of(patched, processor, pictures, TEXTS, beams=5) == expected
    touched = [name for name, module in patched.named_modules() if hasattr(module, "lora_A")]
    assert touched and all(".language_model." in name for name in touched)


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-t5"])
def test_import_export_import_is_the_same_bit_by_bit(tmp_path: Path, kind: str) -> None:
    model = save_published(tmp_path / "published", kind)
    import_published(str(tmp_path / "published"), tmp_path / "first")
    export_adapter(str(tmp_path / "first"), "blip2", tmp_path / "out", shard_size="20KB")
    import_published(str(tmp_path / "out"), tmp_path / "second")
    first, second = (load_file(tmp_path / name / "bridge.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again, _ = opened(tmp_path / "out")
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    one, other = read_facts(tmp_path / "first"), read_facts(tmp_path / "second")
    assert one.fingerprints == other.fingerprints
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # shards as transformers cuts them
    sizes = [
        {path.name: path.stat().st_size // 1000 for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("out", "theirs")
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) > 2
    index = [json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("out", "theirs")]
    assert index[0]["weight_map"] == index[1]["weight_map"]


def test_the_export_answers_in_a_fresh_process(
    exported: Callable[[str], tuple[Path, dict[str, Any]]],
    right: Callable[[str], Answers],
    pictures: list[Path],
    tmp_path: Path,
) -> None:
    folder, _ = exported("blip2-opt")
    code = (
        "import sys, json, torch, transformers as tf; from PIL import Image\n"
        "folder, *pictures = sys.argv[1:]\n"
        "model = tf.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)\n"
        "processor = tf.Blip2Processor.from_pretrained(folder, backend='pil')\n"
        "processor.tokenizer.padding_side = 'left'\n"
        "images = [Image.open(path) for path in pictures]\n"
        f"inputs = processor(images=images, text={list(TEXTS)!r}, padding=True, return_tensors='pt')\n"
        "ids = model.generate(**inputs, max_new_tokens=8)[:, inputs['input_ids'].shape[1]:]\n"
        "print(json.dumps(ids.tolist()))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(folder), *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    expected = right("blip2-opt")[1]
    assert [row[: len(known)] for row, known in zip(rows, expected, strict=True)] == expected


@pytest.mark.parametrize("kind", ["opt", "t5", "qwen2"])
def test_the_llm_alone_has_the_same_logits(
    tmp_path: Path, kind: str, vision_folder: Path, language_folders: dict[str, Path]
) -> None:
    values = tiny_values(vision_folder, language_folders[kind], draw_data(tmp_path / "data"))
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    stir_lora(made.model, seed=3)
    save_artefact(tmp_path / "adapter", made, Facts(made.fingerprints))
    adapter, _ = load_artefact(tmp_path / "adapter", dtype="float32")
    llm = adapter.model.language
    loader: Any = tf.AutoModelForSeq2SeqLM if kind == "t5" else tf.AutoModelForCausalLM
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" else {})
    with torch.no_grad():
        expected = llm.model(**inputs).logits
        plain = loader.from_pretrained(language_folders[kind], dtype=torch.float32)(**inputs).logits
    assert (plain - expected).abs().max() > 0.1  # LoRA matters
    # PEFT's own merge, rounded to bfloat16, where weights of such a size cost a hundredth of the logits by themselves
    halves = copy.deepcopy(llm.model).merge_and_unload().to(torch.bfloat16).float()
    with torch.no_grad():
        rounded = halves(**inputs).logits
    for dtype, right, tolerance in (("float32", expected, 1e-5), (None, rounded, 1e-2)):
        out = tmp_path / f"out-{dtype}"
        export_adapter(str(tmp_path / "adapter"), "merged-llm", out, dtype=dtype)
        stored = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
        assert stored == {torch.float32 if dtype else torch.bfloat16}
        merged = loader.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            got = merged(**inputs).logits
        assert (got - right).norm() <= tolerance * right.norm()
        tokenizer = tf.AutoTokenizer.from_pretrained(out)
        assert tokenizer("a b")["input_ids"] == llm.tokenizer("a b")["input_ids"]

    export_adapter(str(tmp_path / "adapter"), "peft", tmp_path / "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    base = loader.from_pretrained(language_folders[kind], dtype=torch.float32)
    with torch.no_grad():
        got = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()(**inputs).logits
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["instructblip-t5", "clip"])
def test_a_bundle_needs_nothing_else(
    tmp_path: Path,
    pictures: list[Path],
    kind: str,
    vision_folder: Path,
    language_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = tmp_path / "sources"
    if kind == "clip":
        shutil.copytree(vision_folder, sources / "clip")
        shutil.copytree(language_folders["llama"], sources / "llm")
        values: Any = tiny_values(sources / "clip", sources / "llm", Path("not_read.jsonl"))
        values["bridge"] |= {"start": str(save_tiny_bert(sources / "bert")), "instruction_aware": True}
        values["bridge"]["preset"] = "tiny"
        made = assemble(parse_recipe(values, "test"), dtype="float32")
        stir_lora(made.model, seed=3)
        artefact = tmp_path / "adapter"
        save_artefact(artefact, made, Facts(made.fingerprints))
    else:
        save_published(sources, kind)
        artefact = tuned(sources, tmp_path / "adapter")
    expected = answers(artefact, pictures, 5)
    whole = adapter_fingerprint(load_artefact(artefact, dtype="float32")[0])
    found = export_adapter(str(artefact), "bundle", tmp_path / "bundle")
    assert found["what"] == f"the adapter with {3 if kind == 'clip' else 1} frozen models"
    shutil.rmtree(sources)
    with pytest.raises(UserError, match="there is no such folder"):
        load_artefact(artefact, dtype="float32", offline=True)
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path / "another"))
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    again, _ = load_artefact(moved, dtype="float32", offline=True)
    assert adapter_fingerprint(again) == whole
    assert answers(moved, pictures, 5) == expected
    export_adapter(str(moved), "bundle", tmp_path / "twice", offline=True)
    assert adapter_fingerprint(load_artefact(tmp_path / "twice", dtype="float32", offline=True)[0]) == whole
    shutil.rmtree(moved / "models" / "0")
    with pytest.raises(UserError, match=r"the bundle lacks models/0"):
        load_artefact(moved, dtype="float32", offline=True)


def test_a_first_stage_is_bundled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_published(tmp_path / "published", "blip2-retrieval")
    import_published(str(tmp_path / "published"), tmp_path / "run")
    export_adapter(str(tmp_path / "run"), "bundle", tmp_path / "bundle")
    shutil.rmtree(tmp_path / "published")
    side = load_vision_side(read_recipe(tmp_path / "bundle"), offline=True, artefact=tmp_path / "bundle")
    assert side.has_text_side
    with pytest.raises(UserError, match="is the first stage and has no LLM"):
        export_adapter(str(tmp_path / "run"), "blip2", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "onnx"}, "--to onnx: take one of blip2, peft, merged-llm, bundle"),
        ({"to": "peft", "lora_apart": True}, "--lora-apart goes with --to blip2, not peft"),
        ({"to": "bundle", "dtype": "bfloat16"}, "--dtype and --shard-size go with"),
        ({"to": "blip2", "dtype": "int4"}, "--dtype int4: take one of"),
        ({"to": "blip2", "shard_size": "big"}, "--shard-size big"),
        ({"to": "peft"}, "this adapter has no LoRA"),
        ({"to": "merged-llm"}, "this adapter has no LoRA"),
        ({"to": "blip2", "lora_apart": True}, "this adapter has no LoRA"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    adapters: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        export_adapter(str(adapters("imported")), out=tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_what_a_blip2_has_no_place_for_is_said(
    tmp_path: Path, vision_folder: Path, language_folders: dict[str, Path]
) -> None:
    values: Any = tiny_values(vision_folder, language_folders["opt"], Path("not_read.jsonl"))
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    save_artefact(tmp_path / "adapter", made, Facts(made.fingerprints))
    with pytest.raises(UserError, match="is a clip_vision_model, and a BLIP-2 holds its own ViT alone"):
        export_adapter(str(tmp_path / "adapter"), "blip2", tmp_path / "out")
    save_published(tmp_path / "published", "blip2-opt")
    values["vision"] = {"towers": [{"source": str(tmp_path / "published")}]}
    values["language"]["source"] = str(language_folders["llama"])
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    save_artefact(tmp_path / "chat", made, Facts(made.fingerprints))
    with pytest.raises(UserError, match="the LLM has a chat template"):
        export_adapter(str(tmp_path / "chat"), "blip2", tmp_path / "out")
    values["vision"]["towers"][0]["layer"] = 1
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    save_artefact(tmp_path / "layer", made, Facts(made.fingerprints))
    with pytest.raises(UserError, match="it reads another layer"):
        export_adapter(str(tmp_path / "layer"), "blip2", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_blip2_tower_with_a_plain_llm_is_a_blip2(
    tmp_path: Path, pictures: list[Path], language_folders: dict[str, Path]
) -> None:
    save_published(tmp_path / "published", "blip2-opt")
    values: Any = tiny_values(tmp_path / "published", language_folders["opt"], Path("not_read.jsonl"))
    values["prompt"] = {"question": "{question}"}
    values["vision"]["towers"][0]["features"] = "float32"
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    stir_lora(made.model, seed=3)
    save_artefact(tmp_path / "adapter", made, Facts(made.fingerprints))
    export_adapter(str(tmp_path / "adapter"), "blip2", tmp_path / "out")
    model, processor = opened(tmp_path / "out")
    assert answers_of(model, processor, pictures, TEXTS, beams=5) == answers(tmp_path / "adapter", pictures, 5)[5]


@pytest.mark.parametrize("to", ["blip2", "peft", "merged-llm", "bundle"])
def test_a_full_disk_leaves_nothing_behind(
    adapters: Callable[[str], Path], tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = adapters("blip2-opt")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qformer.shards.save_file", full)
    monkeypatch.setattr("adapters.artefact.export_language.shutil.copy", full)
    with pytest.raises(UserError, match=r"No space left on device.*free space") as error:
        export_adapter(str(artefact), to, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_what_stands_in_the_folder_is_left_alone(adapters: Callable[[str], Path], tmp_path: Path) -> None:
    artefact = adapters("blip2-opt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="there is something already"):
        export_adapter(str(artefact), "blip2", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"
