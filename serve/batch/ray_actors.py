"""Blocks answered by actors of a Ray cluster: the same predictor, the same blocks and so the same answers as anywhere.

Ray starts an actor that dies again and gives it its block again. The driver reads the rows and writes the lines, so the
file, its order and its resuming are those of one process. Pictures and adapter have to be on a disk that all machines
see under the working folder's name.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.data.image_ref import ImageRef
from qformer.errors import UserError
from serve.batch.asking import Asking, Facts, Fields, Predictor
from serve.batch.blocks import Block, Piece, answer_block
from serve.batch.workers import MakePredictor, agreed

_AHEAD = 2  # blocks that an actor holds: one that it answers, one on its way
_RESTARTS = 3  # of an actor, and of a block on it, before the job is given up


class _Actor:
    """One predictor in a process of the cluster.

    Args:
        make: makes the predictor.
        number: of the actor.
        folder: the driver's working folder, which relative paths start from.
    """

    def __init__(self, make: MakePredictor, number: int, folder: str) -> None:
        self._make, self._number, self._folder = make, number, folder
        self._predictor: Predictor | None = None

    def facts(self, asking: Asking) -> Facts:
        """As `Predictor.facts`."""
        return self._loaded().facts(asking)

    def answer(self, block: Block, asking: Asking) -> dict[int, Fields]:
        """The answers of a whole block."""
        found: dict[int, Fields] = {}
        for part in answer_block(self._loaded(), block, asking):
            found |= part
        return found

    def process(self) -> int:
        """The actor's process."""
        return os.getpid()

    def _loaded(self) -> Predictor:
        if self._predictor is None:
            if not Path(self._folder).is_dir():
                raise UserError(
                    f"--engine ray: {self._folder} is not on {platform.node()}; run the command in a folder that"
                    " all machines of the cluster see"
                )
            os.chdir(self._folder)
            self._predictor = self._make(self._number)
        return self._predictor


def _self_contained(block: Block) -> Block:
    """A block with the bytes of those pictures that lie in a data file: another machine has no such place."""
    examples = [
        (number, replace(example, images=tuple(map(_with_bytes, example.images)))) for number, example in block.examples
    ]
    return replace(block, examples=tuple(examples))


def _with_bytes(image: ImageRef) -> ImageRef:
    return image if image.part is None else replace(image, part=None, data=image.read())


class RayActors:
    """Actors that answer blocks, on the cluster that `$RAY_ADDRESS` names or on this machine; to be used as a context.

    An actor takes a core, and a GPU if the cluster has any.

    Args:
        make: makes each one's predictor.
        count: how many.

    Raises:
        UserError: Ray is not installed, or its cluster has no room for so many.
    """

    def __init__(self, make: MakePredictor, count: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry; read when Ray is imported
        try:
            ray: Any = import_module("ray")  # an extra, which type checkers need not have
        except ImportError:
            raise UserError("--engine ray: Ray is not installed; pip install 'querybridge[ray]'") from None
        self._ray = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        has = ray.cluster_resources()
        gpus = 1 if has.get("GPU", 0) >= 1 else 0
        room = int(has.get("GPU" if gpus else "CPU", 0))
        if count > room:
            ray.shutdown()
            raise UserError(f"--workers {count}: the cluster has {room} {'GPUs' if gpus else 'cores'}; take as many")
        actor = ray.remote(_Actor).options(
            num_cpus=1, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS
        )
        self.actors: list[Any] = [actor.remote(make, number, os.getcwd()) for number in range(count)]

    def __enter__(self) -> RayActors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the actors; a cluster of others stays."""
        self._ray.shutdown()

    def facts(self, asking: Asking) -> Facts:
        """What answers; all actors are asked, so that all have loaded.

        Raises:
            UserError: an actor cannot do what is asked, or dies again and again.
        """
        asked = [actor.facts.remote(asking) for actor in self.actors]
        return agreed([self._get(one) for one in asked])

    def run(self, blocks: Iterable[Block], asking: Asking) -> Iterator[Piece]:
        """Answer blocks; a piece is a whole block's answers, as they are ready.

        Raises:
            UserError: no row is to blame, or an actor dies again and again.
        """
        waiting = iter(blocks)
        running: dict[Any, tuple[int, int]] = {}  # what will be answered: by which actor, which block
        held = [0] * len(self.actors)
        more = True
        while True:
            while more and min(held) < _AHEAD:
                block = next(waiting, None)
                more = block is not None
                if block is not None:
                    place = held.index(min(held))
                    running[self.actors[place].answer.remote(_self_contained(block), asking)] = (place, block.number)
                    held[place] += 1
            if not running:
                return
            (ready, *_), _rest = self._ray.wait(list(running), num_returns=1)
            place, number = running.pop(ready)
            held[place] -= 1
            yield Piece(number, self._get(ready), last=True)

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except self._ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--engine ray: an actor died {_RESTARTS + 1} times ({reason}); the same command goes on where it was"
            ) from error
