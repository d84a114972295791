"""Measure how long a short question waits for its first token while others ask for captions and long prompts.

    .venv/bin/python scripts/bench_mixed.py
    .venv/bin/python scripts/bench_mixed.py --adapter runs/quickstart --seconds 20 --clients 4

Of the clients three quarters ask short questions one after the other, the others have pictures described by a beam
search; every --long-every seconds somebody sends a prompt of --long characters. First the same short questions are
asked on an idle engine. Pictures are drawn. Each short answer is compared with the one that is given alone, in float32;
what was measured is printed as one JSON object, and the exit code is 1 if one was another's.
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

QUESTIONS = ("What is the biggest shape?", "How many shapes are there?", "What colour is the star?")
_PICTURES = 4
_WORDS = "which of all these words is the longest one? "


def main() -> int:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", help="as querybridge serve takes it; the shipped default if left out")
    parser.add_argument("--seconds", type=float, default=60, help="of the load (default 60)")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once (default 16)")
    parser.add_argument("--long", type=int, default=16_800, help="characters of a long prompt (default 16800)")
    parser.add_argument("--long-every", type=float, default=5, help="seconds between two of them (default 5)")
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    from adapters.data.prompts import Turn
    from adapters.data.scenes.drawing import draw_scene, make_scenes
    from qformer.decoding import Decoding
    from serve.adapter import picture_ref
    from serve.engine import Engine

    pictures = [picture_ref(draw_scene(scene)) for scene in make_scenes(_PICTURES, seed=0)]
    short = Decoding(max_new_tokens=4)
    tasks = [(picture, question) for picture in pictures for question in QUESTIONS]
    firsts: list[float] = []
    wrong: list[str] = []
    counts = {"short": 0, "captions": 0, "long": 0}
    lock = threading.Lock()
    with Engine([options.adapter], device="cpu", dtype="float32", max_waiting=200) as engine:

        def ask(number: int) -> tuple[float, str]:
            picture, question = tasks[number % len(tasks)]
            began = time.monotonic()
            pending = engine.chat([Turn("user", question, (picture,))], decoding=short)
            next(iter(pending), None)
            elapsed = time.monotonic() - began
            return elapsed, pending.result().text

        alone = [ask(number)[1] for number in range(len(tasks))]
        idle = [ask(number)[0] for number in range(2 * len(tasks))]
        ends = time.monotonic() + options.seconds

        def short_questions(first: int) -> None:
            for number in itertools.count(first):
                if time.monotonic() > ends:
                    return
                elapsed, text = ask(number)
                with lock:
                    counts["short"] += 1
                    firsts.append(elapsed)
                    if text != alone[number % len(tasks)]:
                        wrong.append(text)

        def captions(first: int) -> None:
            for number in itertools.count(first):
                if time.monotonic() > ends:
                    return
                engine.caption(pictures[number % _PICTURES]).result()
                with lock:
                    counts["captions"] += 1

        def long_prompts() -> None:
            while time.monotonic() < ends:
                asked = [Turn("user", (_WORDS * (options.long // len(_WORDS) + 1))[: options.long])]
                engine.chat(asked, decoding=short)
                with lock:
                    counts["long"] += 1
                time.sleep(options.long_every)

        def counted(work: threading.Thread) -> threading.Thread:
            work.start()
            return work

        busy = max(1, options.clients // 4)
        threads = [counted(threading.Thread(target=short_questions, args=(n,))) for n in range(options.clients - busy)]
        threads += [counted(threading.Thread(target=captions, args=(n,))) for n in range(busy)]
        threads.append(counted(threading.Thread(target=long_prompts)))
        for thread in threads:
            thread.join()
    p95 = {name: statistics.quantiles(times, n=20)[18] for name, times in (("idle", idle), ("loaded", firsts))}
    found = {
        **counts,
        "wrong": len(wrong),
        "first_token_idle_p95": round(p95["idle"], 3),
        "first_token_loaded_p50": round(statistics.median(firsts), 3),
        "first_token_loaded_p95": round(p95["loaded"], 3),
        "first_token_loaded_worst": round(max(firsts), 3),
        "loaded_against_idle": round(p95["loaded"] / p95["idle"], 2),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps({**vars(options), **found}))
    return 1 if wrong else 0


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"bench_mixed: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
