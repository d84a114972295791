"""A predictor without a model, for batch jobs in processes of their own: its answers depend on what is asked alone."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence

from adapters.data.examples import Example
from qformer.errors import UserError
from serve.batch.asking import Asking, Facts, Fields


class StubPredictor:
    """Answers with a hash of the question, the picture's name and the rows that are answered together.

    Args:
        together: rows of a part.
        seconds: that a row takes.
        dies_at: the process ends as by kill -9 when a row with this question comes, if this file is not there yet.
    """

    def __init__(self, together: int = 8, seconds: float = 0.0, dies_at: tuple[str, str] | None = None) -> None:
        self.together, self.seconds, self.dies_at = together, seconds, dies_at

    def facts(self, asking: Asking) -> Facts:
        if asking.task == "caption":
            raise UserError("--task caption: the stub writes none")
        return Facts("stub", "sha256:0", {})

    def prepare(self, examples: Sequence[Example]) -> None:
        pass

    def check(self, example: Example, asking: Asking) -> None:
        if example.question.startswith("bad"):
            raise UserError(f"{example.where}: a bad question")

    def plan(self, examples: Sequence[Example], asking: Asking) -> list[list[int]]:
        for example in examples:
            self.check(example, asking)
        order = sorted(range(len(examples)), key=lambda place: (place % 3, place))  # not that of the rows
        parts = [order[start : start + self.together] for start in range(0, len(order), self.together)]
        return sorted(parts, key=min)

    def answer(self, examples: Sequence[Example], asking: Asking) -> list[Fields]:
        if self.seconds:
            time.sleep(self.seconds * len(examples))
        if self.dies_at and any(example.question == self.dies_at[0] for example in examples):
            try:
                os.close(os.open(self.dies_at[1], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), 9)
        together = "|".join(f"{example.images[0].label} {example.question}" for example in examples)
        found: list[Fields] = []
        for example in examples:
            text = hashlib.sha256(f"{example.question}|{example.images[0].label}|{together}".encode()).hexdigest()
            found.append({"answer": text[:12], "confidence": int(text[:4], 16) / 65536})
        return found


def make_stub(number: int) -> StubPredictor:
    """The predictor of a worker; its settings are in the environment, as a process of its own has them."""
    seconds = float(os.environ.get("STUB_SECONDS", "0"))
    dies = os.environ.get("STUB_DIES_AT")
    return StubPredictor(seconds=seconds, dies_at=(dies.split("|")[0], dies.split("|")[1]) if dies else None)


def main() -> None:
    """SOURCE OUT WORKERS: a batch job with the stub, to be killed."""
    import sys

    from serve.batch.blocks import OneProcess
    from serve.batch.run import run_batch
    from serve.batch.workers import Workers

    source, out, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    try:
        if workers == 1:
            print(run_batch(source, out, OneProcess(lambda: make_stub(0)), chunk=16, write_every=0, skip_bad_rows=True))
        else:
            with Workers(make_stub, workers) as answerer:
                print(run_batch(source, out, answerer, chunk=16, write_every=0, skip_bad_rows=True))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
