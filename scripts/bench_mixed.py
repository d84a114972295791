"""Measure how long a short question waits for its first token while others ask for captions and long prompts.

    .venv/bin/python scripts/bench_mixed.py
    .venv/bin/python scripts/bench_mixed.py --adapter runs/quickstart --seconds 20 --clients 4

Of the clients three quarters ask short questions one after the other, the others have pictures described by a beam
search; every --long-every seconds somebody sends a prompt of --long characters. First one client asks the same short
questions on an idle engine. Pictures are drawn. Each answer is compared with the one that is given alone, in float32;
in bfloat16, as --dtype has it, answers to a near tie differ with what else is in a batch, and are counted alone.
At the end a long prompt is left half way: how soon its work ends, and what that still costs, is measured, and how long
a short question takes beside one. What was measured is printed as one JSON object; the exit code is 1 if an answer was
another's, a request failed, or a figure misses what is promised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

QUESTIONS = ("What is the biggest shape?", "How many shapes are there?", "What colour is the star?")
_PICTURES = 4
_WORDS = "which of all these words is the longest one? "
_TIMES_IDLE = (
    3.0  # the first token of a short question under load: 95 % of them within so many times that of an idle one
)
_ENDS = 1.0  # seconds after who asked has left
_BESIDE = 2.0  # seconds of a short question beside a long prompt
_FLAT = 64  # MiB by which the peak of the load's second half may exceed what was needed until then


def main() -> int:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", help="as querybridge serve takes it; the shipped default if left out")
    parser.add_argument("--seconds", type=float, default=60, help="of the load (default 60)")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once (default 16)")
    parser.add_argument("--long", type=int, default=16_800, help="characters of a long prompt (default 16800)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the LLM's computation")
    parser.add_argument("--long-every", type=float, default=5, help="seconds between two of them (default 5)")
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    from adapters.data.prompts import Turn
    from adapters.data.scenes.drawing import draw_scene, make_scenes
    from qformer.decoding import Decoding
    from qformer.malloc import give_back_large_blocks
    from serve.adapter import picture_ref
    from serve.engine.engine import Engine
    from serve.engine.pending import CLIENT, PendingAnswer

    give_back_large_blocks()  # as a server does

    pictures = [picture_ref(draw_scene(scene)) for scene in make_scenes(_PICTURES, seed=0)]
    short = Decoding(max_new_tokens=4)
    tasks = [(picture, question) for picture in pictures for question in QUESTIONS]
    long_turns = [Turn("user", (_WORDS * (options.long // len(_WORDS) + 1))[: options.long])]
    firsts: list[float] = []
    wrong: list[str] = []
    faults: list[str] = []
    peaks: list[float] = []  # MiB: of an idle engine that reads one long prompt, of the load's halves
    counts = {"short": 0, "captions": 0, "long": 0}
    lock = threading.Lock()
    with Engine([options.adapter], device="cpu", dtype=options.dtype, max_waiting=200) as engine:

        def ask(number: int) -> tuple[float, str]:
            picture, question = tasks[number % len(tasks)]
            began = time.monotonic()
            pending = engine.chat([Turn("user", question, (picture,))], decoding=short)
            next(iter(pending), None)
            elapsed = time.monotonic() - began
            return elapsed, pending.result().text

        def describe(number: int) -> str:
            return engine.caption(pictures[number % _PICTURES]).result().text

        _peak()
        alone = [ask(number)[1] for number in range(len(tasks))]
        captions_alone = [describe(number) for number in range(_PICTURES)]
        idle = [ask(number)[0] for number in range(2 * len(tasks))]
        engine.chat(long_turns, decoding=short).result()
        peaks.append(_peak())
        ends = time.monotonic() + options.seconds
        sent: list[PendingAnswer] = []

        def short_question(number: int) -> None:
            elapsed, text = ask(number)
            with lock:
                counts["short"] += 1
                firsts.append(elapsed)
                if text != alone[number % len(tasks)]:
                    wrong.append(text)

        def caption(number: int) -> None:
            text = describe(number)
            with lock:
                counts["captions"] += 1
                if text != captions_alone[number % _PICTURES]:
                    wrong.append(text)

        def long_prompt(number: int) -> None:
            sent.append(engine.chat(long_turns, decoding=short))
            counts["long"] += 1
            time.sleep(max(0.0, min(ends, began + (number + 1) * options.long_every) - time.monotonic()))

        def client(name: str, act: Callable[[int], None], first: int = 0) -> threading.Thread:
            def work() -> None:
                CLIENT.set(name)
                for number in itertools.count(first):
                    if time.monotonic() > ends:
                        return
                    try:
                        act(number)
                    except Exception as error:
                        with lock:
                            faults.append(f"{name}: {error!r}")
                        return

            thread = threading.Thread(target=work)
            thread.start()
            return thread

        began = time.monotonic()
        busy = max(1, options.clients // 4)
        threads = [client(f"short {n}", short_question, n) for n in range(options.clients - busy)]
        threads += [client(f"caption {n}", caption, n) for n in range(busy)]
        threads.append(client("long", long_prompt))
        time.sleep(options.seconds / 2)
        peaks.append(_peak())
        for thread in threads:
            thread.join()
        peaks.append(_peak())
        for pending in sent:
            pending.stop()
        answered = sum(pending.result().finish != "stopped" for pending in sent)
        left = _leave(engine, long_turns, short)
        beside = engine.chat(long_turns, decoding=short)
        time.sleep(1)
        took = time.monotonic()
        ask(0)
        took = time.monotonic() - took
        beside.stop()
        beside.result()
    p95 = {name: statistics.quantiles(times, n=20)[18] for name, times in (("idle", idle), ("loaded", firsts))}
    found: dict[str, Any] = {
        **counts,
        "long_answered": answered,
        "wrong": len(wrong),
        "faults": faults[:5],
        "first_token_idle_p50": round(statistics.median(idle), 3),
        "first_token_idle_p95": round(p95["idle"], 3),
        "first_token_loaded_p50": round(statistics.median(firsts), 3),
        "first_token_loaded_p95": round(p95["loaded"], 3),
        "first_token_loaded_worst": round(max(firsts), 3),
        "loaded_against_idle": round(p95["loaded"] / p95["idle"], 2),
        "peak_mib": dict(zip(("idle", "first_half", "second_half"), map(round, peaks), strict=True)),
        "left_long_prompt": {name: round(value, 3) for name, value in left.items()},
        "short_beside_long_seconds": round(took, 3),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps({**vars(options), **found}))
    kept = (
        p95["loaded"] <= _TIMES_IDLE * p95["idle"]
        and peaks[2] - max(peaks[:2]) <= _FLAT
        and left["wall"] <= _ENDS
        and took <= _BESIDE
    )
    return 0 if kept and not faults and not (wrong and options.dtype == "float32") else 1


def _leave(engine: Any, turns: list[Any], decoding: Any) -> dict[str, float]:
    """Leave a long prompt after a second: seconds to its end, the process's CPU seconds until then and after."""
    pending = engine.chat(turns, decoding=decoding)
    time.sleep(1)
    assert not pending.done, "the prompt is read within a second: take a longer one"
    wall, cpu = time.monotonic(), time.process_time()
    pending.stop()
    pending.result()
    wall, cpu, after = time.monotonic() - wall, time.process_time() - cpu, time.process_time()
    time.sleep(1)
    return {"wall": wall, "cpu": cpu, "cpu_in_the_second_after": time.process_time() - after}


def _peak() -> float:
    """MiB that this process had in memory at most since the last call."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5): the peak begins anew from what is there now
    return found


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"bench_mixed: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
