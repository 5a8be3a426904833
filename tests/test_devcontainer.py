""".devcontainer/: its files name what exists, and the image has what setup.sh and the runs need. Nothing is built."""

import json
import re
import shlex
from pathlib import Path

from minisft.doctor import SHARED_PER_RANK

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".devcontainer"
SETTINGS = json.loads((FOLDER / "devcontainer.json").read_text())
# Programs of Debian's essential packages and of python:3.12-slim, which every RUN step may use.
BASE_IMAGE = {"apt-get", "rm", "mkdir", "chown", "useradd", "python"}


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of each instruction of the Dockerfile, with continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (FOLDER / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def arguments(keyword: str) -> list[str]:
    return [words for name, words in instructions() if name == keyword]


def commands() -> list[list[str]]:
    return [shlex.split(part) for step in arguments("RUN") for part in step.split("&&")]


def test_the_settings_lead_to_the_dockerfile_and_the_project():
    assert FOLDER / SETTINGS["build"]["dockerfile"] == FOLDER / "Dockerfile"
    assert (FOLDER / SETTINGS["build"]["context"]).resolve() == ROOT
    assert set(SETTINGS["build"]["args"]) == set(arguments("ARG"))
    # An editable installation names its folder, so the mounted project has to be where the built one was.
    assert arguments("WORKDIR") == [SETTINGS["workspaceFolder"]]
    assert f"target={SETTINGS['workspaceFolder']}," in SETTINGS["workspaceMount"]


def test_all_that_is_copied_exists_and_setup_finds_all_that_it_installs_from():
    copied = [word for step in arguments("COPY") for word in step.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    for needed in ("pyproject.toml", "README.md", "LICENSE", "launchers/", "minisft/", "notebooks/"):
        assert needed in copied


def test_each_step_runs_what_the_image_has():
    installed: set[str] = set()
    for words in commands():
        assert words[0] in BASE_IMAGE or (ROOT / words[0]).is_file(), words
        if words[:2] == ["apt-get", "install"]:
            installed |= {word for word in words[2:] if not word.startswith("-")}
    assert {"g++", "git"} <= installed
    assert commands()[-1] == ["launchers/setup.sh", "--no-fetch"]
    # `minisft doctor` also wants ninja, which the lock brings, and Python's headers, which the base image has.
    assert re.search(r"(?m)^ninja==", (ROOT / "launchers" / "requirements.lock").read_text())
    assert arguments("FROM") == ["python:3.12-slim"]


def test_the_user_is_not_root_and_owns_environment_and_cache():
    user = SETTINGS["remoteUser"]
    assert arguments("USER") == [user] != ["root"]
    assert f"/home/{user}/" in dict(word.split("=", 1) for word in arguments("ENV"))["VIRTUAL_ENV"]
    keywords = [(name, words) for name, words in instructions() if name in ("USER", "RUN")]
    assert keywords.index(("USER", user)) < keywords.index(("RUN", "launchers/setup.sh --no-fetch"))
    (cache,) = re.findall(r"target=([^,]+)", SETTINGS["mounts"][0])
    assert cache == f"/home/{user}/.cache/minisft" and any(cache in words for words in arguments("RUN"))


def test_shared_memory_is_enough_for_two_ranks():
    (size,) = [option.removeprefix("--shm-size=") for option in SETTINGS["runArgs"]]
    assert int(size.removesuffix("g")) << 30 >= 2 * SHARED_PER_RANK


def test_the_image_opens_the_lab():
    (command,) = map(json.loads, arguments("CMD"))
    assert (ROOT / command[0]).is_file() and command[0] == "launchers/lab.sh"
    assert "--no-browser" in command
