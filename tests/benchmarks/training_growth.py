"""How time and memory of a training step grow with length, batch and the size of the data, and where the time goes.

    python tests/benchmarks/training_growth.py [--lengths 128 256 512 1024] [--batches 1 2 4 8]
        [--rows 1000 4000 16000] [--precision fp32] [--rounds 3]

Each point is a process of its own that trains SmolLM2-135M one warm-up step and one timed step on rows of just that
length, all of whose tokens are trained; the medians of alternating rounds count. `growth` is the power of the size
that time or memory above the smallest point follows: 1 is in proportion, 0 is not at all.
The size of the data is that of the file of rows: what it adds to a run's start and to its memory.
The last line profiles one step: the share of its time in matrix products, and their rate. Runs on CUDA unchanged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from minisft.data.download import find_model
from minisft.errors import UserError

HERE = Path(__file__).resolve().parent
VOCABULARY = 49_152
Point = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 4000, 16000])
    parser.add_argument("--length", type=int, default=128, help="of the rows where the batch or the data grows")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    points = [("length", n) for n in options.lengths] + [("batch", n) for n in options.batches]
    points += [("rows", n) for n in options.rows]
    found: dict[Point, list[dict[str, Any]]] = defaultdict(list)
    try:
        for _ in range(options.rounds):
            for point in points:
                found[point].append(measure(point, options.length, options.precision))
        profiled = measure(("batch", max(options.batches or [1])), options.length, options.precision, profile=True)
    except UserError as error:
        print(f"training_growth: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{'':<14}{'seconds':>24}{'start s':>10}{'peak GB':>10}")
    for what, sizes in (("length", options.lengths), ("batch", options.batches), ("rows", options.rows)):
        for size in sizes:
            runs = found[what, size]
            seconds = [r["seconds"][1] for r in runs]
            spread = f"{median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            start = median(r["start"] for r in runs)
            print(f"{what:<7}{size:>7}{spread:>24}{start:>10.2f}{_peak(runs) / 1e9:>10.2f}")
        if len(sizes) > 1:
            first, last = found[what, sizes[0]], found[what, sizes[-1]]
            ratio = math.log(sizes[-1] / sizes[0])
            time = median(r["seconds"][1] for r in last) / median(r["seconds"][1] for r in first)
            memory = _peak(last) / _peak(first)
            print(f"{'':<7}growth: time {math.log(time) / ratio:.2f}, memory {math.log(memory) / ratio:.2f}")
    print(
        f"one step profiled: {profiled['matmul_seconds'] / profiled['profiled_seconds']:.0%} of its time in matrix "
        f"products, which ran at {profiled['matmul_flops'] / profiled['matmul_seconds'] / 1e9:,.0f} GFLOP/s"
    )


def _peak(runs: list[dict[str, Any]]) -> float:
    return median(r["peak"] for r in runs)


def measure(point: Point, length: int, precision: str, profile: bool = False) -> dict[str, Any]:
    what, size = point
    length = size if what == "length" else length
    batch = size if what == "batch" else 1
    rows = max(2 * batch, size if what == "rows" else 0)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        chance = np.random.default_rng(0)
        with file.open("w") as stream:
            for i in range(rows):
                ids = chance.integers(5, VOCABULARY, length).tolist()
                stream.write(json.dumps({"id": str(i), "input_ids": ids, "labels": ids}) + "\n")
        settings = {
            **{"kind": "minisft", "model": str(find_model().path), "rows": str(file), "steps": 2},
            **{"batch": batch, "max_length": length, "precision": precision, "profile": profile},
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "minisft_train.py"), json.dumps(settings)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{what} {size} failed with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
