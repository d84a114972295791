"""Make the photo adapter that ships: the first stage, nine runs of the second, its temperature and its scores.

    .venv/bin/python scripts/make_photo.py DATA

DATA holds `flickr8k/` (captions_{train,val}.jsonl, captions_{train,val}.zh.jsonl, reasons_{train,val}.jsonl,
boxes_{train,val}.jsonl), `daquar/` (questions_{train,val}.jsonl) and `broad/` (questions_{train,val}.jsonl,
captions_{train,val}.jsonl). The eighth run goes on from the mean of the two before it. Twelve hours on two cores; a
stopped run goes on, and what is done is skipped. The adapter ends in adapters/shipped/photo.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs")
STAGE1, STAGE2, MORE = RUNS / "photo_stage1", RUNS / "photo_stage2", RUNS / "photo_more"
ASKED, VIEWED, SEEN = RUNS / "photo_asked", RUNS / "photo_viewed", RUNS / "photo_seen"
FURTHER, MATCHED, MEAN = RUNS / "photo_further", RUNS / "photo_matched", RUNS / "photo_mean"
BROAD, SETTLED = RUNS / "photo_broad", RUNS / "photo_settled"
MADE = RUNS / "photo_questions"
FLICKR = "Flickr8k (Hodosh et al. 2013) - non-commercial research"
BROAD_TERMS = (
    "photos of everything from ten public sets (caltech, CC BY 4.0 as far as known; flickrcc, CC BY 2.0, authors in its"
    " credits.csv; grocery, MIT; clothing, CC0; imagen, sports, imagenette, pacs, houses and coco128 without a stated"
    " licence) - non-commercial research; Flickr30k Entities (Plummer et al. 2015) - non-commercial research"
)
ADDED_TERMS = (  # by stage 2; it inherits the first stage's
    "Flickr8k-CN (Li et al. 2016) - non-commercial research; DAQUAR (Malinowski and Fritz 2014) on NYU Depth"
    " v2 - research; e-SNLI-VE (Do et al. 2020, Kayser et al. 2021) - research"
)


@dataclass(frozen=True)
class Mixture:
    """Rows of each file that a run learns from; None takes all, 0 none. Questions may come several times.

    Args:
        english: pictures with English captions.
        chinese: pictures with Chinese captions.
        questions: questions on rooms.
        made: questions made from the English captions.
        reasons: statements with reasons.
        own: statements with the reasons that an adapter gave by itself, to answer from and not to give.
        repeat: how often the questions on rooms come.
        broad: questions on photos of everything, in three wordings each.
        named: captions of these photos, which name what is there.
        wider: questions made of captions and boxes, and requests for a description.
    """

    english: int | None = None
    chinese: int = 2000
    questions: int | None = None
    made: int | None = 0
    reasons: int = 1500
    own: int | None = 0
    repeat: int = 2
    broad: int | None = 0
    named: int | None = 0
    wider: int | None = 0


VALIDATION = Mixture(english=100, chinese=100, questions=100, reasons=50, repeat=1)


@dataclass(frozen=True)
class Run:
    """A run of the second stage: its folder, what it starts from, what it learns, its changes to the recipe."""

    out: Path
    start: Path
    mixture: Mixture
    overrides: tuple[str, ...] = ()
    validation: Mixture = VALIDATION
    terms: str = ADDED_TERMS


FASTER = ("train.compile=true", "train.row_tokens=144", "train.micro_batch_tokens=1536")
AGAIN = ("train.learning_rate=4e-4", "train.validate_every=700")
LARGER = (  # through the better tower, at a larger size, in views
    *AGAIN,
    "vision.towers.0.image_size=320",
    "train.text_side_every=8",
    "train.label_smoothing=0.1",
    "data.views=4",
    "bridge.patch_dropout=0.2",
)
BEFORE = ("vision.towers.0.difference=flickr8k",)  # the tower that was trained on whole pictures
RUNS_OF_STAGE2 = (
    Run(STAGE2, STAGE1, Mixture(), BEFORE),
    # English and questions go on; the rest is kept in mind
    Run(
        MORE,
        STAGE2,
        Mixture(chinese=400, reasons=200),
        (*BEFORE, *AGAIN, "train.seed=1", "train.epochs=2", "train.text_side_every=16"),
    ),
    # what can be asked of a photo taken outdoors, and rooms; known by heart by now, pictures are shown in part
    Run(
        ASKED,
        MORE,
        Mixture(chinese=800, made=None, reasons=300, repeat=3),
        (*BEFORE, *AGAIN, "train.seed=2", "train.epochs=0.5", "bridge.patch_dropout=0.5", "bridge.dropout=0.2"),
        replace(VALIDATION, made=100),
    ),
    # everything once more, on parts of each picture and mirrored ones
    Run(
        VIEWED,
        ASKED,
        Mixture(chinese=800, made=6000, reasons=200),
        (
            *BEFORE,
            *AGAIN,
            "train.seed=4",
            "train.epochs=0.8",
            "train.validate_every=400",
            "train.text_side_every=12",
            "data.views=3",
            "bridge.patch_dropout=0.2",
        ),
        replace(VALIDATION, made=100),
    ),
    # through the tower that was trained on parts of pictures too, at a larger size
    Run(
        SEEN,
        VIEWED,
        Mixture(chinese=800, made=8000, reasons=300, repeat=3),
        (*LARGER, "train.seed=5", "train.epochs=1.25", "train.validate_every=565"),
        replace(VALIDATION, made=100),
    ),
    # the same from there, shorter: its learning rate goes up and comes down once more
    Run(
        FURTHER,
        SEEN / "last",
        Mixture(chinese=600, made=5000, reasons=300, repeat=3),
        (*LARGER, "train.seed=6", "train.epochs=0.62", "train.validate_every=520"),
        replace(VALIDATION, made=100),
    ),
    # once more, with four times as many steps of the first stage's objectives beside
    Run(
        MATCHED,
        FURTHER / "last",
        Mixture(chinese=600, made=5000, reasons=300, repeat=3),
        (
            *LARGER,
            "train.text_side_every=2",
            "train.pair_share=0.5",
            "train.seed=8",
            "train.epochs=0.46",
            "train.validate_every=400",
        ),
        replace(VALIDATION, made=100),
    ),
)
# Of the last two one answers better and the other finds better; `last`, since `best` is chosen by few rows of all tasks
SHARES = {FURTHER / "last": 0.7, MATCHED / "last": 0.3}
# names: a reader of things that questions affirm and of the encoder's classes, and photos of everything
EVERYTHING = Run(
    BROAD,
    MEAN,
    Mixture(chinese=800, made=8000, reasons=300, own=None, repeat=3, broad=None, named=None, wider=7000),
    (
        *LARGER,
        "data.views=1",  # what a reader says of a picture that is left out is known of the whole picture alone
        "bridge.reader=classes",
        "train.text_side_every=6",
        "train.pair_share=0.1",
        "train.batch_size=24",
        "train.seed=9",
        "train.max_steps=800",
        "train.validate_every=200",
    ),
    Mixture(20, 10, 40, 20, 0, repeat=1, broad=80, named=10, wider=20),
    f"{ADDED_TERMS}; {BROAD_TERMS}",
)
# the same without captions that only name what is there, which had crept into all captions
CAPTIONS = replace(
    EVERYTHING,
    out=SETTLED,
    start=BROAD / "last",
    mixture=replace(EVERYTHING.mixture, named=0),
    overrides=(
        *EVERYTHING.overrides,
        "train.learning_rate=2e-4",
        "train.lora_learning_rate=4e-4",
        "train.warmup_steps=10",
        "train.seed=10",
        "train.max_steps=120",
        "train.validate_every=120",
    ),
)
NAMES_OF_PARTS = {"reports": "exact match", "unseen": "exact match, in words that training never had"}
SHIPPED = ROOT / "adapters" / "shipped" / "photo"


def main() -> int:
    """Read the flags and do what has not been done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that holds flickr8k/ and daquar/")
    parser.add_argument("--set1", action="append", default=[], metavar="KEY=VALUE", help="override stage 1's recipe")
    parser.add_argument("--set2", action="append", default=[], metavar="KEY=VALUE", help="override stage 2's, each run")
    parser.add_argument("--limit", type=int, help="score only the first so many rows of each file")
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    from adapters.artefact.averaging import average_artefacts
    from adapters.artefact.publishing import publish
    from adapters.finetune import finetune
    from adapters.pretrain import pretrain

    data = options.data.resolve()  # the files made from it lie elsewhere
    first = [f"data.train={data}/flickr8k/captions_train.jsonl", f"data.val={data}/flickr8k/captions_val.jsonl"]
    first += [f"data.terms={FLICKR}", *BEFORE, *options.set1]
    train(pretrain, "photo_stage1", STAGE1, first)
    for part in ("train", "val"):
        make_questions(data, part)
    for run in (*RUNS_OF_STAGE2, EVERYTHING, CAPTIONS):
        if run is EVERYTHING:
            if not MEAN.exists():
                average_artefacts(SHARES, MEAN)
            make_own_reasons(data, MEAN)
        second = [f"data.train={json.dumps(sources(data, 'train', run.mixture))}", f"data.terms={run.terms}"]
        second += [
            f"data.val={json.dumps(sources(data, 'val', run.validation))}",
            "data.match=set",
            "data.allow_outside=true",
        ]
        overrides = [*second, *FASTER, *run.overrides, *options.set2]
        train(finetune, "photo_stage2", run.out, overrides, start_from=str(run.start))
    found = scores(data, SETTLED / "last", options.limit)
    publish(SETTLED / "last", SHIPPED, found)
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    print(json.dumps(found, indent=2))
    print(f"{SHIPPED.relative_to(ROOT)}: {size / 1e6:.1f} MB")
    return 0


def sources(data: Path, part: str, mixture: Mixture) -> list[dict[str, Any]]:
    """The files that the second stage learns from, or is chosen by."""
    flickr = data / "flickr8k"
    listed = [
        {"file": f"{flickr}/captions_{part}.jsonl", "limit": mixture.english},
        {"file": f"{flickr}/captions_{part}.zh.jsonl", "limit": mixture.chinese},
        {"file": f"{MADE}/rooms_{part}.jsonl", "limit": mixture.questions, "repeat": mixture.repeat},
        {"file": f"{MADE}/made_{part}.jsonl", "limit": mixture.made},
        {"file": f"{flickr}/reasons_{part}.jsonl", "task": "reason", "limit": mixture.reasons},
        {"file": f"{MADE}/own_{part}.jsonl", "task": "reason", "stages": ["answer"], "limit": mixture.own},
        {"file": f"{MADE}/broad_{part}.jsonl", "limit": mixture.broad},
        {"file": f"{data}/broad/captions_{part}.jsonl", "limit": mixture.named},
        {"file": f"{MADE}/wider_{part}.jsonl", "limit": mixture.wider},
    ]
    return [source for source in listed if source["limit"] != 0]


def make_questions(data: Path, part: str) -> None:
    """Write the questions that the English captions answer, and DAQUAR's with answers spelt as people spell them."""
    from adapters.data.caption_questions import choose_questions
    from adapters.data.photo_sets import make_broad_questions, write_questions
    from adapters.data.reading import read_data

    captioned_rows = read_data(data / "flickr8k" / f"captions_{part}.jsonl", task="caption").examples
    chosen = choose_questions([row.answers for row in captioned_rows], most=4)
    made = [(row, one.question, one.answer) for row, each in zip(captioned_rows, chosen, strict=True) for one in each]
    rooms = read_data(data / "daquar" / f"questions_{part}.jsonl", task="vqa").examples
    spelt = [(row, row.question, row.answer.replace("_", " ")) for row in rooms]
    for name, asked in (("made", made), ("rooms", spelt)):
        write_questions(
            MADE / f"{name}_{part}.jsonl", ((row.images[0].path, text, answer) for row, text, answer in asked)
        )
    make_broad_questions(data, part, MADE)


def make_own_reasons(data: Path, adapter: Path) -> None:
    """Write statements with reasons that an adapter samples itself; a file that is there is left as it is."""
    from adapters.data.photo_sets import write_own_reasons
    from adapters.data.reading import read_data
    from adapters.inference.reasoning import give_reasons
    from qformer.decoding import Decoding
    from serve.adapter import load_adapter

    if not (file := MADE / "own_train.jsonl").exists():
        assembly = load_adapter(str(adapter)).assembly
        asked = read_data(data / "flickr8k" / "reasons_train.jsonl", task="reason", limit=2000).examples
        sampling = Decoding(max_new_tokens=assembly.rationale_tokens, temperature=0.7, seed=0)
        write_own_reasons(file, asked, give_reasons(assembly, asked, decoding=sampling))


def train(run: Callable[..., Any], recipe: str, out: Path, overrides: list[str], **options: Any) -> None:
    """Train unless that is done; go on where it was stopped."""
    from adapters.recipe import differing_keys, load_recipe
    from adapters.training.checkpoint import find_state
    from qformer.errors import UserError

    wanted = load_recipe(recipe, overrides)
    earlier = out / "recipe.yaml"
    if earlier.exists() and (differing := differing_keys(load_recipe(earlier), wanted)):
        raise UserError(f"{out} was trained with another {', '.join(differing[:3])}; move the folder away")
    if (out / "finished").exists():
        return
    resume = find_state(out / "state") is not None
    result = run(wanted, out, resume=resume, **({} if resume else options))
    if not result.finished:
        raise KeyboardInterrupt
    (out / "finished").touch()


def scores(data: Path, adapter: Path, limit: int | None) -> dict[str, float]:
    """What the card says, the confidences' temperature being fitted first, by the half of `broad` that chooses.

    Captions both ways, retrieval, naming, and questions and statements with their blank-picture controls.
    """
    from adapters.artefact.facts import keep_temperature
    from qformer.decoding import Decoding
    from serve.adapter import load_adapter
    from serve.evaluation.reasons import evaluate_reasons
    from serve.evaluation.retrieval import evaluate_retrieval
    from serve.evaluation.run import evaluate
    from serve.retrieval import load_retriever

    engine = load_adapter(str(adapter))

    def asked(file: Path, **how: Any) -> dict[str, Any]:
        return evaluate(engine, file, limit=limit, match="set", allow_outside=True, **how)

    keep_temperature(adapter, asked(MADE / "broad_chooses.jsonl", calibrate=limit is None).get("temperature", 1.0))
    captions = {"en": data / "flickr8k" / "captions_val.jsonl", "zh": data / "flickr8k" / "captions_val.zh.jsonl"}
    found: dict[str, float] = {}
    for language, file in captions.items():
        told = evaluate(engine, file, task="caption", limit=limit)
        found |= {f"captions {language}, {name}": told[name] for name in ("BLEU-4", "ROUGE-L", "CIDEr")}
    questions, statements = MADE / "rooms_val.jsonl", data / "flickr8k" / "reasons_val.jsonl"
    for blank in (False, True):
        where = " on a blank picture" if blank else ""
        for name in ("reports", "unseen"):
            told = asked(MADE / f"broad_{name}.jsonl", blank_images=blank)
            found[f"photos of everything, {NAMES_OF_PARTS[name]}{where}"] = told["exact_match"]
            if name == "reports" and not blank:
                found["the same, expected calibration error"] = told["expected_calibration_error"]
        for preset in ("greedy", "likeliest"):
            told = asked(questions, blank_images=blank, decoding=Decoding.preset(preset))
            name = f"DAQUAR, exact match, {preset}{where}"
            found[name] = told["exact_match"]
            if "exact_match_low" in told:  # not if --limit leaves one picture
                found |= {
                    f"{name}, {end} end of the 95 % interval": told[f"exact_match_{end}"] for end in ("low", "high")
                }
        told = evaluate_reasons(engine, statements, limit=limit, blank_images=blank)
        found[f"statements, answered with reasons{where}"] = told["accuracy"]
    retriever, _ = load_retriever(str(adapter))
    told = evaluate_retrieval(retriever, captions["en"], limit=limit)
    found |= {f"retrieval, {name}": told[name] for name in ("i2t_R@1", "t2i_R@1", "itc_i2t_R@1", "itc_t2i_R@1")}
    return found | naming(retriever, data, limit)


def naming(retriever: Any, data: Path, limit: int | None) -> dict[str, float]:
    """How often `classify` has the right one of ImageNet's thousand names first, and among the first five.

    Of the photos of everything that choose nothing and that questions give such a name.
    """
    from adapters.data.image_ref import image_ref
    from adapters.data.photo_sets import chooses, read_lines
    from qformer.imagenet import imagenet_names
    from serve.retrieval import TEMPLATES

    names = {name.lower(): name for name in imagenet_names()}
    right = {
        row["image"]: names[row["answer"].lower()]
        for row in read_lines(data / "broad" / "questions_val.jsonl")
        if row["question"].startswith("What") and row["answer"].lower() in names and not chooses(row["image"])
    }
    labels = list(names.values())
    vectors = retriever.name_texts(labels, TEMPLATES)
    best = []
    for image, name in list(right.items())[:limit]:
        shares = retriever.name(image_ref(str(data / "broad" / image)), vectors, TEMPLATES)
        best.append(([labels[place] for place in shares.topk(5).indices.tolist()], name))
    return {
        f"naming, 1 000 names, top {most}": sum(name in first[:most] for first, name in best) / max(1, len(best))
        for most in (1, 5)
    }


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"make_photo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("make_photo: stopped; run it again to go on", file=sys.stderr)
        sys.exit(130)
