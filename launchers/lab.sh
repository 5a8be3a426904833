#!/usr/bin/env bash
# Usage: launchers/lab.sh [jupyter options]
#
# Opens the course's first notebook in JupyterLab, after launchers/setup.sh where that is needed.
#
# It opens your own copy, in outputs/course/student: without outputs, with predictions to make and functions to write.
# Copies that exist are kept. notebooks/ holds the same notebooks executed, to read.
#
# All options go to `jupyter lab`, for instance --no-browser --port 8889 on a machine that you reach through an ssh
# tunnel, or --allow-root in a container.
#
#   -h, --help              print this
#   MINISFT_SKIP_SETUP=1    take the environment as it is
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"

use_environment
cd -- "$ROOT"
# As the default address, not as the file to open: that one --no-browser ignores, and the file browser could then not
# leave notebooks/ for outputs/.
# A notebook may import what is beside it, as everywhere in Jupyter; what it starts through minisft does not.
minisft notebooks --edition student --out "$ROOT/outputs/course/student"
exec env -u PYTHONSAFEPATH jupyter lab --LabApp.default_url=/lab/tree/outputs/course/student/00_start_here.ipynb "$@"
