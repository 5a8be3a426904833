#!/usr/bin/env bash
# Usage: launchers/run_zero.sh vanilla|ddp|0|1|2|3|2-offload|3-offload [options]
#
# Trains with one strategy, after launchers/setup.sh where that is needed, into outputs/model/<name>/.
#
#   vanilla   one process, no DeepSpeed            1   ZeRO-1: optimizer states split over the ranks
#   ddp       plain data parallel, under torchrun  2   ZeRO-2: and gradients
#   0         DeepSpeed's own data parallel        3   ZeRO-3: and parameters
#   2-offload, 3-offload    with the states in main memory, for GPUs that hold too little
#
# Options go to `minisft launch`; the ones most used:
#   --ranks N               processes (default 2, vanilla 1)
#   --preset course|full    course: about a minute on two cores (default); full: the original hyperparameters
#   --model M  --data D     your own model folder or hub id, your own ShareGPT file
#   --max-steps N  --lr X  --batch-size N  --precision auto|fp32|bf16|fp16
#   --name NAME             the run's folder (default: the strategy)
#   --restart               start an unfinished run that cannot be resumed from the beginning
#   --overwrite             train again what is trained already
#   -h, --help              print this; `minisft launch --help` lists every option
#
# Exit codes: 0 trained; 1 the run failed; 2 bad usage or bad input.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"
case "${1:-}" in
    vanilla | ddp) strategy=$1 ;;
    0 | 1 | 2 | 3 | 2-offload | 3-offload) strategy=zero$1 ;;
    '') die "no strategy given: use one of vanilla, ddp, 0, 1, 2, 3, 2-offload, 3-offload" ;;
    *) die "unknown strategy '$1': use one of vanilla, ddp, 0, 1, 2, 3, 2-offload, 3-offload" ;;
esac
shift

use_environment
exec minisft launch --strategy "$strategy" "$@"
