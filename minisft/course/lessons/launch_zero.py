"""Lesson 04: what starts, what can break, and who cleans up."""

from __future__ import annotations

import random
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minisft.course.exercises import Case, Exercise, Mistake
from minisft.course.lessons import Lesson
from minisft.course.predictions import Choice, Number, Several
from minisft.launch.commands import commands
from minisft.run.config import RunConfig
from minisft.run.folder import Run

Beats = dict[int, tuple[str, float]]  # by rank: its last phase, and when it last gave a sign of life


def command_of(folder: str, ranks: int, port: int) -> list[str]:
    """Return the command that trains the run in `folder`, as a list of words.

    The launcher `deepspeed` gets `--hostfile` with an empty word, `--num_accelerators`,
    `--master_port`, and `--module minisft.training.worker`; the folder comes last.
    """
    launcher = ["deepspeed", "--hostfile", "", "--num_accelerators", str(ranks)]
    worker = ["--module", "minisft.training.worker", folder]
    return [*launcher, "--master_port", str(port), *worker]


def _command_cases(draw: random.Random) -> Iterator[Case]:
    head, worker = ["deepspeed", "--hostfile", "", "--num_accelerators"], ["--module", "minisft.training.worker"]
    plain = [*head, "2", "--master_port", "29500", *worker, "runs/zero2"]
    yield Case(("runs/zero2", 2, 29500), plain, "the folder runs/zero2 with 2 ranks")
    spaced = [*head, "4", "--master_port", "29501", *worker, "my runs/zero2"]
    yield Case(("my runs/zero2", 4, 29501), spaced, "a folder with a space in its name")
    unsafe = [*head, "2", "--master_port", "29502", *worker, "runs/a;echo b"]
    yield Case(("runs/a;echo b", 2, 29502), unsafe, "a folder with a semicolon in its name")
    for _ in range(6):
        config = RunConfig.course("zero2", ranks=draw.choice((1, 2, 4, 8)))
        folder = "/runs/" + "".join(draw.choices("abc $;&'", k=8)) + "x"
        words = commands(config, Path(folder))[0].words
        port = int(words[words.index("--master_port") + 1])
        yield Case((folder, config.ranks, port), words)


def _as_text(folder: str, ranks: int, port: int) -> str:
    return (
        f'deepspeed --hostfile "" --num_accelerators {ranks} --master_port {port} '
        f"--module minisft.training.worker {folder}"
    )


COMMAND = Exercise(
    name="04.command",
    answer=command_of,
    cases=_command_cases,
    mistakes=(
        Mistake(
            "This is one string. Something has to cut it into words again, and a shell would execute parts of it.",
            _as_text,
        ),
        Mistake(
            "The text was cut at its spaces: a folder with a space in its name becomes two words.",
            lambda *arguments: _as_text(*arguments).replace('""', "").split(" "),
        ),
        Mistake(
            "The folder is quoted. Quotes are for shells; in a list they become part of the name.",
            lambda folder, *rest: command_of(shlex.quote(folder), *rest),
        ),
        Mistake(
            "Numbers are among the words. A process receives texts only, so convert them with str.",
            lambda folder, ranks, port: [
                {str(ranks): ranks, str(port): port}.get(word, word) for word in command_of(folder, ranks, port)
            ],
        ),
        Mistake(
            "The empty hostfile is missing: DeepSpeed then uses /job/hostfile, if there is one, and starts the run on "
            "other machines.",
            lambda *arguments: [word for word in command_of(*arguments) if word not in ("--hostfile", "")],
        ),
    ),
    hints=(
        "One word of the command is one entry of the list, whatever characters it has. Nothing needs quotes.",
        'Begin with ["deepspeed", "--hostfile", "", "--num_accelerators", str(ranks)], and end with the folder itself.',
    ),
    minutes=5,
    ask_next="What would a shell make of the command as one text, with the folder 'runs/a;echo b'?",
)


def is_success(exit_code: int, has_done: bool, phases: list[str], ranks: int) -> bool:
    """Return whether a run of `ranks` ranks has really finished.

    `exit_code` is that of its command, `has_done` whether the file DONE exists, and
    `phases` holds the last phase of each rank that has a heartbeat, such as "training",
    "failed" or "done".
    """
    return exit_code == 0 and has_done and phases.count("done") == ranks


def _success_cases(draw: random.Random) -> Iterator[Case]:
    yield Case((0, True, ["done", "done"], 2), True, "a run where all three agree")
    yield Case((0, True, ["done", "training"], 2), False, "a run whose rank 1 never said that it was done")
    yield Case((0, True, ["done"], 2), False, "a run whose rank 1 left no heartbeat")
    yield Case((0, True, [], 2), False, "a run without any heartbeat")
    yield Case((1, True, ["done", "done"], 2), False, "a run whose command ended with 1")
    yield Case((0, False, ["done", "done"], 2), False, "a run without DONE")
    for _ in range(12):
        ranks = draw.randint(1, 8)
        phases, defect = ["done"] * ranks, draw.randint(0, 4)  # 0: none
        if defect == 1:
            phases[draw.randrange(ranks)] = draw.choice(("training", "saving", "failed"))
        elif defect == 2:
            phases.pop()
        code = draw.choice((1, 137, -9)) if defect == 3 else 0
        yield Case((code, defect != 4, phases, ranks), defect == 0)


SUCCESS = Exercise(
    name="04.success",
    answer=is_success,
    cases=_success_cases,
    mistakes=(
        Mistake(
            "A rank without a heartbeat is overlooked: all(...) sees only those that reported, and of an empty list "
            "it is true. Compare with the number of ranks.",
            lambda code, done, phases, ranks: code == 0 and done and all(phase == "done" for phase in phases),
        ),
        Mistake(
            "One rank that is done is not enough: all of them have to be.",
            lambda code, done, phases, ranks: code == 0 and done and "done" in phases,
        ),
        Mistake(
            "Exit code and DONE are not enough: each rank has to report that it was done.",
            lambda code, done, phases, ranks: code == 0 and done,
        ),
        Mistake(
            "Only DONE counts here. Rank 0 writes it; another rank, or the launcher, may still fail.",
            lambda code, done, phases, ranks: done,
        ),
        Mistake(
            "Only the exit code counts here. DeepSpeed's launcher can end with 0 although its ranks were lost.",
            lambda code, done, phases, ranks: code == 0,
        ),
    ),
    hints=(
        "Three conditions, joined by `and`. The third one is about every rank, also those that left no heartbeat.",
        'Count the phases that are "done", and compare the count with `ranks`.',
    ),
    minutes=5,
    ask_next="Which of the three would be wrong if the disk filled up in the last second?",
)


def first_failure(ranks: dict[int, tuple[str, float]]) -> int | None:
    """Return the rank that failed first, or None if every rank is done.

    `ranks` maps each rank to its last phase and the time of its last heartbeat, in
    seconds. A rank that is killed writes nothing more: its phase stays as it was.
    """
    ends = {rank: time for rank, (phase, time) in ranks.items() if phase != "done"}
    return min(ends, key=lambda rank: ends[rank], default=None)


def _failure_cases(draw: random.Random) -> Iterator[Case]:
    killed = {0: ("failed", 40.4), 1: ("training", 39.9)}
    yield Case((killed,), 1, "a killed rank 1, whose loss rank 0 noticed")
    yield Case(({0: ("done", 10.0), 1: ("failed", 12.0), 2: ("failed", 12.5)},), 1, "a rank 0 that was done before")
    yield Case(({0: ("done", 60.0), 1: ("done", 60.1)},), None, "two ranks that are both done")
    for _ in range(10):
        number = draw.randint(2, 8)
        culprit, start = draw.randrange(number), draw.uniform(20, 90)
        later = {rank: ("failed", start + draw.uniform(0.3, 5)) for rank in range(number)}
        phase = draw.choice(("training", "saving", "failed"))
        yield Case((later | {culprit: (phase, start), number: ("done", start - 1)},), culprit)


def _earliest(ranks: Beats, *phases: str) -> int | None:
    """The rank with the earliest last heartbeat among those in one of `phases`; of all without any."""
    ends = {rank: time for rank, (phase, time) in ranks.items() if phase in phases or not phases}
    return min(ends, key=ends.__getitem__, default=None)


FAILURE = Exercise(
    name="04.failure",
    answer=first_failure,
    cases=_failure_cases,
    mistakes=(
        Mistake(
            'A rank that is killed never says "failed". This blames a rank that only lost the connection to it.',
            lambda ranks: _earliest(ranks, "failed"),
        ),
        Mistake(
            "A rank that was done gives no further sign of life, and that is no failure.",
            lambda ranks: _earliest(ranks),
        ),
        Mistake(
            "This is the last rank that ended. The others failed because of the first one.",
            lambda ranks: max(ranks, key=lambda r: ranks[r][1]) if {p for p, _ in ranks.values()} != {"done"} else None,
        ),
        Mistake(
            "This is the failed rank with the lowest number. The order in time counts.",
            lambda ranks: min((rank for rank, (phase, _) in ranks.items() if phase != "done"), default=None),
        ),
    ),
    hints=(
        "Leave out the ranks that are done. Of the others, who was silent first?",
        "Use min over the ranks that are not done, with the time as its key, and return None if there are none.",
    ),
    minutes=7,
    ask_next="The ranks are on two machines whose clocks differ by a second. Is the answer still right?",
)


def resume_from(names: list[str]) -> str | None:
    """Return the newest complete checkpoint among the `names` in a run folder, or None.

    A complete checkpoint is called checkpoint-N, where N is its step. Anything else is
    not one, such as "checkpoint-40.tmp" or ".removed-checkpoint-20".
    """
    import re

    complete = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    return max(complete, key=lambda name: int(name.rpartition("-")[2]), default=None)


def _resume_cases(draw: random.Random) -> Iterator[Case]:
    yield Case((["checkpoint-20", "logs", "checkpoint-40"],), "checkpoint-40", "two checkpoints")
    yield Case((["checkpoint-100", "checkpoint-20", "run.json"],), "checkpoint-100", "checkpoints 20 and 100")
    yield Case((["checkpoint-40.tmp", "checkpoint-20", ".saving"],), "checkpoint-20", "an incomplete checkpoint 40")
    yield Case((["checkpoint-20", ".removed-checkpoint-60"],), "checkpoint-20", "a checkpoint 60 that is being removed")
    yield Case((["run.json", "logs"],), None, "a run without a checkpoint")
    for _ in range(8):
        steps = draw.sample(range(5, 300, 5), draw.randint(1, 6))
        halves = [f"checkpoint-{draw.randint(300, 999)}{draw.choice(('.tmp', '-partial', '.old'))}"]
        names = [*(f"checkpoint-{step}" for step in steps), *halves, ".removed-checkpoint-900", "data", "logs"]
        draw.shuffle(names)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                (Path(folder) / name).mkdir()
            yield Case((names,), Run(Path(folder)).checkpoints[-1].name)


def _step(name: str) -> int:
    return int("".join(re.findall(r"\d+", name)) or 0)


RESUME = Exercise(
    name="04.resume",
    answer=resume_from,
    cases=_resume_cases,
    mistakes=(
        Mistake(
            "The names are compared as text, where checkpoint-20 comes after checkpoint-100. Compare the steps.",
            lambda names: max((n for n in names if re.fullmatch(r"checkpoint-\d+", n)), default=None),
        ),
        Mistake(
            "An incomplete checkpoint was chosen. The run would load half of its weights.",
            lambda names: max((n for n in names if "checkpoint-" in n), key=_step, default=None),
        ),
        Mistake(
            "A name that only begins like a checkpoint was chosen: it is incomplete, or being saved.",
            lambda names: max((n for n in names if n.startswith("checkpoint-")), key=_step, default=None),
        ),
        Mistake(
            "This is the last name of the list. A folder lists its entries in no particular order.",
            lambda names: ([n for n in names if re.fullmatch(r"checkpoint-\d+", n)] or [None])[-1],
        ),
    ),
    hints=(
        "First leave out every name that is not exactly checkpoint-N. Then compare numbers, not texts.",
        're.fullmatch(r"checkpoint-\\d+", name) accepts complete names only; int(name.rpartition("-")[2]) is the step.',
    ),
    minutes=7,
    ask_next="Why is it enough to look at names? What has to be true of the moment when a checkpoint gets its name?",
)

LESSON = Lesson(
    objectives=(
        "read a launch command word by word, and build one that no name can break",
        "decide from three sources whether a run has succeeded",
        "find the rank that failed first, behind the errors of the others",
        "say what a resumed run repeats, and what it cannot resume",
        "say what one run each can show about speed, and what it cannot",
    ),
    minutes=60,
    predictions={
        "words": Several(
            asks="what the launch command contains",
            stand_in=["number of processes", "run folder", "learning rate"],
            lesson="The command says how many processes run, and where; the folder holds every setting.",
            options=("number of processes", "run folder", "learning rate", "data", "strategy"),
        ),
        "processes": Number(
            asks="the number of processes that one launch of two ranks starts",
            stand_in=3,
            lesson="Between the cell and the ranks are launchers and watchers, and each of them can die too.",
            unit="processes",
        ),
        "left": Number(
            asks="how many of these processes are left when one rank was killed",
            stand_in=5,
            lesson="One dead rank ends the run, and someone has to end the processes that wait for it.",
            unit="processes",
        ),
        "error": Choice(
            asks="the error in the log of the rank that was not killed",
            stand_in="out of memory",
            lesson="The other ranks report the lost connection: a consequence, which looks like a network problem.",
            options=("a lost connection", "out of memory", "no error"),
        ),
        "repeated": Number(
            asks="how many steps the resumed run computes again",
            stand_in=0,
            lesson="A run resumes from its last checkpoint, so all steps since then are computed twice.",
            unit="steps",
            within=0.05,
        ),
        "apart": Choice(
            asks="how far the losses of the resumed run are from those of an undisturbed one",
            stand_in="equal to six digits",
            lesson="If everything that determines a step is restored, the losses are equal to the last digit.",
            options=("exactly equal", "equal to six digits", "visibly different"),
        ),
        "four": Choice(
            asks="what happens if the run of two ranks is resumed with four",
            stand_in="it resumes",
            lesson="Optimizer states are stored as they were divided: another number of ranks cannot read them.",
            options=("it resumes", "it is refused", "it starts and crashes"),
        ),
        "spread": Number(
            asks="how many times faster the fastest step of a run is than its slowest, at most over the runs",
            stand_in=1.1,
            lesson="The speed varies within a run, so a difference between two single runs may be no more than that.",
            unit="times",
            within=0.3,
        ),
    },
    exercises=(COMMAND, SUCCESS, FAILURE, RESUME),
    misconceptions=(
        "That exit code 0 means success. It means that the launcher ended without complaint.",
        "That the rank with an error message is the cause. The one that was silent first is.",
        "That the faster of two single runs is the faster strategy.",
    ),
)
