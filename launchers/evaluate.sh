#!/usr/bin/env bash
# Usage: launchers/evaluate.sh [run…] [options]
#
# Scores every checkpoint of the runs (by name or folder; all in outputs/model if none is given) and the model before
# training: BLEU, chrF, loss, and three example answers, into outputs/evaluation/<run>/. What is scored already is
# not scored again. A checkpoint that cannot be used is named, and the others are evaluated. outputs/evaluation/scores.png
# shows all runs' scores over their steps.
#
#   --rows N              test conversations to answer (default 12)
#   --answers last|all    of each conversation the last answer (default), or all
#   --max-new-tokens N    longest answer (default 48)
#   --batch-size N        conversations answered at once (default 32); changes no answer
#   --resamples N         bootstrap samples for the 95% intervals (default 1000; 0 for none)
#   --exclude-leaked      take other conversations for those with a question that was trained
#   --wait                wait for runs that are being trained
#   -h, --help            print this
#
# Exit codes: 0 evaluated; 1 a checkpoint cannot be used; 2 bad usage or bad input.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"

use_environment
exec minisft evaluate "$@"
