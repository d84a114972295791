"""Make the photo adapter that ships: both stages, its scores, and its folder in adapters/shipped/photo.

    .venv/bin/python scripts/make_photo.py DATA

DATA holds `flickr8k/` (captions_{train,val}.jsonl, captions_{train,val}.zh.jsonl, reasons_{train,val}.jsonl) and
`daquar/` (questions_{train,val}.jsonl). Hours on two cores; a stopped run goes on, and what is done is skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGE1, STAGE2 = Path("runs") / "photo_stage1", Path("runs") / "photo_stage2"
FLICKR = "Flickr8k (Hodosh et al. 2013) - non-commercial research"
MORE = (  # what stage 2 adds; it inherits the first stage's
    "Flickr8k-CN (Li et al. 2016) - non-commercial research; DAQUAR (Malinowski and Fritz 2014) on NYU Depth"
    " v2 - research; e-SNLI-VE (Do et al. 2020, Kayser et al. 2021) - research"
)
SHIPPED = ROOT / "adapters" / "shipped" / "photo"


def main() -> int:
    """Read the flags and do what has not been done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that holds flickr8k/ and daquar/")
    parser.add_argument("--set1", action="append", default=[], metavar="KEY=VALUE", help="override stage 1's recipe")
    parser.add_argument("--set2", action="append", default=[], metavar="KEY=VALUE", help="override stage 2's recipe")
    parser.add_argument("--limit", type=int, help="score only the first so many rows of each file")
    options = parser.parse_args()
    from serve.cli import hush_libraries

    hush_libraries()
    from adapters.artefact import publish
    from adapters.finetune import finetune
    from adapters.pretrain import pretrain

    data = options.data
    first = [f"data.train={data}/flickr8k/captions_train.jsonl", f"data.val={data}/flickr8k/captions_val.jsonl"]
    first += [f"data.terms={FLICKR}", *options.set1]
    train(pretrain, "photo_stage1", STAGE1, first, dtype="bfloat16")  # faster than float32 where the CPU knows it
    second = [f"data.{part}={json.dumps(sources(data, part))}" for part in ("train", "val")]
    train(finetune, "photo_stage2", STAGE2, [*second, f"data.terms={MORE}", *options.set2], start_from=str(STAGE1))
    found = scores(data, options.limit)
    publish(STAGE2 / "best", SHIPPED, found)
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    print(json.dumps(found, indent=2))
    print(f"{SHIPPED.relative_to(ROOT)}: {size / 1e6:.1f} MB")
    return 0


def sources(data: Path, part: str) -> list[dict[str, Any]]:
    """The files that stage 2 learns from, or is chosen by."""
    flickr = data / "flickr8k"
    # Rows of each file: most of an epoch goes to English captions, and DAQUAR, a small set, comes twice.
    rest, zh, reasons, repeat = (None, 2000, 1500, 2) if part == "train" else (100, 100, 50, 1)
    return [
        {"file": f"{flickr}/captions_{part}.jsonl", "limit": rest},
        {"file": f"{flickr}/captions_{part}.zh.jsonl", "limit": zh},
        {"file": f"{data}/daquar/questions_{part}.jsonl", "limit": rest, "repeat": repeat},
        {"file": f"{flickr}/reasons_{part}.jsonl", "task": "reason", "limit": reasons},
    ]


def train(run: Callable[..., Any], recipe: str, out: Path, overrides: list[str], **options: Any) -> None:
    """Train unless that is done; go on where it was stopped."""
    from adapters.checkpoint import find_state
    from adapters.recipe import differing_keys, load_recipe
    from qformer.errors import UserError

    wanted = load_recipe(recipe, overrides)
    if (out / "finished").exists():
        if differing := differing_keys(load_recipe(out / "recipe.yaml"), wanted):
            raise UserError(f"{out} was trained with another {', '.join(differing[:3])}; move the folder away")
        return
    resume = find_state(out / "state") is not None
    result = run(wanted, out, resume=resume, **({} if resume else options))
    if not result.finished:
        raise KeyboardInterrupt
    (out / "finished").touch()


def scores(data: Path, limit: int | None) -> dict[str, float]:
    """What the card says: captions both ways, retrieval, questions and statements with their blank-picture controls."""
    from serve.evaluate import evaluate, evaluate_retrieval
    from serve.evaluate_reasons import evaluate_reasons
    from serve.loaded import load_adapter
    from serve.retrieval import load_retriever

    engine = load_adapter(STAGE2)
    captions = {"en": data / "flickr8k" / "captions_val.jsonl", "zh": data / "flickr8k" / "captions_val.zh.jsonl"}
    found: dict[str, float] = {}
    for language, file in captions.items():
        told = evaluate(engine, file, task="caption", limit=limit)
        found |= {f"captions {language}, {name}": told[name] for name in ("BLEU-4", "ROUGE-L", "CIDEr")}
    questions, statements = data / "daquar" / "questions_val.jsonl", data / "flickr8k" / "reasons_val.jsonl"
    for blank in (False, True):
        where = " on a blank picture" if blank else ""
        told = evaluate(engine, questions, task="vqa", limit=limit, blank_images=blank)
        found[f"DAQUAR, exact match{where}"] = told["exact_match"]
        told = evaluate_reasons(engine, statements, limit=limit, blank_images=blank)
        found[f"statements, answered with reasons{where}"] = told["accuracy"]
    retriever, _ = load_retriever(STAGE2)
    told = evaluate_retrieval(retriever, captions["en"], limit=limit)
    return found | {f"retrieval, {name}": told[name] for name in ("i2t_R@1", "t2i_R@1", "itc_i2t_R@1", "itc_t2i_R@1")}


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
