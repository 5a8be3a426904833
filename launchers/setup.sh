#!/usr/bin/env bash
# Usage: launchers/setup.sh [--no-fetch]
#
# Makes the Python environment at the versions of launchers/requirements.lock, fetches the model and the data into
# the cache, and says what this machine can run. Run it as often as you like: what is there is not done again.
#
# It uses the active virtual environment or conda environment (conda's `base` excepted), else .venv in the
# repository, which it makes.
#
#   --no-fetch      do not fetch the model and the data now; they are fetched at their first use
#   -h, --help      print this
#
#   MINISFT_PYTHON       the Python (3.11 or newer) to make .venv with, in place of the first one found
#   PIP_EXTRA_INDEX_URL  pip's own: without a GPU, PyTorch's CPU wheel index here saves several GB
#
# Exit codes: 0 ready; 1 ready, but the model or the data could not be fetched; 2 the environment is not ready.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

OLDEST=3.11

say() {
    printf '%s\n' "$*"
}

# Imports nothing, and every version answers. Wherever a Python imports something, -I keeps it from doing so from the
# current folder, where the user's data may be.
python_version() {
    "$1" -V 2>&1 | sed -n 's/^Python //p' || true
}

is_supported() {
    [[ "$1" =~ ^3\.([0-9]+) ]] && ((BASH_REMATCH[1] >= ${OLDEST#3.}))
}

# Sets PYTHON to the first Python that can make the environment.
find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11) candidate version tried=""
    [[ -z "${MINISFT_PYTHON:-}" ]] || candidates=("$MINISFT_PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$(python_version "$candidate")
        if [[ -z "$version" ]]; then
            [[ -z "${MINISFT_PYTHON:-}" ]] || tried="; $candidate does not run"
        elif ! is_supported "$version"; then
            tried+="; $candidate is Python $version"
        elif ! "$candidate" -I -c 'import venv, ensurepip' 2>/dev/null; then
            tried+="; $candidate ($version) lacks the venv or ensurepip module (Debian, Ubuntu: apt install python3-venv)"
        else
            PYTHON=$candidate
            return
        fi
    done
    die "no Python $OLDEST or newer that can make a virtual environment${tried}: install one, or name it in MINISFT_PYTHON"
}

# A .venv that was interrupted, copied or moved does not work: its scripts name the folder they were made in.
venv_works() {
    local activate=$1/bin/activate
    [[ -f "$activate" ]] && grep -qF -- "$1" "$activate" && is_supported "$(python_version "$1/bin/python")" &&
        "$1/bin/python" -I -m pip --version >/dev/null 2>&1
}

make_environment() {
    if [[ "$FOLDER" != "$ROOT/.venv" ]]; then
        local version
        version=$(python_version "$FOLDER/bin/python")
        is_supported "$version" ||
            die "the active environment $FOLDER has Python $version and minisft needs $OLDEST or newer: deactivate it"
        "$FOLDER/bin/python" -I -m pip --version >/dev/null 2>&1 ||
            die "the active environment $FOLDER has no pip: install pip into it, or deactivate it"
        say "Using the active environment $FOLDER (Python $version)"
    elif venv_works "$FOLDER"; then
        say "Using $FOLDER (Python $(python_version "$FOLDER/bin/python"))"
    elif [[ -L "$FOLDER" ]]; then
        # Replacing it would empty the folder that the link leads to.
        die "$FOLDER is a link to an environment that does not work here: remove the link, or activate that environment"
    else
        find_python
        say "Making $FOLDER with $PYTHON (Python $(python_version "$PYTHON"))"
        "$PYTHON" -I -m venv --clear "$FOLDER" >/dev/null ||
            die "$PYTHON could not make $FOLDER: check that the disk has space and that you may write there"
    fi
}

# One line, before gigabytes are on their way.
mention_cpu_build() {
    local pin versions
    [[ "$(uname -s)" == Linux ]] && ! command -v nvidia-smi >/dev/null || return 0
    ! "$FOLDER/bin/python" -I -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' || return 0
    pin=$(sed -n 's/^torch==//p' "$ROOT/launchers/requirements.lock")
    versions=$("$FOLDER/bin/python" -I -m pip index versions torch 2>/dev/null) || return 0
    [[ "$versions" == *"$pin+cpu"* ]] ||
        say "No NVIDIA GPU here, yet pip will fetch the CUDA build of PyTorch: stop now and set PIP_EXTRA_INDEX_URL to" \
            "the CPU wheel index (PyTorch's \"Get Started\" page names it) to save several GB"
}

# pip's many lines as one line that changes, or as a few where the output is no terminal. Exits 28 if space ran out.
progress() {
    local terminal=0
    [[ ! -t 1 ]] || terminal=1
    awk -v terminal="$terminal" '
        function show(text) { if (terminal) printf "\r\033[K  %s", substr(text, 1, 76); else print "  " text; fflush() }
        / No space left on device/ { full = 1 }
        /^Collecting / { count++; if (terminal) show(count " packages, now " $2) }
        /^ *Downloading / && (terminal || /[0-9][0-9][0-9](\.[0-9]+)? MB/) { sub(/^ */, ""); show($0) }
        /^Installing collected/ && NF > 4 { show("unpacking " (NF - 3) " packages (a minute or more)") }
        END { if (terminal) printf "\r\033[K"; exit full ? 28 : 0 }
    '
}

pip_install() {
    local log=$FOLDER/minisft-setup.log status reason
    "$FOLDER/bin/python" -I -m pip install --no-input --disable-pip-version-check "$@" 2>&1 |
        tee -- "$log" 2>/dev/null | progress && return
    status=("${PIPESTATUS[@]}")
    ((status[2] != 28)) ||
        die "no space left on the disk of $FOLDER or of ${TMPDIR:-/tmp}: free 4 GB (12 GB for a CUDA build) and run this again"
    reason=$(grep -i '^ *error' "$log" | tail -n 1 | cut -c 1-300) || true
    die "pip could not install the packages (${reason:-it gave no reason}): check the network and pip's settings, and run" \
        "this again; $log has all of pip's output"
}

install() {
    rm -f -- "$(stamp_file "$FOLDER")" # an interrupted installation must not look whole
    mention_cpu_build
    say "Installing the packages of launchers/requirements.lock"
    pip_install -r "$ROOT/launchers/requirements.lock"
    say "Installing minisft itself, editable"
    pip_install --no-deps --no-build-isolation -e "$ROOT"
    fingerprint "$FOLDER" >"$(stamp_file "$FOLDER")"
}

fetch=yes
for option in "$@"; do
    case $option in
        -h | --help)
            usage
            exit 0
            ;;
        --no-fetch) fetch=no ;;
        *) die "unknown option $option: see launchers/setup.sh --help" ;;
    esac
done

# pip ends a Ctrl-C like any failure: say what it was.
builder=""
trap '[[ -z "$builder" ]] || kill "$builder" 2>/dev/null; die "stopped; run this again to finish"' INT TERM

FOLDER=$(environment_folder)
fresh=no
if is_up_to_date "$FOLDER"; then
    say "The environment $FOLDER is up to date"
else
    fresh=yes
    make_environment
    install
    # The first ZeRO run on a CPU would wait half a minute for it; without a compiler, runs do without.
    if ! command -v nvidia-smi >/dev/null; then
        "$FOLDER/bin/python" -I -m minisft.launch.cpu_comm_op >"$FOLDER/minisft-operator.log" 2>&1 &
        builder=$!
    fi
fi

fetched=0
if [[ $fetch == yes ]]; then
    say "Fetching the model and the data"
    "$FOLDER/bin/minisft" fetch || fetched=1
fi

if [[ -n "$builder" ]]; then
    wait "$builder" || true
    builder=""
fi
if [[ $fresh == yes ]]; then
    say "Looking at this machine"
    "$FOLDER/bin/minisft" doctor --brief || true # it says what is missing, which is no failure of the set-up
fi
if ((fetched)); then
    say "The environment is ready, without the model and the data: run launchers/setup.sh again to fetch them" >&2
    exit 1
fi
say "Ready: launchers/lab.sh opens the first notebook"
