"""Run functions of a notebook on two real processes, joined by gloo.

    train(my_step, task).losses               # by step and rank

A function cannot be handed to another process as it is, so its source is: `run` writes it into a job
together with the tasks, and starts this module with the job's folder. That process forks once; both
run every function on every task and write a line per result. A rank that raises ends both.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from minisft import processes
from minisft.course.exercises import RaisedElsewhere
from minisft.course.experiments.by_hand import RANKS, Task, adamw
from minisft.errors import UserError
from minisft.files import read_text

SECONDS = 90  # for all functions and tasks of a job
WAITING = 15  # seconds that a rank waits for the other one in a collective operation


@dataclass(frozen=True)
class Trained:
    """What two ranks report of a task that they trained.

    `losses` are by step and rank; `weights` are all weights after the last step, flat, and `same`
    says that both ranks hold the same ones. The rest is of the last step: the gradient that AdamW
    received, the number and bytes of collective operations, the most layers that were whole at
    the same time, and the bytes that each rank held.
    """

    losses: list[list[float]]
    weights: list[float]
    same: bool
    gradient: list[float]
    calls: dict[str, int]
    sent: dict[str, int]
    whole_layers: int
    bytes: list[dict[str, int]]

    @classmethod
    def of_reports(cls, reports: Sequence[Mapping[str, Any]], sharded: bool) -> Trained:
        first, sizes = reports[0], reports[0]["sizes"]
        parts = first["weights"] if not sharded else _joined([r["weights"] for r in reports])
        gradients = _joined([report["gradient"] for report in reports])
        return cls(
            losses=[list(pair) for pair in zip(*(report["losses"] for report in reports), strict=True)],
            weights=[x for part, size in zip(parts, sizes, strict=True) for x in part[:size]],
            same=sharded or all(report["weights"] == first["weights"] for report in reports),
            gradient=[x for part, size in zip(gradients, sizes, strict=False) for x in part[:size]],
            calls=first["calls"],
            sent=first["sent"],
            whole_layers=max(report["whole layers"] for report in reports),
            bytes=[report["bytes"] for report in reports],
        )


def _joined(slices: Sequence[Sequence[list[float]]]) -> list[list[float]]:
    """Concatenate the ranks' slices of each part."""
    return [[x for part in parts for x in part] for parts in zip(*slices, strict=False)]


def train(function: Callable[..., Any], task: Task, sharded: bool = False) -> Trained:
    """Train `task` with a step function on two ranks. Raises `RaisedElsewhere` if a rank raised."""
    [[result]] = run([function], [task], sharded)
    if isinstance(result, Exception):
        raise result
    return result


def run(functions: Sequence[Callable[..., Any]], tasks: Sequence[Task], sharded: bool = False) -> list[list[Any]]:
    """Run step functions on two ranks: one list per function, with an entry per task.

    An entry is `Trained`, or the exception that a rank raised, which then stands for the function's
    other tasks, too. `sharded` functions get a list of slices, one per layer, in place of all weights.
    """
    sources = [json.dumps(source_of(function)) for function in functions]
    texts = [json.dumps(asdict(task)) for task in tasks]
    for key in [key for key, entry in _known.items() if getattr(entry, "kind", "") == "RuntimeError"]:
        del _known[key]  # a rank that waited in vain may only have been slow
    pairs = [(source, text) for source in dict.fromkeys(sources) for text in texts]
    while missing := [pair for pair in pairs if (*pair, sharded) not in _known]:
        entries = _run_job([[json.loads(part) for part in pair] for pair in missing], sharded)
        for (source, text), entry in zip(missing, entries, strict=False):
            ended = texts if isinstance(entry, Exception) else [text]
            for other in ended:
                _known.setdefault((source, other, sharded), entry)
    return [[_known[source, text, sharded] for text in texts] for source in sources]


_known: dict[tuple[str, str, bool], Any] = {}  # the same function trains the same task once


def _run_job(job: Sequence[Any], sharded: bool) -> list[Any]:
    """Run the pairs of source and task in order, up to the first that fails, in two new processes."""
    errors = f"the two processes did not end within {SECONDS} seconds"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"sharded": sharded, "pairs": job}), encoding="utf-8")
        command = processes.python("-m", "minisft.course.experiments.two_ranks", name)
        with suppress(subprocess.TimeoutExpired):  # what is missing is reported below
            errors = processes.run(command, {"OMP_NUM_THREADS": "1"}, timeout=SECONDS).stderr
        lines = [
            [json.loads(line) for line in (read_text(folder / f"rank{r}") or "").splitlines()] for r in range(RANKS)
        ]
    entries: list[Any] = []
    for pair in zip(*lines, strict=False):
        if any("raised" in report for report in pair):
            break
        entries.append(Trained.of_reports(pair, sharded))
    if len(entries) < len(job):
        failures = [report for rank in lines for report in rank if "raised" in report]
        first = min(
            failures, key=lambda report: report["time"], default={"raised": ("RuntimeError", errors[-300:], "")}
        )
        entries.append(RaisedElsewhere(*first["raised"]))
    return entries


def source_of(function: Callable[..., Any]) -> dict[str, str]:
    """Return what another process needs to define `function`: its name, and its source.

    The source is preceded by the imports, functions and plain values that it uses. Raises `UserError`
    if the source is not known.
    """
    pieces: dict[str, str] = {}
    _collect(function, pieces)
    return {"name": function.__name__, "source": "\n".join(pieces.values())}


def _collect(function: Any, pieces: dict[str, str]) -> None:
    """Add the source of `function` to `pieces`, after all that it uses."""
    name = function.__name__
    try:
        source = getattr(function, "edited_source", None) or textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise UserError(f"the source of {name} is not known: define it in a cell, with def") from None
    if not source.lstrip().startswith(("def ", "@")):
        raise UserError(f"define {name} with def: its source is sent to the two processes")
    pieces.setdefault("from", "from __future__ import annotations")
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if inspect.iscode(constant)]
        for used in code.co_names:
            if used in function.__globals__ and used not in pieces and used != name:
                _add_value(used, function.__globals__[used], function, pieces)
    pieces[name] = source


def _add_value(name: str, value: Any, function: Any, pieces: dict[str, str]) -> None:
    if isinstance(value, ModuleType):
        pieces[name] = f"import {value.__name__} as {name}"
    elif inspect.isfunction(value) and value.__module__ in ("__main__", function.__module__):
        pieces[name] = ""  # a function that calls itself through another one is collected once
        collected: dict[str, str] = {}
        _collect(value, collected)
        pieces |= collected
    elif hasattr(value, "__module__") and hasattr(value, "__qualname__"):
        pieces[name] = f"from {value.__module__} import {value.__qualname__} as {name}"
    elif isinstance(value, bool | int | float | str | tuple | None):
        pieces[name] = f"{name} = {value!r}"


# --- on the ranks ------------------------------------------------------------------------------------------


def main() -> None:
    """Fork, join the two processes, and run the job in the folder that the command line names."""
    import torch

    folder = Path(sys.argv[1])
    parent, child = os.getpid(), os.fork()  # before any thread is started
    rank = 0 if child else 1
    processes.end_with_parent()
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), RANKS)
    wait = timedelta(seconds=WAITING)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=wait)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    code = 0
    with (folder / f"rank{rank}").open("w", encoding="utf-8") as stream:
        for number, (source, task) in enumerate(job["pairs"]):
            report = _report_or_failure(source, task, job["sharded"], rank)
            stream.write(json.dumps(report) + "\n")
            stream.flush()
            if "raised" in report:
                code = 1
                break
            store.add(f"done {number}", 1)
            while store.add(f"done {number}", 0) < RANKS:  # or a call left over would meet one of the next pair
                if os.waitpid(child, os.WNOHANG)[0] if child else os.getppid() != parent:
                    os._exit(1)
                time.sleep(0.001)
    if rank == 0 and not code:
        os.wait()
    os._exit(code)  # closing the connections ends the other rank's wait, too


def _report_or_failure(source: Mapping[str, str], task: Mapping[str, Any], sharded: bool, rank: int) -> dict[str, Any]:
    try:
        space: dict[str, Any] = {}
        exec(compile(source["source"], "<function>", "exec"), space)  # noqa: S102 - the learner's own function
        return _report(space[source["name"]], Task(**task), sharded, rank)
    except Exception as error:
        numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<function>"]
        line = source["source"].splitlines()[numbers[-1] - 1].strip() if numbers and numbers[-1] else ""
        return {"raised": [type(error).__name__, _explained(str(error)), line], "time": time.time()}


def _explained(message: str) -> str:
    if "Timed out" in message or "Connection closed" in message:
        return "the other rank made no matching call; both must call every collective operation, in the same order"
    return message


def _report(step: Callable[..., Any], task: Task, sharded: bool, rank: int) -> dict[str, Any]:
    """Train `task` with the function `step`, and return this rank's losses, weights, and bytes."""
    from minisft.course.experiments.observed import Observed

    model = task.model(0, rank)
    sizes = [layer.size for layer in model.layers]
    weights = [part.clone() for part in _padded(task.start(), sizes if sharded else [model.size])]
    if sharded:
        weights = [part.chunk(RANKS)[rank].clone() for part in weights]
    state: dict[str, Any] = {"step": 0, "averages": [{} for _ in sizes] if sharded else {}}
    losses = []
    for number in range(task.steps):
        model = task.model(number, rank)
        with Observed(model, weights, adamw) as observed:
            returned = step(weights if sharded else weights[0], state, observed.model, observed.adamw)
        if sharded and returned is None:
            raise ValueError("the step returned nothing: return the loss, which is what the last layer returned")
        losses.append(float(returned if sharded else model.loss))
    return {
        "losses": losses,
        "weights": [part.tolist() for part in weights],
        "sizes": sizes if sharded else [model.size],
        **observed.report(state),
    }


def _padded(weights: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut flat weights into parts of these sizes, each padded to a multiple of the number of ranks."""
    import torch

    return [torch.nn.functional.pad(part, (0, -len(part) % RANKS)) for part in weights.split(list(sizes))]


if __name__ == "__main__":
    main()
