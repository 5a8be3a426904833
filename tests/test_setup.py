"""launchers/: the shell scripts, without installing anything. A pretend Python stands in for the real one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisft import __file__ as package

ROOT = Path(package).parents[1]
LAUNCHERS = sorted(path for path in (ROOT / "launchers").glob("*.sh") if not path.name.startswith("_"))
# These hand every option on to the program that their usage line names.
STRICT = [path for path in LAUNCHERS if not re.search(r"\[\w+ options\]", path.read_text().splitlines()[1])]

each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)

# Answers what setup.sh asks a Python, notes the rest in calls.txt, and fails where a file `pip_fails` says why.
FAKE_PYTHON = """#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    -V) echo "Python $(cat "$here/version")" ;;
    "-I -c "*find_spec*) exit "${TORCH_MISSING:-0}" ;;
    "-I -c import venv"*) exit "${NO_VENV:-0}" ;;
    "-I -m pip --version") ;;
    "-I -m minisft.launch.cpu_comm_op") touch "$here/built" ;;
    "-I -m pip index versions torch") echo "$TORCH_VERSIONS" ;;
    *)
        echo "$*" >>"$here/calls.txt"
        if [ -e "$here/pip_fails" ]; then cat "$here/pip_fails"; exit 1; fi
        ;;
esac
"""


def run(script: Path, *options: str, cwd: str | Path = "/", **env: str) -> subprocess.CompletedProcess[str]:
    """Run it from a folder that is not the repository, with no environment active."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "CONDA_", "MINISFT_"))}
    command = ["bash", str(script), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=inherited | env, timeout=60)


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what setup.sh reads, in a path with a space."""
    root = tmp_path / "my course"
    shutil.copytree(ROOT / "launchers", root / "launchers")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def active(repository: Path) -> Path:
    """An active virtual environment whose Python and minisft only note how they were called."""
    folder = repository.parent / "an environment"
    write_program(folder / "bin" / "python", FAKE_PYTHON)
    (folder / "bin" / "version").write_text("3.12.1\n")
    write_program(folder / "bin" / "minisft", '#!/bin/sh\necho "minisft $*"\nexit "${MINISFT_EXIT:-0}"\n')
    return folder


def stamp(folder: Path) -> Path:
    return folder / ".minisft-setup"


def calls(folder: Path) -> list[str]:
    file = folder / "bin" / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


# --- every launcher ----------------------------------------------------------------------------------------


def test_setup_and_lab_are_among_the_launchers():
    assert {"setup.sh", "lab.sh"} <= {path.name for path in LAUNCHERS}


@pytest.mark.parametrize("script", sorted((ROOT / "launchers").glob("*.sh")), ids=lambda path: path.name)
def test_bash_accepts_it(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_launcher
def test_it_stops_at_the_first_error_and_can_be_executed(launcher):
    assert "\nset -euo pipefail\n" in launcher.read_text()
    assert os.access(launcher, os.X_OK)


@each_launcher
def test_help_prints_the_usage_and_sets_nothing_up(launcher):
    done = run(launcher, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"Usage: launchers/{launcher.name}")
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("launcher", STRICT, ids=lambda path: path.name)
def test_an_unknown_option_is_refused(launcher):
    done = run(launcher, "--no-such-option", MINISFT_SKIP_SETUP="1", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr


# --- the lock ----------------------------------------------------------------------------------------------


def test_the_lock_is_exact_pins_that_hold_what_pyproject_asks_for():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "launchers" / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert pins == sorted(pins, key=str.upper)  # as `LC_ALL=C sort -f`
    locked = {canonicalize_name(name): found for name, _, found in (pin.partition("==") for pin in pins)}
    assert len(locked) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["project"]["dependencies"]) + project["build-system"]["requires"]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += [line for line in extra if not line.startswith("minisft")]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_conda_installs_the_same_lock():
    import yaml

    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    assert pip == ["-r launchers/requirements.lock", "-e ."]
    assert {"pip", "gxx_linux-64", "ninja"} <= {entry for entry in entries if isinstance(entry, str)}


# --- setup.sh: choosing a Python -----------------------------------------------------------------------------


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("version", "env", "said"),
    [
        ("3.9.18", {}, "is Python 3.9.18"),
        ("2.7.18", {}, "is Python 2.7.18"),
        ("", {}, "does not run"),
        ("3.11.2", {"NO_VENV": "1"}, "lacks the venv or ensurepip module"),
    ],
)
def test_an_unfit_python_is_refused_in_one_sentence(repository, tmp_path, version, env, said):
    python = write_program(tmp_path / "bin" / "python", FAKE_PYTHON)
    (tmp_path / "bin" / "version").write_text(f"{version}\n" if version else "")
    done = run(repository / "launchers" / "setup.sh", MINISFT_PYTHON=str(python), **env)
    sentence = one_sentence(done)
    assert said in sentence and "3.11 or newer" in sentence and "MINISFT_PYTHON" in sentence
    assert not (repository / ".venv").exists() and calls(tmp_path) == []


def test_an_old_active_environment_is_refused(repository, active):
    (active / "bin" / "version").write_text("3.10.4\n")
    done = run(repository / "launchers" / "setup.sh", VIRTUAL_ENV=str(active))
    assert "has Python 3.10.4" in one_sentence(done)
    assert calls(active) == [] and not stamp(active).exists()


# --- setup.sh: installing, once ------------------------------------------------------------------------------


def test_it_installs_the_lock_then_minisft_then_fetches_then_examines(repository, active):
    setup = repository / "launchers" / "setup.sh"
    done = run(setup, VIRTUAL_ENV=str(active))
    assert done.returncode == 0, done.stderr
    assert (active / "bin" / "built").exists(), "the operator of DeepSpeed's CPU ranks"
    lock, itself = calls(active)
    assert lock.endswith(f"-r {repository}/launchers/requirements.lock")
    assert itself.endswith(f"--no-deps --no-build-isolation -e {repository}")
    assert done.stdout.index("minisft fetch") < done.stdout.index("minisft doctor --brief")
    assert stamp(active).exists()

    again = run(setup, "--no-fetch", VIRTUAL_ENV=str(active))
    assert again.returncode == 0 and "up to date" in again.stdout and "minisft" not in again.stdout
    assert len(calls(active)) == 2


@pytest.mark.parametrize("changed", ["the lock", "pyproject", "Python", "the place"])
def test_a_change_of_what_was_installed_needs_a_new_set_up(repository, active, changed):
    assert run(repository / "launchers" / "setup.sh", VIRTUAL_ENV=str(active)).returncode == 0
    if changed == "the lock":
        (repository / "launchers" / "requirements.lock").write_text("torch==2.13.1\n")
    elif changed == "pyproject":
        with (repository / "pyproject.toml").open("a") as file:
            file.write("\n")
    elif changed == "Python":
        (active / "bin" / "version").write_text("3.12.2\n")
    else:
        repository = repository.rename(repository.with_name("moved"))
    done = run(repository / "launchers" / "setup.sh", VIRTUAL_ENV=str(active))
    assert done.returncode == 0 and "up to date" not in done.stdout
    assert len(calls(active)) == 4


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "no space left"),
        ("Collecting x\nERROR: No matching distribution found for x==1\n", "No matching distribution found for x==1"),
        ("", "could not install"),
    ],
)
def test_a_failed_installation_is_one_sentence_and_leaves_no_stamp(repository, active, output, said):
    stamp(active).write_text("of an older lock\n")
    (active / "bin" / "pip_fails").write_text(output)
    done = run(repository / "launchers" / "setup.sh", VIRTUAL_ENV=str(active))
    assert said in one_sentence(done)
    assert not stamp(active).exists() and "minisft doctor" not in done.stdout


def test_a_failed_fetch_leaves_a_ready_environment(repository, active):
    done = run(repository / "launchers" / "setup.sh", VIRTUAL_ENV=str(active), MINISFT_EXIT="2")
    assert done.returncode == 1 and "without the model" in done.stderr
    assert stamp(active).exists() and "minisft doctor --brief" in done.stdout


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="the advice is for machines without a GPU")
@pytest.mark.parametrize(
    ("versions", "torch_missing", "advised"),
    [("2.14.0, 2.13.0", "1", True), ("2.13.0+cpu, 2.13.0", "1", False), ("2.14.0, 2.13.0", "0", False)],
)
def test_the_cpu_build_is_mentioned_where_it_would_save_a_download(
    repository, active, versions, torch_missing, advised
):
    env = {"VIRTUAL_ENV": str(active), "TORCH_VERSIONS": versions, "TORCH_MISSING": torch_missing}
    done = run(repository / "launchers" / "setup.sh", **env)
    assert done.returncode == 0
    assert ("PIP_EXTRA_INDEX_URL" in done.stdout) == advised


# --- the current folder's modules ---------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path):
    """A folder with modules of the names that the launchers' Pythons import; each leaves a mark."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("venv", "ensurepip", "pip", "platform", "runpy", "importlib", "torch", "minisft", "tempfile"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return folder


@pytest.mark.attack("2")
def test_setting_up_imports_nothing_from_the_current_folder(repository, hostile, tmp_path):
    """With a real Python, which really makes an environment; nothing is installed into it."""
    (repository / "launchers" / "requirements.lock").write_text("torch==0+none\n")
    done = run(
        repository / "launchers" / "setup.sh",
        "--no-fetch",
        cwd=hostile,
        MINISFT_PYTHON=sys.executable,
        PIP_NO_INDEX="1",
    )
    assert done.returncode == 2 and "pip could not install" in done.stderr, done.stderr
    assert (repository / ".venv" / "bin" / "pip").exists()
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.attack("2")
def test_what_a_launcher_starts_imports_nothing_from_the_current_folder(repository, active, hostile, tmp_path):
    code = f"use_environment; {sys.executable} -c 'import platform, tempfile'; {sys.executable} -m platform"
    done = source(repository, code, cwd=hostile, VIRTUAL_ENV=str(active), MINISFT_SKIP_SETUP="1")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


# --- which environment, and use_environment ------------------------------------------------------------------


def source(repository: Path, code: str, cwd: str | Path = "/", **env: str) -> subprocess.CompletedProcess[str]:
    script = repository / "launchers" / "scratch.sh"
    script.write_text(f'set -euo pipefail\nsource "$(dirname "$0")/_common.sh"\n{code}\n')
    return run(script, cwd=cwd, **env)


def test_conda_base_is_left_alone(repository, active):
    conda = {"CONDA_PREFIX": str(active)}
    code = "environment_folder"
    own = f"{repository}/.venv\n"
    assert source(repository, code).stdout == own
    assert source(repository, code, **conda, CONDA_DEFAULT_ENV="base").stdout == own
    assert source(repository, code, **conda, CONDA_DEFAULT_ENV="course").stdout == f"{active}\n"
    assert source(repository, code, VIRTUAL_ENV="/deleted").stdout == own


def test_use_environment_sets_up_first_and_keeps_standard_output_clean(repository, active):
    code = "use_environment; command -v minisft"
    first = source(repository, code, VIRTUAL_ENV=str(active))
    assert first.stdout == f"{active}/bin/minisft\n" and "Installing" in first.stderr
    second = source(repository, code, VIRTUAL_ENV=str(active))
    assert second.stdout == first.stdout and second.stderr == ""
    assert len(calls(active)) == 2


def test_use_environment_can_skip_the_set_up(repository, active):
    done = source(repository, "use_environment; command -v minisft", VIRTUAL_ENV=str(active), MINISFT_SKIP_SETUP="1")
    assert done.stdout == f"{active}/bin/minisft\n" and done.stderr == "" and calls(active) == []


def test_use_environment_stops_where_the_set_up_failed(repository, active):
    (active / "bin" / "pip_fails").touch()
    done = source(repository, "use_environment; echo went on", VIRTUAL_ENV=str(active))
    assert done.returncode == 2 and done.stdout == ""


def test_use_environment_goes_on_without_the_model(repository, active):
    env = {"VIRTUAL_ENV": str(active), "MINISFT_EXIT": "2"}
    done = source(repository, "use_environment; echo went on", **env)
    assert done.returncode == 0 and done.stdout == "went on\n" and "without the model" in done.stderr


def test_lab_opens_the_first_notebook_and_hands_jupyter_the_options(repository, active):
    write_program(active / "bin" / "jupyter", '#!/bin/sh\nprintf "%s|" "$(pwd)" "$@" "${PYTHONSAFEPATH-unset}"\n')
    lab = repository / "launchers" / "lab.sh"
    done = run(lab, "--no-browser", "--port", "1", VIRTUAL_ENV=str(active), MINISFT_SKIP_SETUP="1")
    edition, _, opened = done.stdout.partition("\n")
    where, lab, address, *options = opened.rstrip("|").split("|")
    assert (where, lab) == (str(repository), "lab")
    assert address.endswith("=/lab/tree/outputs/course/student/00_start_here.ipynb")
    assert edition == f"minisft notebooks --edition student --out {repository}/outputs/course/student"
    assert options == ["--no-browser", "--port", "1", "unset"], "a notebook may import what is beside it"


def test_a_link_in_the_place_of_the_environment_is_not_emptied(repository, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "work").write_text("not an environment")
    (repository / ".venv").symlink_to(elsewhere)
    done = run(repository / "launchers" / "setup.sh", "--no-fetch", VIRTUAL_ENV="", CONDA_PREFIX="")
    assert done.returncode == 2 and "is a link to an environment" in done.stderr
    assert (elsewhere / "work").exists()
