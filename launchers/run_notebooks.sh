#!/usr/bin/env bash
# Usage: launchers/run_notebooks.sh [--in-place] [--timeout S] [notebook…]
#
# Executes notebooks (all of the course where none is named), each in a fresh kernel. The executed copies and an HTML
# book of them go to outputs/notebooks/. Exit code: 0, 1 if a notebook failed, 2 for a mistake in the call.
#
#   --in-place              also refresh the outputs in the notebooks themselves, where they ran without failure
#   --timeout S             seconds for each notebook that names no limit of its own (default: 1800)
#   -h, --help              print this
#   MINISFT_SKIP_SETUP=1    take the environment as it is
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

options=()
notebooks=()
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --in-place) options+=("$1") ;;
        --timeout | --timeout=*)
            if [[ "$1" == *=* ]]; then
                seconds="${1#*=}"
            else
                seconds="${2-}"
                shift
            fi
            [[ "$seconds" =~ ^[0-9]*[1-9][0-9]*$ ]] || die "--timeout needs a whole number of seconds above 0, not '$seconds'"
            options+=(--timeout "$seconds")
            ;;
        --)
            shift
            break
            ;;
        -*) die "there is no option $1; see --help" ;;
        *) notebooks+=("$1") ;;
    esac
    shift
done
notebooks+=("$@")

# The program looks for the course in the folder it runs in, so paths given relative to the caller's are made whole.
for i in "${!notebooks[@]}"; do
    [[ "${notebooks[$i]}" == /* ]] || notebooks[i]="$PWD/${notebooks[$i]}"
    [[ -f "${notebooks[$i]}" ]] || die "there is no notebook ${notebooks[$i]}"
done

use_environment
cd -- "$ROOT"
exec minisft notebooks ${options[@]+"${options[@]}"} -- ${notebooks[@]+"${notebooks[@]}"}
