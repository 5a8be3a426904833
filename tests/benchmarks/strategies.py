"""Every strategy on the same rows, from the command to `DONE`: steps per second, and what observing them costs.

    python tests/benchmarks/strategies.py [--rounds 3] [--strategies vanilla ddp zero0 zero1 zero2 zero3] [--steps 6]

Real runs of the course's preset on SmolLM2-135M, two ranks each but for vanilla; in every round each strategy has one
run, in changing order. Steps per second leave the warm-up out; the whole time has everything in it, imports and the
checkpoint at the end included. Observing is metrics, TensorBoard events, the terminal's line and `memory.json`.
Runs on CUDA unchanged.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from statistics import median

from minisft.errors import UserError
from minisft.files import read_json
from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.run.config import RunConfig
from minisft.zero.strategies import STRATEGIES

SHARE_AIMED_AT = 0.02  # of step time, for observing
SECONDS_AIMED_AT = 120  # from the command to DONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MINISFT_OUTPUTS"] = scratch
        for turn in range(options.rounds):
            shift = turn % len(options.strategies)
            for strategy in options.strategies[shift:] + options.strategies[:shift]:
                try:
                    found[strategy].append(measure(strategy, options.steps))
                except (UserError, RunFailed) as error:
                    print(f"strategies: {error}", file=sys.stderr)
                    sys.exit(2)
                print(f"  round {turn + 1}: {strategy:<8} {_line([found[strategy][-1]])}", flush=True)
    print(f"\n{'':<8} {'steps/s':>18} {'of vanilla':>11} {'trained tokens/s':>17} {'observing':>10} {'to DONE':>18}")
    for strategy in sorted(found, key=STRATEGIES.index):
        print(f"{strategy:<8} {_line(found[strategy], found.get('vanilla'))}")
    observing = max(median(r["observing"] for r in runs) for runs in found.values())
    whole = max(r["whole"] for runs in found.values() for r in runs)
    print(f"observing takes at most {observing:.2%} of step time ({SHARE_AIMED_AT:.0%} aimed at)")
    print(f"the slowest run took {whole:.0f} s from command to DONE ({SECONDS_AIMED_AT} s aimed at)")


def measure(strategy: str, steps: int) -> dict[str, float]:
    began = time.perf_counter()
    config = RunConfig.course(strategy, max_steps=steps, save_steps=steps)
    run = launch(prepare(config, overwrite=True, say=lambda _: None), say=lambda _: None)
    whole = time.perf_counter() - began
    steady = [line for line in run.metrics if not line["warm_up"]]
    if not steady:
        raise UserError("every step was warm-up: give more --steps")
    seconds = sum(line["seconds"] for line in steady)
    all_seconds = sum(line["seconds"] for line in run.metrics)
    return {
        "steps": len(steady) / seconds,
        "trained": sum(line["trained_tokens"] for line in steady) / seconds,
        "observing": read_json(run.folder / "DONE")["observing_seconds"] / all_seconds,
        "whole": whole,
    }


def _line(runs: list[dict[str, float]], base: list[dict[str, float]] | None = None) -> str:
    steps, whole = [r["steps"] for r in runs], [r["whole"] for r in runs]
    against = ""
    if base:
        against = f"{median(a['steps'] / b['steps'] for a, b in zip(runs, base, strict=True)):.2f}x"
    return (
        f"{f'{median(steps):.3f} ({min(steps):.3f}-{max(steps):.3f})':>18} {against:>11} "
        f"{median(r['trained'] for r in runs):>17,.1f} {median(r['observing'] for r in runs):>10.2%} "
        f"{f'{median(whole):.0f} s ({min(whole):.0f}-{max(whole):.0f})':>18}"
    )


if __name__ == "__main__":
    main()
