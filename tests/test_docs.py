"""The pages of docs/ tell the truth: each of their commands runs, on tiny models and a few drawn pictures."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import save_published
from reason_data import draw_reasons, write_scienceqa
from tiny import draw_captions, save_tiny_bert, tiny_values

from adapters import recipe as recipe_module
from adapters.artefact.importing import import_published
from adapters.data.scenes.files import write_scenes
from adapters.finetune import finetune
from adapters.pretrain import pretrain
from adapters.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
# Their commands need a server: tests/serve/api/test_docs.py and tests/serve/page/test_docs.py
ELSEWHERE = {"serving.md", "demo.md"}
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ELSEWHERE]
COMMANDS = list(
    dict.fromkeys(
        line
        for page in PAGES
        for block in re.findall(
            r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )
        for line in block.splitlines()
        if line.strip()
    )
)


REASONING = {"task": "reason", "prompt": {"system": "Answer questions about the picture."}}
LONG = {"row_tokens": 1200, "micro_batch_tokens": 4000}  # a token is a character


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, vision_folder: Path, language_folders: dict[str, Path]) -> Path:
    """A folder with captions, photos, scenes and reasons, and a run of each kind on tiny models."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("captions_train.jsonl", "captions_val.jsonl"):
        draw_captions(folder, name)
    draw_captions(folder / "my_photos")
    for name in ("photo.jpg", "like_this.jpg"):
        shutil.copy(folder / "red0.png", folder / name)
    bert = save_tiny_bert(folder / "bert")
    values: Any = tiny_values(vision_folder, language_folders["llama"], folder / "captions_train.jsonl", max_steps=2)
    values["task"] = "caption"
    values["bridge"] |= {"start": str(bert), "text_branch": True}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(folder / "cache"))
        recipe = parse_recipe(values, "test")
        pretrain(recipe, folder / "runs" / "stage1", device="cpu", dtype="float32", quiet=True)
        finetune(recipe, folder / "runs" / "stage2", device="cpu", dtype="float32", quiet=True)
        draw_questions(folder)
        vqa = values | {"task": "vqa", "data": {"train": str(folder / "my_data.jsonl"), "val_fraction": 0.25}}
        recipe = parse_recipe(vqa, "test")
        finetune(recipe, folder / "runs" / "mine", device="cpu", dtype="float32", quiet=True)
        draw_reasons(folder, "my_reasons.jsonl")
        write_scenes(folder / "data" / "scenes", train=3, val=2, test=2)
        shorten_captions(folder / "data" / "scenes")
        write_scienceqa(folder / "scienceqa")
        for name, stages in (("scenes", ["rationale", "answer"]), ("thinks", ["rationale"]), ("concludes", ["answer"])):
            reasons = values | REASONING | {"reason": {"stages": stages, "rationale_tokens": 8}}
            reasons["data"] = {"train": str(folder / "my_reasons.jsonl"), "val_fraction": 0.25}
            reasons["train"] = values["train"] | LONG
            finetune(
                parse_recipe(reasons, "test"), folder / "runs" / name, device="cpu", dtype="float32", quiet=True
            )  # fmt: skip
        compared = "encoders/efficientnet-lite2-head-trained-on-captions-0"
        save_published(folder / "checkpoints" / "blip2-opt-2.7b", "blip2-opt")
        import_published(str(folder / "checkpoints" / "blip2-opt-2.7b"), folder / "runs" / "blip2")
        for made, names in (
            ("scenes", ["scienceqa"]), ("stage1", ["scenes_stage1", compared]), ("stage2", ["scenes_stage2"]),
            ("mine", ["rad"]),
        ):  # fmt: skip
            for name in names:
                shutil.copytree(folder / "runs" / made, folder / "runs" / name)
    return folder


def draw_questions(folder: Path) -> None:
    """Questions about pictures that are there, and pictures to be described."""
    rows = [
        {"image": f"{name}.jpg", "question": question, "answer": "red"}
        for name in ("photo", "like_this", "third", "fourth")
        for question in ("which colour is it?", "which part is worn?")
    ]
    for name in ("third", "fourth"):
        shutil.copy(folder / "blue1.png", folder / f"{name}.jpg")
        with (folder / f"{name}.jpg").open("ab") as file:
            file.write(name.encode())  # pictures are told apart by their bytes
    for name in ("my_data", "my_test", "rooms_train", "rooms_val", "rad_train", "rad_val"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "photos.csv").write_text(
        "photo;prompt;answer\n" + "".join(f"{row['image']};{row['question']};red\n" for row in rows)
    )
    (folder / "captions.csv").write_text("image\nphoto.jpg\nthird.jpg\n")


def shorten_captions(folder: Path) -> None:
    """A tiny bridge reads 16 tokens."""
    for file in folder.glob("captions_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["captions"] = [" ".join(caption.split()[:2]) for caption in row["captions"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in that folder, with tiny models in the place of the recipes'."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(workplace / "cache"))
    tiny = yaml.safe_load((workplace / "tiny.yaml").read_text())

    def load_tiny(name: str | Path, overrides: Any = ()) -> Recipe:
        values = load_recipe(name, overrides).model_dump(mode="json")  # recipe and overrides are read for real
        kept = {key: values["train"][key] for key in ("text_side_every", "captions", "pair_share")}
        values |= {key: tiny[key] for key in ("vision", "bridge", "language")} | {"train": tiny["train"] | kept}
        values["data"]["val_fraction"] = 0.25
        if str(values["data"]["train"]).startswith("easy-vqa"):
            values["data"] = tiny["data"] | {"train": str(workplace / "my_data.jsonl"), "val_fraction": 0.25}
        if values["task"] == "reason":
            values["reason"]["rationale_tokens"] = 8
            values["train"] |= LONG
        return parse_recipe(values, str(name))

    monkeypatch.setattr(recipe_module, "load_recipe", load_tiny)
    monkeypatch.setattr("serve.adapter.default_adapter", lambda: "runs/stage2")  # the shipped one has its own tests
    return workplace


ESTIMATES = [command for command in COMMANDS if command.startswith("querybridge estimate ")]


@pytest.mark.parametrize("command", ESTIMATES)
def test_estimates_run_as_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(command, monkeypatch) == 0


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    from serve.cli import command as cli

    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_scores_shown_have_the_names_that_are_printed(
    in_workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("querybridge evaluate my_data.jsonl --adapter runs/mine --quiet", monkeypatch) == 0
    printed = [line.split()[0] for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()]
    page = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    shown = re.search(r"^```\n(n +100\n.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert shown is not None
    names = [line.split()[0] for line in shown[1].splitlines()]
    assert [name for name in printed if name in names] == names  # some of those printed, in their order


def test_recipes_named_on_the_pages_ship() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"\b(gpu_(?:clip|blip|reason)\w*|easy_vqa_cpu|domain_cpu)\b", pages))
    assert len(named) > 9 and named <= set(shipped_recipes())
    assert all(yaml.safe_load(path.read_text()) for path in shipped_recipes().values())


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them of plain ones."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


LINKING = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "README.zh-CN.md"]


@pytest.mark.parametrize("page", LINKING, ids=[page.name for page in LINKING])
def test_links_lead_to_pages_and_headings_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ESTIMATES])
def test_every_command_runs(command: str, in_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(in_workplace / "made", ignore_errors=True)
    (in_workplace / "made").mkdir()
    if out := re.search(r"--out (\S+)", command):
        command = command.replace(out[0], f"--out made/{Path(out[1]).name}")  # the runs that other commands name stay
    command = command.replace("--start-from photo", "--start-from runs/stage2")  # models here are tiny
    # the packaged set is a wheel; the reader's file and run stand in for it and the quick start's
    command = command.replace("easy-vqa:test --adapter runs/quickstart", "my_data.jsonl --adapter runs/mine")
    words = shlex.split(command)
    monkeypatch.setattr("sys.argv", words)
    if words[0] == "python":
        asked: list[Any] = []

        def train_tower(*arguments: Any, **options: Any) -> dict[str, float]:
            asked.append(arguments)
            return {}

        monkeypatch.setattr("adapters.training.contrastive_tower.train_tower", train_tower)  # it has tests of its own
        if words[1] == "scripts/make_scenes.py":
            words[2:] = ["made/scenes", "--train", "2", "--val", "1", "--test", "1"]
        if words[1] == "scripts/probe_encoder.py":
            tiny = yaml.safe_load(Path("tiny.yaml").read_text())["vision"]["towers"][0]["source"]
            words[2:] = [tiny, "--layers=-1", "--train", "4", "--test", "2"]
        monkeypatch.setattr("sys.argv", [str(ROOT / word) if word.startswith("docs/") else word for word in words[1:]])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert stopped.value.code == 0 and len(asked) == (words[1] == "scripts/make_image_encoder.py")
        return
    from serve.cli import command as cli

    if "--resume" in words:  # there is something to go on from
        monkeypatch.setattr("sys.argv", [word for word in words if word != "--resume"])
        with pytest.raises(SystemExit):
            cli.main()
        monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code


EXAMPLES = [
    (page.name, example)
    for page in PAGES
    for example in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_python_examples_run(page: str, example: str, in_workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_workplace / "answers_from_python.jsonl").unlink(missing_ok=True)
    exec(compile(example, page, "exec"), {})
    if page == "chain-of-thought.md":
        thought, score = capsys.readouterr().out.splitlines()[-2:]
        assert thought and 0 <= float(score) <= 1
    if page == "batch.md":
        assert len((in_workplace / "answers_from_python.jsonl").read_text().splitlines()) == 8


def test_comparisons_name_recipes_and_keys_that_are_there() -> None:
    for path in sorted((ROOT / "docs" / "comparisons").glob("*.yaml")):
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        for setting in plan["settings"].values():
            own = setting["set"] if isinstance(setting, dict) else setting
            load_recipe(plan["recipe"], [*plan.get("common", []), *own])
