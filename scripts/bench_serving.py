"""Measure the API under load: 16 clients at once against one at a time, on 4 shared pictures and on different ones.

    .venv/bin/python scripts/bench_serving.py --adapter runs/quickstart
    .venv/bin/python scripts/bench_serving.py --adapter runs/quickstart --seconds 5 --clients 4
    .venv/bin/python scripts/bench_serving.py --adapter runs/quickstart --only different

It starts `querybridge serve` on 127.0.0.1, draws the pictures itself, and compares each answer under load with the
answer to the same question asked alone, in float32. So that every answer costs the same, the server here does not stop
at an answer's end but writes all of its --tokens. What was measured is printed as one JSON object; the exit code is 1
if a request failed, an answer was another's, or a figure stays below what is promised.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

QUESTIONS = (
    "What is the biggest shape?",
    "How many shapes are there?",
    "What colour is the star?",
    "Describe the picture.",
)
SHARED = 4  # pictures that all clients ask about
SCENES = 64  # drawn; more pictures are these with a mark in a corner
PROMISED = {"shared": 2.0, "different": 1.3}  # times as many answers as one at a time
FLAT = 64  # MiB that memory may grow by in the second half of a load

# Every answer is written to its longest: no token is an end.
_SERVER = """
from serve.cli.command import hush_libraries, main
hush_libraries()
from qformer.language import LanguageModel
LanguageModel.stop_ids = property(lambda self: [-1])
main()
"""

Task = tuple[int, str]
"""Which picture, and what is asked about it."""

Found = tuple[str, float]
"""An answer and its confidence."""


@dataclass
class Load:
    """What came of asking for a while.

    Attributes:
        seconds: how long it took, to the last answer.
        answers: to what, in the order they came.
        faults: what went wrong.
        waits: seconds of each answer.
        memory: MiB of the server, from time to time.
    """

    seconds: float = 0.0
    answers: list[tuple[Task, Found]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.answers) / self.seconds if self.seconds else 0.0


class Pictures:
    """Drawn pictures by number, as data URIs; no two have the same bytes, nor those of another run."""

    def __init__(self) -> None:
        from adapters.data.scenes.drawing import draw_scene, make_scenes

        self._drawn = [draw_scene(scene) for scene in make_scenes(SCENES, seed=0)]
        self._mark = time.time_ns() % 2**24

    def __getitem__(self, number: int) -> str:
        picture = self._drawn[number % SCENES].copy()
        mark = self._mark + number
        picture.putpixel((0, 0), tuple(mark >> shift & 255 for shift in (16, 8, 0)))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Client:
    """One connection to the server.

    Args:
        port: on 127.0.0.1.
        tokens: of each answer.
        pictures: what is asked about.
    """

    def __init__(self, port: int, tokens: int, pictures: Pictures) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        self.tokens = tokens
        self.pictures = pictures

    def ask(self, task: Task) -> Found:
        """One answer; a RuntimeError if the server gives none."""
        number, question = task
        parts = [
            {"type": "image_url", "image_url": {"url": self.pictures[number]}},
            {"type": "text", "text": question},
        ]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": self.tokens}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = self.connection.getresponse()
        values = json.load(reply)
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {values['error']['message']}")
        if values["usage"]["completion_tokens"] != self.tokens:
            raise RuntimeError(f"{values['usage']['completion_tokens']} tokens instead of {self.tokens}")
        return values["choices"][0]["message"]["content"], values["querybridge"]["confidence"]


def main() -> int:
    """Read the flags, measure, print; the exit code says whether all is as promised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", help="as querybridge serve takes it; the shipped default if left out")
    parser.add_argument("--seconds", type=float, default=60, help="of each load (default 60)")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once (default 16)")
    parser.add_argument("--tokens", type=int, default=20, help="of each answer (default 20)")
    parser.add_argument("--only", choices=list(PROMISED), help="one of the two loads (both if left out)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default cpu)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    flags = ["--device", options.device, "--dtype", "float32", "--max-waiting", str(max(64, options.clients))]
    if options.adapter:
        flags += ["--adapter", options.adapter]
    pictures = Pictures()
    with running(flags) as server:
        make = partial(Client, server.port, options.tokens, pictures)
        found = measure(make, server.memory, options.seconds, options.clients, only=options.only)
    kept = all(
        found[kind]["errors"] == 0
        and found[kind]["wrong"] == 0
        and found[kind]["memory_mib"]["grew_in_second_half"] <= FLAT
        and found[kind]["times_one_at_a_time"] >= PROMISED[kind]
        for kind in found
    )
    print(json.dumps({**vars(options), "cores": len(os.sched_getaffinity(0)), **found, "as_promised": kept}))
    return 0 if kept else 1


def measure(
    make: Callable[[], Client], memory: Callable[[], float], seconds: float, clients: int, *, only: str | None = None
) -> dict[str, dict[str, Any]]:
    """Both kinds of load, or one, each beside one client alone for a third of the time."""
    shared: list[Task] = [(number, question) for question in QUESTIONS for number in range(SHARED)]
    fresh = itertools.count(SHARED)

    def next_shared(place: int) -> Task:
        return shared[place % len(shared)]

    def next_fresh(_: int) -> Task:
        number = next(fresh)
        return number, QUESTIONS[number % len(QUESTIONS)]

    for task in shared:  # the pictures are known to the server from here on, as they are under load
        make().ask(task)
    found = {}
    for kind, tasks in (("shared", next_shared), ("different", next_fresh)):
        if only not in (None, kind):
            continue
        say(f"{kind} pictures, one at a time")
        single = ask_for_a_while(make, memory, tasks, seconds / 3, clients=1)
        say(f"{kind} pictures, {clients} clients")
        load = ask_for_a_while(make, memory, tasks, seconds, clients=clients)
        say(f"{kind} pictures, each answer against the one that is given alone")
        alone = dict(single.answers)
        client = make()
        for task, _ in load.answers:
            if task not in alone:
                alone[task] = client.ask(task)
        found[kind] = report(single, load, wrong=sum(differ(alone[task], answer) for task, answer in load.answers))
    return found


def ask_for_a_while(
    make: Callable[[], Client],
    memory: Callable[[], float],
    tasks: Callable[[int], Task],
    seconds: float,
    *,
    clients: int,
) -> Load:
    """Have each client ask one question after the other until the time is over."""
    load, places, lock = Load(), itertools.count(), threading.Lock()
    began = time.monotonic()

    def work() -> None:
        client = make()
        while time.monotonic() - began < seconds:
            with lock:
                task = tasks(next(places))
            asked = time.monotonic()
            try:
                found = client.ask(task)
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                with lock:
                    load.faults.append(f"{type(error).__name__}: {error}")
                client = make()
                continue
            with lock:
                load.answers.append((task, found))
                load.waits.append(time.monotonic() - asked)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        load.memory.append(memory())
        time.sleep(min(0.5, seconds / 10))
    load.seconds = time.monotonic() - began
    return load


def differ(one: Found, other: Found) -> bool:
    """Whether two answers are not the same, but for the rounding of another batch."""
    return one[0] != other[0] or abs(one[1] - other[1]) > 1e-3 * one[1]


def report(single: Load, load: Load, *, wrong: int) -> dict[str, Any]:
    """What was measured, in figures."""
    memory = load.memory
    cuts = quantiles(load.waits, n=20) if len(load.waits) > 1 else [0.0] * 19
    return {
        "one_at_a_time_per_second": round(single.rate, 3),
        "at_once_per_second": round(load.rate, 3),
        "times_one_at_a_time": round(load.rate / single.rate, 3) if single.rate else 0.0,
        "answers": len(load.answers),
        "errors": len(single.faults) + len(load.faults),
        "first_error": next(iter(single.faults + load.faults), None),
        "wrong": wrong,
        "seconds_p50": round(cuts[9], 3),
        "seconds_p95": round(cuts[18], 3),
        "memory_mib": {
            "start": round(memory[0]),
            "middle": round(memory[len(memory) // 2]),
            "end": round(memory[-1]),
            "grew_in_second_half": round(memory[-1] - memory[len(memory) // 2]),
        },
    }


@dataclass
class Server:
    """A running server.

    Attributes:
        port: on 127.0.0.1.
        process: its id.
    """

    port: int
    process: int

    def memory(self) -> float:
        """MiB that it holds."""
        import psutil

        return float(psutil.Process(self.process).memory_info().rss / 2**20)


@contextmanager
def running(flags: list[str]) -> Iterator[Server]:
    """`querybridge serve` in a process of its own, with a cache of features that is empty and goes afterwards."""
    with tempfile.TemporaryDirectory() as cache:
        lend_cache(Path(cache))
        command = [sys.executable, "-c", _SERVER, "serve", "--port", "0", *flags]
        run = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"QUERYBRIDGE_CACHE": cache}
        )
        assert run.stderr is not None
        try:
            for line in run.stderr:
                if " at http://127.0.0.1:" in line:
                    break
                sys.stderr.write(line)
            else:
                raise SystemExit(run.wait() or 1)
            threading.Thread(target=lambda: sys.stderr.writelines(run.stderr or ()), daemon=True).start()
            yield Server(int(line.partition("127.0.0.1:")[2].partition("/")[0]), run.pid)
        finally:
            run.terminate()
            run.wait()


def lend_cache(folder: Path) -> None:
    """All of the user's cache but the features of pictures, by links."""
    from qformer.sources import cache_root

    here = cache_root()
    for entry in here.iterdir() if here.is_dir() else ():
        if entry.name != "features":
            (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"bench_serving: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
