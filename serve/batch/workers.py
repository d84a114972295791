"""Blocks answered by several processes of one machine, each with its own predictor; they may die, their parent too.

A worker that dies ends the job with one line; the same command goes on. A worker whose parent is gone ends by itself.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

from qformer.errors import UserError
from serve.batch.asking import Asking, Facts, Predictor
from serve.batch.blocks import Block, Piece, pieces, prepared_ahead

_AHEAD = 3  # blocks that a worker holds: one that it answers, one that it prepares, one on its way

MakePredictor = Callable[[int], Predictor]
"""Makes the predictor of a worker, whose number it is given; it has to be picklable: a function of a module."""


class Workers:
    """Several processes that answer blocks; to be used as a context.

    Args:
        make: makes each one's predictor.
        count: how many.
    """

    def __init__(self, make: MakePredictor, count: int) -> None:
        context = get_context("spawn")  # a fork would copy torch's threads in whatever state they are
        threads = max(1, (os.cpu_count() or 1) // count)
        self._processes = []
        self._ends: list[Connection] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, make, number, threads), name=f"batch worker {number + 1}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(ours)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, finished or not."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.terminate()
            process.join()

    def facts(self, asking: Asking) -> Facts:
        """What answers; all workers are asked, so that all have loaded.

        Raises:
            UserError: a worker cannot do what is asked, or has died.
        """
        for place in range(len(self._ends)):
            self._send(place, asking)
        return agreed([self._receive(place) for place in range(len(self._ends))])

    def run(self, blocks: Iterable[Block], asking: Asking) -> Iterator[Piece]:
        """Answer blocks; pieces come as they are ready.

        Raises:
            UserError: a row is not to blame, or a worker has died.
        """
        waiting = iter(blocks)
        held = [0] * len(self._ends)
        more = True
        while True:
            while more and min(held) < _AHEAD:
                block = next(waiting, None)
                if block is not None:
                    place = held.index(min(held))
                    self._send(place, block)
                    held[place] += 1
                else:
                    more = False
                    for place in range(len(self._ends)):
                        self._send(place, None)
            if not any(held):
                return
            ready = wait([end for place, end in enumerate(self._ends) if held[place]])
            for place, end in enumerate(self._ends):
                if end in ready:
                    piece: Piece = self._receive(place)
                    held[place] -= piece.last
                    yield piece

    def _send(self, place: int, message: object) -> None:
        try:
            self._ends[place].send(message)
        except OSError:
            self._receive(place)  # what it said before it died
            raise self._died(place) from None

    def _receive(self, place: int) -> Any:
        try:
            kind, value = self._ends[place].recv()
        except (EOFError, OSError):
            raise self._died(place) from None
        if kind == "mistake":
            raise UserError(value)
        if kind == "fault":
            raise RuntimeError(f"worker {place + 1}:\n{value}")
        return value

    def _died(self, place: int) -> UserError:
        process = self._processes[place]
        process.join(5)
        code = process.exitcode or 0
        why = f"was killed by signal {-code}" if code < 0 else "ended"
        return UserError(
            f"--workers {len(self._processes)}: worker {place + 1} {why}, perhaps for want of memory; run the same"
            " command again, with fewer workers if so"
        )


def agreed(facts: Sequence[Facts]) -> Facts:
    """What all workers have in common: everything.

    Raises:
        UserError: they would answer differently.
    """
    for name in ("adapter", "fingerprint", "decoding", "dtype"):
        found = list(dict.fromkeys(str(getattr(one, name)) for one in facts))
        if len(found) > 1:
            raise UserError(
                f"--workers: their {name} differs ({', '.join(found)}); give all one adapter and one --dtype"
            )
    return facts[0]


def _work(end: Connection, make: MakePredictor, number: int, threads: int) -> None:
    """A worker's life: its predictor is made, then blocks are answered until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    try:
        if "OMP_NUM_THREADS" not in os.environ:
            import torch

            torch.set_num_threads(threads)
        predictor = make(number)
        asking: Asking = end.recv()
        end.send(("facts", predictor.facts(asking)))
        waiting: Queue[Block | None] = Queue()
        # Blocks are taken in at all times: were both sides to send at once, each would wait for the other to read.
        Thread(target=_take_in, args=(end, waiting), daemon=True).start()
        for block in prepared_ahead(iter(waiting.get, None), predictor.prepare):
            for piece in pieces(predictor, block, asking):
                end.send(("piece", piece))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except UserError as error:
        end.send(("mistake", str(error)))
    except Exception:
        end.send(("fault", traceback.format_exc()))


def _take_in(end: Connection, waiting: Queue[Block | None]) -> None:
    block: Block | None = None
    with suppress(EOFError, OSError):
        while (block := end.recv()) is not None:
            waiting.put(block)
    if block is not None:  # the parent is gone, so nobody waits for the rest
        os._exit(1)
    waiting.put(None)
