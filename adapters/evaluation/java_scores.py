"""METEOR and SPICE, by the Java programs of the official COCO caption scorer, if they can run.

They need `java` on the PATH and the package `pycocoevalcap` (the extra `caption-java`), which ships `meteor-1.5.jar`
and `spice-1.0.jar`. What can't run is left out, and a line says why.

METEOR runs as it comes (tried with Java 17). SPICE doesn't: its parser is Stanford CoreNLP 3.6.0, which no package
ships and which `python -m pycocoevalcap.spice.get_stanford_models` downloads from nlp.stanford.edu. The call below has
been tried as far as the missing parser only. SPICE is older than Java 9: if Java 17 refuses it, try Java 8 or 11.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adapters.evaluation.caption_tokens import caption_tokens


def java_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str = "en"
) -> tuple[dict[str, float], dict[str, str]]:
    """`METEOR` and `SPICE` of one predicted caption a picture, as fractions: those that can be computed here.

    Denkowski & Lavie 2014 (ACL workshop, W14-3348) and Anderson et al. 2016 (arXiv 1607.08822).

    Returns:
        The scores by name, and for each metric left out one line that says why.
    """
    said = [" ".join(caption_tokens(caption, language)) for caption in predictions]
    given = [[" ".join(caption_tokens(caption, language)) for caption in captions] for captions in references]
    if len(said) != len(given):
        raise ValueError(f"{len(said)} predictions for the references of {len(given)} pictures")
    scores: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, run in (("METEOR", _meteor), ("SPICE", _spice)):
        reason = why_not(name, language=language)
        if reason is None and not said:
            reason = f"{name} is left out: there are no captions"
        if reason is None:
            try:
                scores[name] = run(said, given)
            except JavaError as error:
                reason = f"{name} is left out: its Java program failed ({error})"
        if reason is not None:
            left_out[name] = reason
    return scores, left_out


class JavaError(Exception):
    """A Java program ended early or said something else than a score; the message is its first line of complaint."""


def why_not(metric: str, *, language: str = "en") -> str | None:
    """Why a metric can't run here, in one line, or None if nothing that it needs is missing."""
    if language != "en":
        return f'{metric} is left out: it is made for English, and these captions are "{language}"'
    if shutil.which("java") is None:
        return f"{metric} is left out: there is no java on the PATH"
    folder = _package()
    if folder is None:
        return f"{metric} is left out: pycocoevalcap is not installed (pip install 'querybridge[caption-java]')"
    needed = [folder / "meteor" / "meteor-1.5.jar"]
    if metric == "SPICE":
        core = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
        needed = [folder / "spice" / "spice-1.0.jar", *(folder / "spice" / "lib" / name for name in core)]
    missing = [path.name for path in needed if not path.is_file()]
    return f"{metric} is left out: {missing[0]} is not in {needed[-1].parent}" if missing else None


def _package() -> Path | None:
    """The folder of pycocoevalcap, which is not imported."""
    found = importlib.util.find_spec("pycocoevalcap")
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


def _meteor(said: Sequence[str], given: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 over the whole corpus, with the options of the COCO scorer.

    The program reads `SCORE ||| reference ||| … ||| caption` and answers with a line of counts; given all of these
    behind `EVAL`, it answers with a score a caption and then the corpus's own.
    """
    folder = _folder("meteor")
    command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as complaints,
        subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8"
        ) as program,
    ):
        assert program.stdin and program.stdout  # both are pipes

        def answer() -> str:
            line = program.stdout.readline().strip() if program.stdout else ""
            if not line:
                complaints.seek(0)
                raise JavaError(_first_line(complaints.read()))
            return line

        try:
            counts = []
            for caption, captions in zip(said, given, strict=True):
                print(" ||| ".join(["SCORE", *captions, caption]), file=program.stdin, flush=True)
                counts.append(answer())
            print(" ||| ".join(["EVAL", *counts]), file=program.stdin, flush=True)
            return [_number(answer()) for _ in range(len(counts) + 1)][-1]
        except BrokenPipeError:
            complaints.seek(0)
            raise JavaError(_first_line(complaints.read())) from None
        finally:
            program.kill()


def _spice(said: Sequence[str], given: Sequence[Sequence[str]]) -> float:
    """SPICE's F-measure, the mean over pictures."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "captions.json", Path(folder) / "scores.json"
        rows = [
            {"image_id": row, "test": caption, "refs": captions}
            for row, (caption, captions) in enumerate(zip(said, given, strict=True))
        ]
        source.write_text(json.dumps(rows), encoding="utf-8")
        command = ["java", "-Xmx8G", "-jar", "spice-1.0.jar", str(source), "-out", str(target), "-silent"]
        done = subprocess.run(command, cwd=_folder("spice"), capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode or not target.is_file():
            raise JavaError(_first_line(done.stderr))
        scores = [row["scores"]["All"]["f"] for row in json.loads(target.read_text(encoding="utf-8"))]
    return sum(math.nan if score is None else float(score) for score in scores) / max(len(scores), 1)


def _folder(name: str) -> Path:
    package = _package()
    if package is None:
        raise JavaError("pycocoevalcap is not installed")
    return package / name


def _number(line: str) -> float:
    try:
        return float(line)
    except ValueError:
        raise JavaError(line) from None


def _first_line(complaint: str) -> str:
    return next((line.strip() for line in complaint.splitlines() if line.strip()), "it said nothing")
