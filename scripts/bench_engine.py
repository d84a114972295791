"""Measure the engine: the first token of a second question about a picture against the first's; switching adapters.

    .venv/bin/python scripts/bench_engine.py runs/quickstart runs/other

Pictures are drawn for the occasion, so none has been encoded before. Medians, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

_QUESTIONS = ("what is in the picture?", "which colour is the largest thing?")


def main() -> int:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "adapters", nargs=2, help="two adapters over the same frozen models; the same one, copied, will do"
    )
    parser.add_argument("--pictures", type=int, default=15, help="pictures that count; three more warm up")
    parser.add_argument("--dtype", help="float32 or bfloat16 for the LLM's computation")
    options = parser.parse_args()
    from serve.cli.command import hush_libraries

    hush_libraries()
    from adapters.data.scenes.drawing import draw_scene, make_scenes
    from qformer.decoding import Decoding
    from serve.adapter import user_turn
    from serve.engine.engine import Engine

    short = Decoding(max_new_tokens=4)
    first, second, kept, switched = [], [], [], []
    with Engine(options.adapters, dtype=options.dtype) as engine:
        one, other = engine.names
        shared = engine.adapter(one).assembly.model.language.base is engine.adapter(other).assembly.model.language.base

        def first_token(picture: object, question: str, adapter: str) -> float:
            began = time.perf_counter()
            pending = engine.chat([user_turn(picture, question)], adapter=adapter, decoding=short)  # type: ignore[arg-type]
            next(iter(pending), None)
            elapsed = time.perf_counter() - began
            pending.result()
            return elapsed

        for number, scene in enumerate(make_scenes(options.pictures + 3, seed=time.time_ns())):
            picture = draw_scene(scene)
            times = [first_token(picture, question, one) for question in _QUESTIONS]
            first_token(picture, _QUESTIONS[0], other)  # what is kept of a picture is each adapter's own
            stay = [first_token(picture, _QUESTIONS[0], other) for _ in range(2)]
            away = first_token(picture, _QUESTIONS[0], one)
            if number >= 3:
                first.append(times[0])
                second.append(times[1])
                kept.append(stay[1])
                switched.append(away)
    medians = {name: statistics.median(values) for name, values in
               (("first", first), ("second", second), ("same adapter", kept), ("other adapter", switched))}  # fmt: skip
    found = {
        "first question, seconds to first token": medians["first"],
        "second question, seconds to first token": medians["second"],
        "second against first": medians["second"] / medians["first"],
        "switching adapters, milliseconds more": 1000 * (medians["other adapter"] - medians["same adapter"]),
        "frozen language model shared": shared,
    }
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in found.items()}, indent=2))
    return 0


if __name__ == "__main__":
    from qformer.errors import UserError

    try:
        sys.exit(main())
    except UserError as error:
        print(f"bench_engine: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
