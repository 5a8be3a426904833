"""Breaks runs on purpose, many times over: how often each fault was survived, and whether any process was left.

    python tests/benchmarks/chaos.py [--times 20] [-k EXPRESSION]

Runs `tests/launch/test_chaos.py` with every test repeated, and counts. Afterwards no process of any run may be alive.
With real DeepSpeed processes, 20 times take an hour or two. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parents[1] / "launch" / "test_chaos.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("-k", default="", help="only these tests, as pytest selects them")
    options = parser.parse_args()
    passed, failed = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-vv", "-k", options.k, f"--basetemp={folder}", str(TESTS)],
            cwd=TESTS.parents[2],
            env=os.environ | {"MINISFT_CHAOS": str(options.times)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if match := re.match(r"\S*::(\w+)(?:\[(.*?)\])? (PASSED|FAILED|ERROR)", line):
                name, case, outcome = match.groups()
                others = re.sub(r"-?time\d+-?", " ", case or "").strip()
                key = f"{name.removeprefix('test_').replace('_', ' ')} {others}".rstrip()
                (passed if outcome == "PASSED" else failed)[key] += 1
                print(line.rstrip(), flush=True)
        process.wait()
        left = [p.pid for p in psutil.process_iter() if folder in " ".join(_command(p))]
    print()
    for key in passed | failed:
        print(f"{passed[key]:>4} of {passed[key] + failed[key]:<4} {key}")
    print(f"processes left: {len(left)}")
    sys.exit(1 if failed or left or process.returncode or not passed else 0)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
