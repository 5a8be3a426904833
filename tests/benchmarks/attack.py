"""Attacks the package with everything that is known to have broken it or its kind: how many attacks were held.

    python tests/benchmarks/attack.py [-k EXPRESSION] [--quick]

Runs every test that is marked `attack`, counts them by the kind that the mark names, and shows each that failed. With
`--quick` those that start runs are left out. Some minutes on two cores, a few seconds per kind with `--quick`. Exit
code 1 where an attack was not held.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
KINDS = {
    "1": "consent is read from the thing to be trusted",
    "2": "the current folder is searched for modules",
    "3": "arguments and places come from files",
    "4": "what cannot be read is taken for missing, and deleted",
    "5": "checked first, locked later",
    "6": "files are told apart by spelling",
    "7": "writing follows links",
    "8": "a model that lacks tensors is trained",
    "9": "something stale is called sound",
    "10": "a loss that is not finite counts as best",
    "11": "processes stay behind, or their end is told wrongly",
    "12": "work grows faster than its input",
    "13": "text gives orders to a terminal, a page or a figure",
    "14": "secrets reach a file or a command line",
    "15": "damage ends in a traceback or aborts the process",
    "16": "a key that changes what a row means is ignored",
}


class Count:
    """Counts the outcome of every attack by its kind."""

    def __init__(self) -> None:
        self.held, self.failed, self.left_out = Counter(), Counter(), Counter()
        self.kind_of: dict[str, str] = {}
        self.broken: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.kind_of = {item.nodeid: str(item.get_closest_marker("attack").args[0]) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kind = self.kind_of[report.nodeid]
        if report.failed:
            self.failed[kind] += 1
            self.broken.append(report.nodeid)
        elif report.skipped:
            self.left_out[kind] += 1
        elif report.when == "call":
            self.held[kind] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-k", default="", help="only these tests, as pytest selects them")
    parser.add_argument("--quick", action="store_true", help="leave out those that start runs")
    options = parser.parse_args()
    count = Count()
    marked = "attack and not distributed" if options.quick else "attack"
    words = ["-m", marked, "-k", options.k, "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), str(TESTS)]
    code = pytest.main([*words, "-q", "--no-header", "--tb=short", "--durations=0", "--durations-min=30"], [count])
    print()
    for kind, meaning in KINDS.items():
        held, failed, left_out = count.held[kind], count.failed[kind], count.left_out[kind]
        more = f", {left_out} left out" if left_out else ""
        print(f"{kind:>3}  {held:>4} held  {failed:>3} failed  {meaning}{more}")
    unknown = set(count.kind_of.values()) - KINDS.keys()
    print(f"{sum(count.held.values())} held, {sum(count.failed.values())} failed")
    for name in count.broken:
        print(f"not held: {name}")
    if unknown:
        print(f"marks of an unknown kind: {', '.join(sorted(unknown))}")
    sys.exit(1 if count.broken or unknown or code not in (pytest.ExitCode.OK,) else 0)


if __name__ == "__main__":
    main()
