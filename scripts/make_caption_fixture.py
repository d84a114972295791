"""Fill tests/adapters/fixtures/captions.json with what the official COCO caption scorer makes of its captions.

    python3 -m venv /tmp/coco && /tmp/coco/bin/pip install pycocoevalcap==1.2
    /tmp/coco/bin/python scripts/make_caption_fixture.py tests/adapters/fixtures/captions.json

Needs Java, and none of this project. The captions in the file, which are made up, stay as they are; tokens and scores
are written again. To add a picture, add its prediction and references and run this again.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer


def tokens(captions: list[str]) -> list[str]:
    """Each caption's tokens, joined by spaces; another one follows each, so that none depends on the next."""
    rows = {row: [{"caption": caption}, {"caption": "the end"}] for row, caption in enumerate(captions)}
    found = PTBTokenizer().tokenize(rows)
    return [found[row][0] for row in rows]


def fill(fixture: dict[str, Any]) -> None:
    """Write tokens and scores into the fixture."""
    for sentence, found in zip(
        fixture["sentences"], tokens([sentence["text"] for sentence in fixture["sentences"]]), strict=True
    ):
        sentence["tokens"] = found

    pictures = fixture["pictures"]
    captions = [caption for picture in pictures for caption in [picture["prediction"], *picture["references"]]]
    found = iter(tokens(captions))
    for picture in pictures:
        picture["prediction_tokens"] = next(found)
        picture["reference_tokens"] = [next(found) for _ in picture["references"]]

    given = {row: picture["reference_tokens"] for row, picture in enumerate(pictures)}
    said = {row: [picture["prediction_tokens"]] for row, picture in enumerate(pictures)}
    bleu, _ = Bleu(4).compute_score(given, said, verbose=0)
    rouge, rouge_each = Rouge().compute_score(given, said)
    cider, cider_each = Cider().compute_score(given, said)
    meteor, _ = Meteor().compute_score(given, said)
    for row, picture in enumerate(pictures):
        picture["ROUGE-L"], picture["CIDEr"] = float(rouge_each[row]), float(cider_each[row])
    fixture["scores"] = {f"BLEU-{order}": float(value) for order, value in enumerate(bleu, start=1)}
    fixture["scores"] |= {"ROUGE-L": float(rouge), "CIDEr": float(cider), "METEOR": float(meteor)}
    fixture["made_with"] = f"pycocoevalcap {version('pycocoevalcap')}"


def main() -> int:
    """Read the file named on the command line, fill it, write it back."""
    if len(sys.argv) != 2:
        print((__doc__ or "").splitlines()[2].strip(), file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    fixture = json.loads(path.read_text(encoding="utf-8"))
    fill(fixture)
    path.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
