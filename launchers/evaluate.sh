#!/usr/bin/env bash
# Usage: launchers/evaluate.sh [run…] [options]
#
# Scores every checkpoint of the runs (by name or folder; all in outputs/model if none is given) and the model before
# training: BLEU, chrF, loss, and three example answers, into outputs/evaluation/<run>/. What is scored already is
# not scored again.
#
#   --rows N              test conversations to answer (default 12)
#   --max-new-tokens N    longest answer (default 48)
#   --batch-size N        conversations answered at once (default 16)
#   -h, --help            print this
#
# Exit codes: 0 evaluated; 2 bad usage or bad input.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"

use_environment
exec minisft evaluate "$@"
