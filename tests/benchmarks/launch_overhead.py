"""Where the time goes between a cell and the first training step, beside importing torch, transformers and deepspeed.

    python tests/benchmarks/launch_overhead.py [--strategies vanilla ddp zero2] [--rounds 3]

Real runs of the course's preset on SmolLM2-135M. In every round each strategy is launched once, and beside it the bare
imports are timed that its processes cannot do without: those of the launcher's own processes, one after the other, and
those of a rank, in as many processes at once as there are ranks. Overhead is all that is not these imports: preparing
the run folder (its rows are a copy of the first run's, which is timed by itself), the supervisor, the worker's own
modules, joining the ranks, loading the model and splitting it. Medians of alternating rounds, and their
range.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from statistics import median

from minisft.errors import UserError
from minisft.launch.cpu_comm_op import build_environment
from minisft.launch.launch_run import RunFailed, launch, prepare
from minisft.run.config import RunConfig
from minisft.training.heartbeat import read_heartbeats
from minisft.zero.strategies import STRATEGIES

AIMED_AT = 3.0  # seconds
RANK = "import torch, torch.utils.tensorboard, accelerate; from transformers import Trainer, LlamaForCausalLM"
IMPORTS = {  # of each strategy's processes: those of the launchers in turn, and those of every rank
    "vanilla": ([], RANK),
    "ddp": (["import torch.distributed.run"], RANK),
    "zero": (["import deepspeed.launcher.runner", "import deepspeed.launcher.launch"], f"import deepspeed; {RANK}"),
}
PARTS = ("preparing", "to the ranks", "ranks' imports", "loading", "in all", "bare imports", "overhead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["vanilla", "ddp", "zero2"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        run(options)
    except (UserError, RunFailed) as error:
        print(f"launch_overhead: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["MINISFT_OUTPUTS"] = outputs
        began = time.perf_counter()
        prepare(RunConfig.course("vanilla", name="first"), say=lambda _: None)
        print(f"reading, splitting and encoding the data, once for all runs: {time.perf_counter() - began:.1f} s")
        for turn in range(options.rounds):
            for strategy in options.strategies[:: -1 if turn % 2 else 1]:
                found[strategy].append(measure(strategy))
    print(f"{'seconds':<16}" + "".join(f"{strategy:>22}" for strategy in found))
    for part in PARTS:
        cells = ([entry[part] for entry in entries] for entries in found.values())
        print(f"{part:<16}" + "".join(f"{median(c):>10.1f} ({min(c):.1f}-{max(c):.1f})".rjust(22) for c in cells))
    worst = max(median(e["overhead"] for e in entries) for entries in found.values())
    print(f"overhead {worst:.1f} s at most: {'within' if worst < AIMED_AT else 'ABOVE'} the {AIMED_AT:.0f} s aimed at")


def measure(strategy: str) -> dict[str, float]:
    """Seconds of each part, of one launch."""
    launchers, rank = IMPORTS["zero" if strategy.startswith("zero") else strategy]
    began = time.time()
    config = RunConfig.course(strategy, max_steps=1, eval_rows=0, memory_timeline=False)
    run = prepare(config, overwrite=True, say=lambda _: None)
    prepared = time.time()
    launch(run, say=lambda _: None)
    signs = [sign.began for sign in read_heartbeats(run.folder)]
    starting, loading, training = (max(sign[phase] for sign in signs) for phase in ("starting", "loading", "training"))
    bare = sum(seconds_of(code) for code in launchers) + seconds_of(rank, config.ranks)
    times = (prepared - began, starting - prepared, loading - starting, training - loading, training - began, bare)
    return dict(zip(PARTS, (*times, training - began - bare), strict=True))


def seconds_of(code: str, processes: int = 1) -> float:
    """How long that many processes take to run `code` side by side, from their start to the last one's end."""
    began = time.perf_counter()
    environment = os.environ | build_environment() | {"DS_ACCELERATOR": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        for _ in range(processes)
    ]
    for process in running:
        if process.wait():
            raise UserError(f"{code!r} failed")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
