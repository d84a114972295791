"""The command: what it prints where, its exit codes, and the one line that each mistake gets."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import FAST, Call, Outcome
from safetensors.torch import load_file, save_file

from adapters.inference.request import LOW

PYTHON = [sys.executable, "-c", "from serve.cli.command import main; main()"]


@pytest.fixture
def picture(data_file: Path) -> Path:
    return data_file.parent / "1.png"


# what is printed where ---------------------------------------------------------------------------------------


def test_ask_prints_the_answer_alone(call: Call, run_folder: Path, picture: Path) -> None:
    plain = call("ask", picture, "what colour is it?", "--adapter", run_folder, *FAST)
    found = call("ask", picture, "what colour is it?", "--adapter", run_folder, "--json", *FAST).values

    assert plain.code == 0
    assert plain.out == found["answer"] + "\n"
    sure = found.pop("confidence")
    assert 0 < sure <= 1 and ("low confidence" in plain.err) == (sure < LOW)
    assert found == {"images": [str(picture)], "question": "what colour is it?", "answer": found["answer"]}


def test_ask_with_choices_prints_their_probabilities(call: Call, run_folder: Path, picture: Path) -> None:
    asked = ("ask", picture, "what colour is it?", "--adapter", run_folder, "--choices", "red,green, blue")
    plain, found = call(*asked, *FAST), call(*asked, "--json", *FAST).values

    assert set(found["choices"]) == {"red", "green", "blue"}
    assert sum(found["choices"].values()) == pytest.approx(1, abs=1e-5)
    assert found["answer"] == max(found["choices"], key=found["choices"].__getitem__)
    assert [line.split()[-1] for line in plain.out.splitlines()] == list(found["choices"])
    assert "--choices: 1 given" in call(*asked[:-1], "red", *FAST).err
    listed = call(*asked[:-1], '["red, blue", "green"]', "--json", *FAST).values
    assert set(listed["choices"]) == {"red, blue", "green"}
    assert "--choices" in call(*asked[:-1], '["red, blue", "green"', *FAST).mistake()


def test_ask_takes_several_pictures_and_settings(call: Call, run_folder: Path, data_file: Path) -> None:
    two = [data_file.parent / "0.png", data_file.parent / "1.png"]
    short = call("ask", *two, "what?", "--max-new-tokens", 2, "--json", "--adapter", run_folder, *FAST).values
    beams = call(
        "ask", *two, "what?", "--decoding", "paper-vqa", "--beams", 2, "--json", "--adapter", run_folder, *FAST
    )

    assert short["images"] == [str(path) for path in two]
    assert len(short["answer"]) <= 2  # a token is a character here
    assert isinstance(beams.values["answer"], str)


def test_the_adapters_recipe_says_how_questions_are_answered(call: Call, run_folder: Path, data_file: Path) -> None:
    recipe = run_folder / "best" / "recipe.yaml"
    before = recipe.read_text(encoding="utf-8")
    asked = ["ask", data_file.parent / "0.png", "what?", "--json", "--adapter", run_folder, *FAST]
    named, greedy = call(*asked, "--decoding", "likeliest").values, call(*asked, "--decoding", "greedy").values
    assert call(*asked).values == greedy
    try:
        recipe.write_text(before.replace("decoding: greedy", "decoding: likeliest"), encoding="utf-8")
        default_decoding, changed = call(*asked).values, call(*asked, "--beams", 1).values
    finally:
        recipe.write_text(before, encoding="utf-8")

    assert default_decoding == named and changed == greedy != named


def test_caption_describes_each_picture(call: Call, run_folder: Path, data_file: Path) -> None:
    two = [str(data_file.parent / "0.png"), str(data_file.parent / "1.png")]
    options = ["--max-new-tokens", 3, "--language", "zh", "--adapter", run_folder, *FAST]
    found = call("caption", *two, "--json", *options).values
    plain = call("caption", *two, *options)

    assert found["language"] == "zh"
    assert list(found["captions"]) == two
    assert plain.out == "".join(f"{name}: {text}\n" for name, text in found["captions"].items())


def test_batch_reports_and_goes_on(call: Call, run_folder: Path, data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--out", out, "--adapter", run_folder, "--max-new-tokens", 3, "--batch-size", 2, *FAST]
    first = call("batch", data_file, "--limit", 3, "--json", *options)
    second = call("batch", data_file, "--limit", 5, "--json", "--quiet", *options)

    assert first.values == {"out": str(out), "answered": 3, "already": 0, "failed": 0}
    assert first.err == "answered 3/3\n"
    assert second.values == {"out": str(out), "answered": 2, "already": 3, "failed": 0}
    assert second.err == ""
    assert len(out.read_text(encoding="utf-8").splitlines()) == 5


def test_evaluate_scores_as_fractions(call: Call, run_folder: Path, data_file: Path) -> None:
    found = call("evaluate", data_file, "--adapter", run_folder, "--json", "--limit", 6, *FAST).values
    blank = call("evaluate", data_file, "--adapter", run_folder, "--json", "--blank-images", "--quiet", *FAST).values

    assert found["n"] == 6
    assert 0 <= found["exact_match_low"] <= found["exact_match"] <= found["exact_match_high"] <= 1
    assert 0 <= found["vqa_accuracy"] <= 1
    assert blank["pictures"] == 12
    # three colours, four pictures each; yes and no, six each: 4/12 and 6/12
    assert blank["commonest_answer"] == pytest.approx((4 + 6) / 24)
    assert blank["n"] == 24


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "retrieval", "--beams", 3], "not for retrieval"),
        (["--task", "caption", "--no-rerank"], "--no-rerank goes with --task retrieval, not caption"),
    ],
)
def test_flags_of_another_task_are_refused(words: list[object], told: str, call: Call, data_file: Path) -> None:
    assert told in call("evaluate", data_file, *words).mistake()


def test_finetune_prints_one_object_and_leaves_a_run(call: Call, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = call("finetune", recipe_file, "--out", out, "--json", "--set", "train.max_steps=2", *FAST)

    assert done.values["steps"] == 2
    assert done.values["best"] == str(out / "best")
    assert "val_loss" in done.values
    assert {path.name for path in out.iterdir()} >= {"best", "last", "recipe.yaml", "metrics.jsonl"}
    assert "parameters" in done.err  # messages and progress

    again = call("finetune", recipe_file, "--out", out, *FAST).mistake()
    assert again == f"--out {out}: a run of 2 steps stands there; add --resume to go on, or name another folder"


def test_finetune_learns_from_a_bare_data_file(
    call: Call, recipe_file: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe of the house is replaced by the tiny one; the file and the flags must still reach it."""
    tiny = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    tiny["data"]["train"] = "easy-vqa:train"
    (tmp_path / "domain_cpu.yaml").write_text(yaml.safe_dump(tiny), encoding="utf-8")
    monkeypatch.setattr("adapters.recipe.shipped_recipes", lambda: {"domain_cpu": tmp_path / "domain_cpu.yaml"})
    monkeypatch.chdir(tmp_path)

    done = call(
        "finetune", data_file, "--seed", 7, "--task", "vqa", "--quiet", "--json", "--set", "train.max_steps=1", *FAST
    )
    recipe = yaml.safe_load(Path("runs/data/recipe.yaml").read_text(encoding="utf-8"))

    assert done.values["out"] == "runs/data"
    assert done.err == ""
    assert recipe["data"]["train"] == str(data_file)
    assert recipe["train"]["seed"] == 7


def test_help_is_there_for_every_command_and_for_none(call: Call) -> None:
    assert call().out == call("--help").out == call("-h").out
    for command in ("finetune", "ask", "caption", "batch", "evaluate", "demo", "models", "doctor", "data", "cache"):
        assert command in call("--help").out
        shown = call(command, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert "Usage: querybridge" in shown.out


def test_help_comes_within_a_second_and_without_torch() -> None:
    program = """
import sys
sys.argv = ["querybridge", "--help"]
from serve.cli.command import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "gradio", "peft"} & set(sys.modules)), file=sys.stderr)
"""
    times = []
    for _ in range(3):
        began = time.monotonic()
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        times.append(time.monotonic() - began)

    assert "finetune" in shown.stdout
    assert shown.stderr == "[]\n"
    assert min(times) < 1, times  # the slower ones measure what else the machine is doing


# mistakes ----------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_used_is_told_before_anything_is_loaded(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello", encoding="utf-8")
    nowhere = ["--adapter", tmp_path / "no adapter either"]

    for command, rest in (("ask", ["what?"]), ("caption", [])):
        missing = call(command, tmp_path / "missing.png", *rest, *nowhere).mistake()
        assert missing == f"image '{tmp_path}/missing.png' is not there: correct the path or put the file there"
        empty = call(command, tmp_path / "empty.png", *rest, *nowhere).mistake()
        assert empty == f"image '{tmp_path}/empty.png' is empty (0 bytes): replace the file"
        text = call(command, tmp_path / "text.jpg", *rest, *nowhere).mistake()
        assert text.startswith(f"image '{tmp_path}/text.jpg' is not a picture (it starts with b'hello')")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "a.png", "what?", "--adaptor", "x"], "No such option: --adaptor"),
        (["ask"], "Missing argument"),
        (["ask", "a.png"], 'ask: only "a.png" was given; write querybridge ask IMAGE "QUESTION"'),
        (["aks", "a.png", "what?"], "No such command 'aks'"),
        (["batch", "rows.jsonl"], "Missing option '--out'"),
        (["batch", "rows.jsonl", "--out", "x", "--limit", "many"], "Invalid value for '--limit'"),
        (["batch", "rows.jsonl", "--out", "x", "--limit", "0"], "Invalid value for '--limit'"),
        (["demo", "--port", "http"], "Invalid value for '--port'"),
        (["demo", "--port", "70000"], "Invalid value for '--port'"),
        (["batch", "rows.jsonl", "--out", "x", "--decoding", "best"], "there is no preset 'best'"),
        (["finetune", "easy_vqa_cqu"], "no shipped recipe of that name; near: easy_vqa_cpu"),
        (["finetune", "nowhere.jsonl"], "nowhere.jsonl' is not there"),
        (["finetune", "RECIPE", "--set", "train.epoch=2"], "unknown key 'train.epoch'; did you mean 'epochs'?"),
        (["finetune", "RECIPE", "--set", "train.epochs=many"], "'train.epochs' is 'many'"),
        (["finetune", "RECIPE", "--set", "train.epochs"], "--set train.epochs: write it as key=value"),
        (["finetune", "RECIPE", "--task", "song"], "'task' is 'song'"),
        (["finetune", "RECIPE", "--resume"], "--resume: "),
        (["finetune", "RECIPE", "--device", "tpu"], "--device tpu: "),
        (["finetune", "RECIPE", "--dtype", "float8"], "--dtype float8: take one of float32, bfloat16"),
        (["finetune", "RECIPE", "--start-from", "nowhere"], "nowhere: no such folder"),
        (["finetune", "RECIPE", "--set", "data.train=nowhere.csv"], "nowhere.csv' is not there"),
        (["finetune", "RECIPE", "--set", "language.source=no/where/at/all"], "no/where/at/all"),
    ],
)
def test_a_wrong_call_gets_one_line_and_code_2(
    call: Call, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in call(*[str(recipe_file) if word == "RECIPE" else word for word in arguments]).mistake()
    assert not Path("runs").exists()


def test_a_missing_adapter_is_told(call: Call, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.adapter.shipped_adapters", lambda: [])

    assert "--adapter: no adapter ships with this version" in call("ask", picture, "what?").mistake()
    named = call("ask", picture, "what?", "--adapter", tmp_path / "nowhere").mistake()
    assert named == f"--adapter {tmp_path}/nowhere: no such folder, and no shipped adapter of that name"
    empty = call("ask", picture, "what?", "--adapter", tmp_path).mistake()
    assert "this folder holds no artefact" in empty


@pytest.fixture
def artefact(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny adapter, to be spoilt."""
    return Path(shutil.copytree(run_folder / "best", tmp_path / "artefact"))


def change_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Change a file of tensors; returns the name of the one that was first."""
    state = load_file(path)
    first = min(state)
    change(state)
    save_file(state, path)
    return first


def test_an_adapter_of_another_base_model_is_refused(
    call: Call, artefact: Path, picture: Path, language_folders: dict[str, Path]
) -> None:
    recipe = artefact / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace(str(language_folders["llama"]), str(language_folders["qwen2"])), encoding="utf-8")

    said = call("ask", picture, "what?", "--adapter", artefact, *FAST).mistake()

    assert f"{artefact}: it was trained on language weights sha256:" in said
    assert f"but {language_folders['qwen2']} here has sha256:" in said


@pytest.mark.parametrize("part", ["bridge.safetensors", "lora/adapter_model.safetensors"])
def test_a_damaged_adapter_is_refused(call: Call, artefact: Path, picture: Path, part: str) -> None:
    def said() -> str:
        return call("ask", picture, "what?", "--adapter", artefact, *FAST).mistake()

    path = artefact / part
    whole = path.read_bytes()

    first = change_tensors(path, lambda state: state.pop(min(state)))
    assert f"1 missing ({first})" in said()

    path.write_bytes(whole)
    change_tensors(path, lambda state: state.update(foreign=state[min(state)].clone()))
    assert "1 unexpected (foreign)" in said()

    path.write_bytes(whole)
    change_tensors(path, lambda state: state.update({min(state): state[min(state)].flatten()[:1].clone()}))
    assert f"{first} is [1], not [" in said()

    path.write_bytes(whole[:-100])
    assert str(path) in said()

    path.unlink()
    assert str(path) in said()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("artefact.json", "{", "artefact.json: damaged or not ours"),
        ("artefact.json", '{"format_version": 99}', "format 99 is newer than this querybridge reads"),
        ("recipe.yaml", "a: [", "this is not YAML"),
        ("recipe.yaml", "a: 1", "'vision' is missing"),
        ("lora/adapter_config.json", "{", "adapter_config.json: cannot be read"),
        ("lora/adapter_config.json", '{"peft_type": "WHAT"}', "adapter_config.json: cannot be read"),
        ("lora/adapter_config.json", None, "adapter_config.json: cannot be read (no such file)"),
    ],
)
def test_a_damaged_description_is_refused(
    call: Call, artefact: Path, picture: Path, name: str, content: str | None, says: str
) -> None:
    (artefact / name).unlink()
    if content is not None:
        (artefact / name).write_text(content, encoding="utf-8")

    assert says in call("ask", picture, "what?", "--adapter", artefact, *FAST).mistake()


def test_a_loss_that_is_no_number_stops_with_what_to_try(call: Call, recipe_file: Path, tmp_path: Path) -> None:
    wild = ["--set", "train.learning_rate=1e36", "--set", "train.max_steps=9", "--set", "train.weight_decay=0"]

    said = call("finetune", recipe_file, "--out", tmp_path / "run", "--quiet", *wild, *FAST).mistake()

    assert said.startswith("the loss is ")
    assert "--set train.learning_rate=" in said


def test_a_fault_of_ours_shows_its_traceback_and_code_1(
    call: Call, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("serve.adapter.load_adapter", broken)
    found = call("ask", picture, "what?")

    assert found.code == 1
    assert "RuntimeError: a bug" in found.err
    assert found.err.endswith("not yours; please report the lines above\n")


# Ctrl-C ------------------------------------------------------------------------------------------------------


def test_ctrl_c_says_stopped_and_exits_with_130(call: Call, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("serve.adapter.load_adapter", pressed)

    assert call("ask", picture, "what?") == Outcome(130, "", "querybridge: stopped\n")


def test_training_stopped_by_ctrl_c_goes_on(call: Call, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps_only = ["--set", "train.max_steps=60", "--set", "train.validate_every=60"]
    options = ["finetune", str(recipe_file), "--out", str(out), *steps_only, "--quiet", *FAST]
    run = subprocess.Popen([*PYTHON, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    steps = out / "metrics.jsonl"
    began = time.monotonic()
    while not (steps.exists() and steps.read_text(encoding="utf-8").count("\n") >= 2):
        assert run.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    printed, said = run.communicate(timeout=90)

    assert (run.returncode, printed, said) == (130, "", "querybridge: stopped\n")
    done = call(*options, "--resume", "--json").values
    assert done["steps"] == 60
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == list(range(1, 61))  # no step twice, none left out
