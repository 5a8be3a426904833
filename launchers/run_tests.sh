#!/usr/bin/env bash
# Usage: launchers/run_tests.sh [pytest options]
#
# Runs all tests, after launchers/setup.sh where that is needed: style, the direction of imports, types, the quick tests,
# the ones that start several processes, and the notebooks, each executed from top to bottom. MINISFT_AT_LENGTH=1 in the environment adds more
# combinations of what is tested once.
#
# With options, only pytest runs, with them: launchers/run_tests.sh -m "not distributed and not notebook" is the
# quick part; -k NAME picks tests by name.
#
#   -h, --help    print this
#
# Exit codes: 0 all passed; 1 something failed; 2 the set-up failed or bad usage.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"

use_environment
cd -- "$ROOT"
if (($# > 0)); then
    exec pytest "$@"
fi
ruff check .
ruff format --check .
lint-imports
mypy
failed=0
# The quick ones side by side, with a thread each; those that start processes of their own one after the other.
OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile -m "not distributed and not notebook" || failed=1
pytest -m "distributed or notebook" || failed=1
exit "$failed"
