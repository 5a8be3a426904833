"""Lesson 06: the exercise on hostfiles."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.errors import UserError
from minisft.launch.hosts import read_hostfile

Hosts = list[tuple[str, int]]


def parse_hostfile(text: str) -> tuple[list, list]:
    """Return (hosts, refused) for the text of a hostfile.

    `hosts` lists (name, slots) in the order of the lines. Blank lines and lines that
    begin with # are skipped. Every other line must read `name slots=N`, where N is a
    whole number of at least 1; a comment that begins with # may follow. `refused` lists
    the numbers of the lines that do not, and of those whose host is in `hosts` already.
    Lines are counted from 1, skipped ones included.
    """
    import re

    hosts: dict[str, int] = {}
    refused: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]+)", content)
        if match is None or int(match[2]) < 1 or match[1] in hosts:
            refused.append(number)
        else:
            hosts[match[1]] = int(match[2])
    return list(hosts.items()), refused


def _read_by_the_package(text: str) -> tuple[Hosts, list[int]]:
    """Have the package read the hostfile; blank each line that it refuses, and read it again."""
    lines = text.splitlines()
    refused: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hostfile"
        while True:
            file.write_text("\n".join(lines))
            try:
                return [(host.name, host.slots) for host in read_hostfile(file)], refused
            except UserError as error:
                line = re.search(r", line (\d+):", str(error))
                if line is None:  # no host is left
                    return [], refused
                refused.append(int(line[1]))
                lines[refused[-1] - 1] = ""


def _host_cases(draw: random.Random) -> Iterator[Case]:
    two = [("gpu-1", 8), ("gpu-2", 4)]
    yield Case(("gpu-1 slots=8\ngpu-2 slots=4\n",), (two, []), "two good lines")
    yield Case(("# rack 3\n\ngpu-1 slots=8\ngpu-2 slots=4 # old\n",), (two, []), "comments and a blank line")
    yield Case(("# rack 3\ngpu-1\ngpu-2 slots=4\n",), ([("gpu-2", 4)], [2]), "a line without slots")
    yield Case(("gpu-1 slots=8\ngpu-2 slots=4\ngpu-1 slots=8\n",), (two, [3]), "a host that is named twice")
    yield Case(("gpu-1 slots=0\ngpu-2 slots=4\n",), ([("gpu-2", 4)], [1]), "a host without ranks")
    forms = (
        "{} slots={}",
        "  {}   slots={}",
        "{} slots={} # new",
        "",
        "# {}",
        "{}",
        "{} {}",
        "{} slots=0",
        "{} slots=",
    )
    for _ in range(12):
        lines = [draw.choice(forms).format(f"gpu-{draw.randint(1, 6)}", draw.randint(1, 8)) for _ in range(8)]
        text = "\n".join(lines)
        yield Case((text,), _read_by_the_package(text))


def _parsed(
    text: str, *, default: str = "", least: int = 1, twice: bool = False, skipped: int = 1, comments: bool = True
) -> tuple[Hosts, list[int]]:
    """Read a hostfile with one rule changed."""
    hosts: Hosts = []
    refused: list[int] = []
    number = 0
    for line in text.splitlines():
        content = line.strip() if line.strip().startswith("#") or not comments else line.partition("#")[0].strip()
        is_skipped = not content or content.startswith("#")
        number += skipped if is_skipped else 1
        if is_skipped:
            continue
        match = re.fullmatch(
            r"(\S+)\s+slots=([0-9]+)", f"{content} {default}" if len(content.split()) == 1 else content
        )
        if match is None or int(match[2]) < least or (match[1] in dict(hosts) and not twice):
            refused.append(number)
        else:
            hosts.append((match[1], int(match[2])))
    return hosts, refused


HOSTS = Exercise(
    name="06.hosts",
    answer=parse_hostfile,
    cases=_host_cases,
    mistakes=(
        Mistake(
            "A host without `slots=` gets one rank. Nobody wrote that number: a forgotten one would leave GPUs idle.",
            lambda text: _parsed(text, default="slots=1"),
        ),
        Mistake(
            "A host that is named twice is accepted twice, so its GPUs would be given to two sets of ranks.",
            lambda text: _parsed(text, twice=True),
        ),
        Mistake(
            "A host with `slots=0` is accepted. It would take no rank, and the run would wait for nobody there.",
            lambda text: _parsed(text, least=0),
        ),
        Mistake(
            "Skipped lines are not counted, so the numbers do not lead to the lines in the file.",
            lambda text: _parsed(text, skipped=0),
        ),
        Mistake(
            "The lines are counted from 0. Editors count from 1.",
            lambda text: (parse_hostfile(text)[0], [number - 1 for number in parse_hostfile(text)[1]]),
        ),
        Mistake(
            "A line with a comment at its end is refused, although DeepSpeed accepts it.",
            lambda text: _parsed(text, comments=False),
        ),
        Mistake(
            "The slots are text. Ranks are counted with them: return whole numbers.",
            lambda text: ([(name, str(slots)) for name, slots in parse_hostfile(text)[0]], parse_hostfile(text)[1]),
        ),
        Mistake(
            "Bad lines are left out and not reported: the run would use fewer machines than were meant.",
            lambda text: (parse_hostfile(text)[0], []),
        ),
    ),
    hints=(
        "Cut each line at #, strip it, and skip it if nothing is left; count with `enumerate(text.splitlines(), 1)`.",
        r"`re.fullmatch(r'(\S+)\s+slots=([0-9]+)', line)` gives the name and the number, or None for a bad line.",
    ),
    minutes=12,
    ask_next="Which names should be refused, given that they end up in the command line of ssh?",
)
