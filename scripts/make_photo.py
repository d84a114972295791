"""Make the photo adapter that ships: the first stage, ten runs of the second, its temperature and its scores.

    .venv/bin/python scripts/make_photo.py DATA

DATA holds `flickr8k/` (captions_{train,val}.jsonl, captions_{train,val}.zh.jsonl, reasons_{train,val}.jsonl,
boxes_{train,val}.jsonl), `daquar/` (questions_{train,val}.jsonl) and `broad/` (questions_{train,val}.jsonl,
captions_{train,val}.jsonl). The eighth run goes on from the mean of the two before it, and what ships is the mean of
the last two. Thirteen hours on two cores; a stopped run goes on, and what is done is skipped. The adapter ends in
adapters/shipped/photo.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from photo_runs import (
    BEFORE,
    CAPTIONS,
    EVERYTHING,
    FASTER,
    FLICKR,
    MADE,
    MEAN,
    REBALANCED,
    RUNS_OF_STAGE2,
    SHARES,
    SHARES_AT_LAST,
    SHIPS,
    STAGE1,
    Mixture,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
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
    for run in (*RUNS_OF_STAGE2, EVERYTHING, CAPTIONS, REBALANCED):
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
    if not SHIPS.exists():
        average_artefacts(SHARES_AT_LAST, SHIPS, first_reader=True)
    found = scores(data, SHIPS, options.limit)
    publish(SHIPS, SHIPPED, found)
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
