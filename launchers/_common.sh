# For the other launchers, which source it:
#   ROOT             the repository's folder
#   usage            prints the header comment of the script that is running
#   help_if_asked    the same, and ends, if the first argument asks for it: help_if_asked "$@"
#   die SENTENCE     for a user's mistake: the sentence to standard error, exit code 2
#   use_environment  puts the environment's programs first on PATH, after setup.sh where that is needed;
#                    MINISFT_SKIP_SETUP=1 takes the environment as it is; results go to the repository's outputs/
#                    from wherever a launcher is called

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

help_if_asked() {
    case "${1:-}" in
        -h | --help)
            usage
            exit 0
            ;;
    esac
}

die() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 2
}

# The active virtual environment or conda environment, else .venv. conda's `base` holds conda itself: never touched.
environment_folder() {
    if [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
        printf '%s\n' "$VIRTUAL_ENV"
    elif [[ -n "${CONDA_PREFIX:-}" && -x "$CONDA_PREFIX/bin/python" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
        printf '%s\n' "$CONDA_PREFIX"
    else
        printf '%s\n' "$ROOT/.venv"
    fi
}

# What the environment in folder $1 has to match: another lock, package, Python or place needs a new set-up.
fingerprint() {
    {
        printf '%s\n%s\n' "$ROOT" "$("$1/bin/python" -V 2>&1)"
        cat -- "$ROOT/launchers/requirements.lock" "$ROOT/pyproject.toml"
    } | cksum
}

stamp_file() {
    printf '%s\n' "$1/.minisft-setup"
}

is_up_to_date() {
    [[ -x "$1/bin/python" && -f "$(stamp_file "$1")" && "$(cat -- "$(stamp_file "$1")")" == "$(fingerprint "$1")" ]]
}

use_environment() {
    local folder status=0
    folder=$(environment_folder)
    if [[ "${MINISFT_SKIP_SETUP:-}" != 1 ]] && ! is_up_to_date "$folder"; then
        # Standard output belongs to the caller's own result.
        "$ROOT/launchers/setup.sh" >&2 || status=$?
        # Where only the model could not be fetched, setup.sh has said so and the environment is whole.
        is_up_to_date "$folder" || exit "$status"
    fi
    export PATH="$folder/bin:$PATH" MINISFT_OUTPUTS="${MINISFT_OUTPUTS:-$ROOT/outputs}"
    # No Python that is started from here on imports modules of the folder that it happens to run in.
    export PYTHONSAFEPATH=1
    # An operator that is built belongs to the environment: others have other paths and tools.
    [[ ! -w "$folder" ]] || export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$folder/torch_extensions}"
}
