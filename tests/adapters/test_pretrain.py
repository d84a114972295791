"""The first stage on tiny models: it learns, logs its objectives apart, resumes as if unbroken, and is gone on from."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import draw_captions as draw_caption_data
from tiny import save_tiny_bert, tiny_values

from adapters import pretrain as pretrain_module
from adapters.artefact.artefact import load_artefact, load_vision_side_artefact
from adapters.artefact.facts import read_facts
from adapters.data.caption_batches import CaptionedPicture, draw_captions, group_captions
from adapters.data.reading import read_data
from adapters.finetune import finetune
from adapters.inference.retrieval import Retriever
from adapters.loading.assembly import assemble
from adapters.pretrain import pretrain
from adapters.recipe import Recipe, parse_recipe
from adapters.training.text_side import TextSideKeeper, model_inputs
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def recipe_of(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Any:
    def make(dropout: float = 0.1, text_branch: bool = True, **train: object) -> Recipe:
        data = draw_caption_data(tmp_path / "data")
        settings = {"batch_size": 4, "captions": 2, **train}
        values: Any = tiny_values(vision_folder, language_folders["llama"], data, **settings)
        values["task"] = "caption"
        values["bridge"] |= {"start": str(save_tiny_bert(tmp_path / "bert")), "dropout": dropout}
        values["bridge"]["text_branch"] = text_branch
        return parse_recipe(values, "test")

    return make


def run(recipe: Recipe, out: Path, **options: Any) -> Any:
    return pretrain(recipe, out, device="cpu", dtype="float32", quiet=True, **options)


def test_a_run_learns_and_logs_each_objective(recipe_of: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = recipe_of(max_steps=80, validate_every=40, learning_rate=5e-3, warmup_steps=5, dropout=0.0)
    result = run(recipe, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "itc" in line]
    assert len(steps) == 80
    for line in steps:
        assert line["loss"] == pytest.approx(line["itc"] + line["itm"] + line["itg"], abs=1e-5)
    for name in ("itc", "itg"):  # a random tower shows little, and each objective learns from it all the same
        assert sum(line[name] for line in steps[-10:]) < 0.9 * sum(line[name] for line in steps[:10]), name
    assert result.finished and result.steps == 80
    assert {p.name for p in out.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "tensorboard", "loss.png", "best", "last", "state",
    }  # fmt: skip
    facts = read_facts(out / "best")
    assert facts.kind == "representation"
    assert facts.data["pictures"] == 9 and facts.data["captions"] == 18
    assert facts.metrics["mean_recall"] == result.metrics["mean_recall"]
    assert set(facts.fingerprints) == {"vision.0", "bridge.start"}


def test_the_contrastive_loss_can_go_first_and_alone(recipe_of: Any, tmp_path: Path) -> None:
    run(recipe_of(max_steps=4, contrastive_steps=2, log_every=1), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "itc" in line]
    assert [line["itm"] > 0 and line["itg"] > 0 for line in steps] == [False, False, True, True]
    assert all(line["itc"] > 0 for line in steps)


def test_what_is_saved_is_what_was_trained(recipe_of: Any, tmp_path: Path) -> None:
    run(recipe_of(max_steps=4), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "last" / "bridge.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"feature_norm", "bridge", "heads"}
    assert not any("embeddings.words" in name for name in tensors)  # frozen, and known by fingerprint
    trained = load_file(tmp_path / "run" / "state" / "weights.safetensors")
    vision_side, _ = load_vision_side_artefact(tmp_path / "run" / "last")
    model = vision_side.representation()
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor.bfloat16().float()), name
    assert not (tmp_path / "run" / "last" / "lora").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(max_steps=7)
    run(recipe, tmp_path / "whole")
    inner = pretrain_module.model_inputs
    calls = 0

    def press_at_the_fourth(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*arguments)

    monkeypatch.setattr(pretrain_module, "model_inputs", press_at_the_fourth)
    assert not run(recipe, tmp_path / "parts").finished
    monkeypatch.undo()
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path / "cache"))
    assert run(recipe, tmp_path / "parts", resume=True).finished
    whole = load_file(tmp_path / "whole" / "state" / "weights.safetensors")
    parts = load_file(tmp_path / "parts" / "state" / "weights.safetensors")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_the_second_stage_starts_from_the_first(recipe_of: Any, tmp_path: Path) -> None:
    run(recipe_of(max_steps=4, learning_rate=1e-2), tmp_path / "first")
    with pytest.raises(UserError, match="--stage 2 --start-from"):
        load_artefact(tmp_path / "first")
    first = load_file(tmp_path / "first" / "best" / "bridge.safetensors")
    for kept in (True, False):  # with its text side and without
        out = tmp_path / f"second-{kept}"
        recipe = recipe_of(max_steps=1, learning_rate=1e-9, text_branch=kept)
        free = {"patch_dropout": 0.3} if kept else {"patch_dropout": 0.3, "text_pooling": "mean"}
        recipe = recipe.model_copy(update={"bridge": recipe.bridge.model_copy(update=free)})
        finetune(recipe, out, start_from=str(tmp_path / "first"), device="cpu", dtype="float32", quiet=True)
        second = load_file(out / "last" / "bridge.safetensors")
        assert any(name.startswith("heads.") for name in second) is kept
        assert any("text_feed_forward" in name for name in second) is kept
        for name, tensor in second.items():
            if not name.startswith("projection."):
                assert torch.equal(tensor, first[name]), name
        assert read_facts(out / "last").started_from == str(tmp_path / "first")
        load_artefact(out)
        if kept:
            load_vision_side_artefact(out)
        else:
            with pytest.raises(UserError, match="no text side"):
                load_vision_side_artefact(out)


def test_words_are_named_first_where_the_projection_is_fresh(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe_of(max_steps=2), tmp_path / "first")
    recipe = recipe_of(max_steps=1, align_steps=3, text_branch=False)
    for start, named in (("first", True), ("second", False)):
        out = tmp_path / ("second" if named else "third")
        finetune(recipe, out, start_from=str(tmp_path / start), device="cpu", dtype="float32")
        assert ("naming words: step 3/3" in capsys.readouterr().err) is named


def test_captions_are_drawn_all_before_one_comes_twice(tmp_path: Path) -> None:
    data = read_data(draw_caption_data(tmp_path))
    picture = group_captions(data.examples)[0]
    assert len(group_captions(data.examples)) == 12
    for count in (1, 2, 3, 5):
        drawn = draw_captions(picture, count, random.Random(0))
        assert len(drawn) == count
        assert set(drawn[:2]) <= set(picture.captions) and len(set(drawn[:2])) == min(count, 2)


def test_rows_of_one_picture_are_joined(tmp_path: Path) -> None:
    draw_caption_data(tmp_path)
    rows = [{"image": "red0.png", "caption": text} for text in ("one", "two")] + [{"image": "red1.png", "caption": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    joined = group_captions(read_data(tmp_path / "rows.jsonl").examples)
    assert [picture.captions for picture in joined] == [("one", "two"), ("x",)]
    assert isinstance(joined[0], CaptionedPicture)


def test_mistakes_are_one_clear_line(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bridge\.text_branch=true"):
        run(recipe_of(text_branch=False), tmp_path / "run")
    for name, value in (
        ("compile", True),
        ("label_smoothing", 0.1),
        ("self_critical", 2),
        ("align_steps", 3),
        ("text_side_every", 2),
    ):
        with pytest.raises(UserError, match=rf"train\.{name}={value}: .*the first stage has none of"):
            run(recipe_of(**{name: value}), tmp_path / "run")
    with pytest.raises(UserError, match=r"train\.contrastive_steps=2: .*pretrain RECIPE --stage 1"):
        finetune(recipe_of(contrastive_steps=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"learning_rate"):
        run(recipe_of(max_steps=9, learning_rate=1e30, clip_norm=1e30, warmup_steps=0), tmp_path / "nan")


def test_reranking_by_hand(recipe_of: Any, tmp_path: Path) -> None:
    run(recipe_of(max_steps=3), tmp_path / "run")
    vision_side, _ = load_vision_side_artefact(tmp_path / "run" / "last")
    retriever = Retriever(vision_side, batch_size=3)
    pictures = group_captions(read_data(tmp_path / "data" / "captions.jsonl").examples)[:5]
    images, texts = [p.image for p in pictures], [p.captions[0] for p in pictures]
    scores = retriever.scores(retriever.embed_images(images), retriever.embed_texts(texts))
    by_image, by_text = retriever.rerank(images, texts, scores, most=2)
    every = torch.tensor([[i, t] for i in range(5) for t in range(5)])
    odds = retriever.match(images, texts, every).reshape(5, 5)
    one = retriever.match(images, texts, torch.tensor([[3, 1]]))
    assert torch.allclose(one[0], odds[3, 1], atol=1e-5)  # whatever else is in the batch
    for i in range(5):
        best = scores[i].topk(2).indices.tolist()
        for t in range(5):
            expected = 0.5 * odds[i, t] + scores[i, t] / retriever.model.heads.temperature.item()
            assert torch.allclose(by_image[i, t], expected, atol=1e-4) is (t in best)
        assert set(by_image[i].topk(2).indices.tolist()) == set(best)
    for t in range(5):
        assert set(by_text[:, t].topk(2).indices.tolist()) == set(scores[:, t].topk(2).indices.tolist())


def test_the_text_side_is_kept_beside_an_llm(recipe_of: Any, tmp_path: Path) -> None:
    """With the first stage's objectives in every step they end lower than without, and are logged by their names."""
    out = tmp_path / "run"
    recipe = recipe_of(max_steps=80, validate_every=80, learning_rate=5e-3, text_side_every=1, dropout=0.0)
    finetune(recipe, out, device="cpu", dtype="float32", quiet=True)
    kept, _ = load_vision_side_artefact(out / "last")
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "loss" in line]
    assert steps and all(line[f"text_{name}"] > 0 for line in steps for name in ("itc", "itm", "itg"))
    without = recipe_of(max_steps=80, validate_every=80, learning_rate=5e-3, dropout=0.0)
    finetune(without, tmp_path / "without", device="cpu", dtype="float32", quiet=True)
    fallen, _ = load_vision_side_artefact(tmp_path / "without" / "last")
    pictures = group_captions(read_data(tmp_path / "data" / "captions.jsonl").examples)
    batch = [(picture, list(picture.captions)) for picture in pictures]
    losses = []
    for vision_side in (kept, fallen):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(vision_side.representation().eval()(*model_inputs(vision_side, batch)).total))
    assert losses[0] < 0.8 * losses[1]


def test_the_text_side_may_see_more_pictures_than_a_step_has(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of()
    keeper = TextSideKeeper(assemble(recipe), read_data(str(recipe.data.train)).examples, batch_size=7, pair_share=0.4)
    seen: list[tuple[int, int]] = []

    def losses(features: object, text: object, numbers: torch.Tensor, *, paired: int) -> None:
        seen.append((len(numbers), paired))

    monkeypatch.setattr(keeper, "model", losses)
    keeper.losses(step=0)
    assert seen == [(7, 3)]


def test_keeping_the_text_side_is_refused_before_anything_is_loaded(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text_branch is off.*set it to 0"):
        finetune(recipe_of(text_branch=False, text_side_every=2), tmp_path / "run", device="cpu", quiet=True)
    recipe = recipe_of(text_side_every=2)
    rows = [{"image": "red0.png", "caption": "红色", "language": "zh"}] * 2
    (tmp_path / "data" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "val.jsonl").write_text(json.dumps(rows[0]))
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": str(tmp_path / "data/val.jsonl")})})
    with pytest.raises(UserError, match="no English captions"):
        finetune(other, tmp_path / "run", device="cpu", quiet=True)


def test_lora_may_come_after_a_run_without_it(recipe_of: Any, tmp_path: Path) -> None:
    bare = recipe_of(max_steps=2)
    bare = bare.model_copy(update={"language": bare.language.model_copy(update={"lora": None})})
    finetune(bare, tmp_path / "bare", device="cpu", dtype="float32", quiet=True)
    assert not (tmp_path / "bare" / "last" / "lora").exists()
    recipe = recipe_of(max_steps=1, learning_rate=1e-9)
    start = str(tmp_path / "bare")
    finetune(recipe, tmp_path / "with", start_from=start, device="cpu", dtype="float32", quiet=True)
    before = load_file(tmp_path / "bare" / "best" / "bridge.safetensors")
    after = load_file(tmp_path / "with" / "last" / "bridge.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)] == []
    assert (tmp_path / "with" / "last" / "lora").is_dir()


def test_a_bridge_reads_instructions_after_a_first_stage(recipe_of: Any, tmp_path: Path) -> None:
    run(recipe_of(max_steps=2), tmp_path / "first")
    recipe = recipe_of(max_steps=1, learning_rate=1e-9, text_branch=False)
    recipe = recipe.model_copy(update={"bridge": recipe.bridge.model_copy(update={"instruction_aware": True})})
    start = str(tmp_path / "first")
    finetune(recipe, tmp_path / "aware", start_from=start, device="cpu", dtype="float32", quiet=True)
    first = load_file(tmp_path / "first" / "best" / "bridge.safetensors")
    aware = load_file(tmp_path / "aware" / "last" / "bridge.safetensors")
    assert any("text_feed_forward" in name for name in aware) and not any(name.startswith("heads.") for name in aware)
    carried = [name for name in aware if not name.startswith("projection.")]
    assert all(torch.allclose(aware[name], first[name], rtol=0, atol=1e-8) for name in carried)  # one tiny step apart
    fresh = recipe_of(max_steps=1, text_branch=True)
    plain = fresh.model_copy(update={"bridge": fresh.bridge.model_copy(update={"text_branch": False})})
    finetune(plain, tmp_path / "plain", device="cpu", dtype="float32", quiet=True)
    with pytest.raises(UserError, match="'bridge' differs"):  # a text side cannot come out of nothing
        finetune(fresh, tmp_path / "x", start_from=str(tmp_path / "plain"), device="cpu", dtype="float32", quiet=True)
