"""How fast conversations become training rows: minisft, TRL and the bare Rust tokenizer, side by side.

    python tests/benchmarks/encoding_speed.py [--rows 2000|all] [--rounds 5] [--max-length 512 8192]

Everybody starts from the same cleaned ShareGPT conversations, in memory, with the SmolLM2 tokenizer; imports, reading
and loading are not timed. Speed is the tokens of the rows that are kept, after truncation, per second:

minisft         `encode_stream`, read to its end; and the same with the rows written as a run's training file
TRL             `SFTTrainer._prepare_dataset` with `assistant_only_loss=True` and minisft's template, in one process, in
                as many as there are cores, and streamed; the fastest of the three counts (see `trl_prepare`)
encode_batch    the bare Rust tokenizer on all cores, given only the text that ends up in the kept rows and taking
                nothing out of what it returns (see `minisft_encode`); it is credited with the kept rows' tokens

Each runs in a process of its own; in every round each has its turn of some seconds, in changing order, and medians
count. The rows of minisft and TRL are compared id by id and label by label. Peak memory is that of the largest
process; what a process had before it began is in it.

TRL is no dependency of minisft: it gets an environment of its own under `MINISFT_CACHE`, made at the first run with
torch at the version of requirements.lock (1.5 GB with a CPU build of torch, which is enough; pip's own settings,
such as PIP_EXTRA_INDEX_URL, decide which build comes). Needs Linux.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.download import find_data, find_model
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.errors import UserError
from minisft.files import cache_dir
from minisft.system import cores

HERE = Path(__file__).resolve().parent
LOCK = HERE.parents[1] / "launchers" / "requirements.lock"
TRL = "trl==1.16.*"
TARGETS = {"TRL": {512: 3.0, 8192: 1.3}, "encode_batch": {512: 0.9, 8192: 0.9}}
CORES = cores()
TURN = 3.0  # seconds that a turn lasts at least
WARM_UP = 20  # conversations that each worker prepares before it is timed


def main() -> None:
    options = _options()
    try:
        run(options.rows, options.rounds, options.max_length)
    except UserError as error:
        print(f"encoding_speed: {error}", file=sys.stderr)
        sys.exit(2)


def run(rows: int | None, rounds: int, max_lengths: list[int]) -> None:
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which this system does not have: run this on Linux")
    trl = trl_environment()
    asset = find_model()
    model = asset.path
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "conversations.jsonl"
        count = _write(itertools.islice(read(find_data().path, Ledger()), rows), data)
        print(f"{count:,} conversations of ShareGPT, tokenizer {asset.name}, {CORES} cores, {rounds} rounds")
        for max_length in max_lengths:
            measured = measure(model, data, max_length, rounds, trl, Path(scratch))
            print(f"\n{_table(max_length, measured)}\n{_verdict(max_length, measured)}")
            print(_same_rows(model, data, Path(scratch)), flush=True)


def _options() -> argparse.Namespace:
    def rows(text: str) -> int | None:
        return None if text == "all" else _at_least(1)(text)

    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="How it is measured stands at the top of the file."
    )
    parser.add_argument("--rows", type=rows, default=2000, help="the first conversations, or all (default: 2000)")
    parser.add_argument("--rounds", type=_at_least(1), default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--max-length", type=_at_least(2), nargs="+", default=[512, 8192], help="tokens in a row")
    return parser.parse_args()


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


def _write(conversations: Any, file: Path) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as stream:
        for count, conversation in enumerate(conversations, 1):  # noqa: B007
            messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
            stream.write(json.dumps({"id": conversation.id, "messages": messages}) + "\n")
    return count


# --- TRL's environment -------------------------------------------------------------------------------------


def trl_environment() -> Path:
    """The Python of TRL's environment, which is made where it is missing or made for other versions."""
    from filelock import FileLock

    pins = dict(line.split("==") for line in LOCK.read_text().splitlines() if "==" in line and line[0] != "#")
    shared = [f"{name}=={pins[name]}" for name in ("transformers", "tokenizers", "datasets", "accelerate", "numpy")]
    steps = [[f"torch=={pins['torch']}"], [TRL, *shared]]  # torch alone and first: nothing else may choose it
    made_for = json.dumps([sys.version, steps])
    folder = cache_dir() / "benchmarks" / "trl"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder.parent} ({error.strerror}): set MINISFT_CACHE") from error
    stamp, python = folder / "made-for.json", folder / "bin" / "python"
    with FileLock(folder.parent / ".trl.lock"):
        if not (stamp.is_file() and stamp.read_text() == made_for):
            print(f"making an environment for TRL in {folder} (some minutes, once)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _do([sys.executable, "-m", "venv", str(folder)], "make TRL's environment")
            for requirements in steps:
                pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
                _do([*pip, *requirements], f"install {' '.join(requirements)}")
            stamp.write_text(made_for)
    return python


def _do(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        reason = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1])
        raise UserError(f"could not {what} ({reason}): check the network, the disk and pip's settings")


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process that prepares the data in one way, each time it is asked."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    loaded: int = 0
    speeds: list[float] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        return median(self.speeds)

    def send(self, request: dict[str, Any]) -> None:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError as error:
            raise UserError(f"{self.name} ended before its time: {self._last_words()}") from error

    def reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} ended before its time: {self._last_words()}")
        found = json.loads(line)
        if "error" in found:
            raise UserError(f"{self.name} failed: {found['error']}")
        return found

    def turn(self, keep: Path | None) -> None:
        """Prepare the data once, and again until the turn has lasted long enough to even out what else happens."""
        spent = 0.0
        while spent < TURN:
            self.send({"keep": str(keep) if keep else None})
            self.found = self.reply()
            self.speeds.append(self.found["tokens"] / self.found["seconds"])
            spent += self.found["seconds"]

    def _last_words(self) -> str:
        return (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def measure(model: Path, data: Path, max_length: int, rounds: int, trl: Path, scratch: Path) -> dict[str, Worker]:
    """A worker for each way, with its speeds; two of them leave their rows in `scratch`."""
    ours, theirs = (sys.executable, "minisft_encode.py"), (str(trl), "trl_prepare.py")
    ways: dict[str, tuple[tuple[str, str], str | int]] = {
        "minisft": (ours, "stream"),
        "minisft, to a file": (ours, "arrow"),
        "TRL, 1 process": (theirs, 1),
        f"TRL, {CORES} processes": (theirs, CORES),
        "TRL, streamed": (theirs, "streamed"),
        "encode_batch": (ours, "encode_batch"),
        "encode_batch_fast": (ours, "encode_batch_fast"),
    }
    keeps = {"minisft, to a file": scratch / "minisft.arrow", "TRL, 1 process": scratch / "trl.parquet"}
    settings = {"model": str(model), "data": str(data), "max_length": max_length, "warm_up": WARM_UP}
    with ExitStack() as stack:
        workers = {}
        for name, ((python, script), way) in ways.items():
            if name in workers:  # one core: once is enough
                continue
            worker = workers[name] = _start(name, python, script, scratch, stack)
            worker.send(settings | {"way": way})
            worker.loaded = worker.reply()["loaded"]  # one at a time: loading must not slow a neighbour's warm-up
        for number in range(rounds):
            order = list(workers.values())
            first = number % len(order)
            for worker in order[first:] + order[:first]:
                worker.turn(keeps.get(worker.name) if number == 0 else None)
        return workers


def _start(name: str, python: str, script: str, scratch: Path, stack: ExitStack) -> Worker:
    leave_out = ("TOKENIZERS_PARALLELISM", "PYTHONPATH", "RAYON_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in leave_out} | {"HF_HUB_OFFLINE": "1"}
    log = scratch / f"{name}.log"
    stderr = stack.enter_context(log.open("w"))
    process = subprocess.Popen(
        [python, str(HERE / script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        text=True,
    )
    stack.enter_context(process)
    stack.callback(process.terminate)
    return Worker(name, process, log)


# --- reporting ---------------------------------------------------------------------------------------------


def _table(max_length: int, workers: dict[str, Worker]) -> str:
    head = ("", "tokens/s", "lowest to highest", "seconds", "rows", "tokens", "peak MB", "over loaded")
    lines = [head]
    for name, worker in workers.items():
        found = worker.found
        lines.append(
            (
                name,
                f"{worker.speed:,.0f}",
                f"{min(worker.speeds):,.0f} to {max(worker.speeds):,.0f}",
                f"{found['tokens'] / worker.speed:.2f}",
                f"{found['rows']:,}",
                f"{found['tokens']:,}",
                f"{found['peak'] / 1e6:,.0f}",
                f"{max(0, found['peak'] - worker.loaded) / 1e6:+,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = []
    for name, *numbers in lines:
        cells = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        rows.append("  ".join([name.ljust(widths[0]), *cells]))
    rows.insert(1, "-" * len(rows[0]))
    return "\n".join([f"max length {max_length:,}", *rows])


def _verdict(max_length: int, workers: dict[str, Worker]) -> str:
    best = max((w for name, w in workers.items() if name.startswith("TRL")), key=lambda w: w.speed)
    lines = []
    for ours, (other, target) in itertools.product(
        ("minisft", "minisft, to a file"), ((best, "TRL"), (workers["encode_batch"], "encode_batch"))
    ):
        ratio = workers[ours].speed / other.speed
        wanted = TARGETS[target].get(max_length) if ours == "minisft" else None
        verdict = "" if wanted is None else f"  (target {wanted}: {'met' if ratio >= wanted else 'missed'})"
        lines.append(f"{ours} / {other.name}: {ratio:.2f}{verdict}")
    return "\n".join(lines)


def _same_rows(model: Path, data: Path, scratch: Path) -> str:
    """How many rows of minisft and TRL are the same, and what is the matter with the others."""
    import numpy
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(str(scratch / "minisft.arrow")) as stream:
        ours = _by_id(pyarrow.ipc.open_stream(stream).read_all())
    theirs = _by_id(pyarrow.parquet.read_table(scratch / "trl.parquet"))
    tokenizer = HuggingFaceTokenizer(model)
    control = [tokenizer.decode([token_id]) for token_id in tokenizer.control_ids]
    counts: Counter[str] = Counter()
    unexplained = []
    with data.open(encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            a, b = ours.get(row["id"]), theirs.get(row["id"])
            if a is None and b is None:
                continue
            counts["rows"] += 1
            same_ids = a is not None and b is not None and numpy.array_equal(a[0], b[0])
            same_labels = same_ids and numpy.array_equal(a[1], b[1])
            counts["ids"] += same_ids
            counts["labels"] += same_labels
            if same_labels:
                continue
            if any(name in m["content"] for m in row["messages"] for name in control):
                counts["control"] += 1
            else:
                unexplained.append(row["id"])
    told = [f"of {counts['rows']:,} rows of minisft or TRL, {counts['ids']:,} have the same ids in both"]
    told.append(f"and {counts['labels']:,} the same ids and the same trained tokens")
    if counts["control"]:
        told.append(f"{counts['control']:,} differ: they contain a control token's text, which TRL makes that token")
    if unexplained:
        told.append(f"{len(unexplained):,} differ for another reason, such as {', '.join(unexplained[:3])}")
    return "; ".join(told)


def _by_id(table: Any) -> dict[str, tuple[Any, Any]]:
    columns = [table["id"].to_pylist()]
    for name in ("input_ids", "labels"):
        lists = table[name].combine_chunks()
        values, ends = lists.flatten().to_numpy(), lists.offsets.to_numpy()
        columns.append([values[a - ends[0] : b - ends[0]] for a, b in itertools.pairwise(ends)])
    return {row_id: (ids, labels) for row_id, ids, labels in zip(*columns, strict=True)}


if __name__ == "__main__":
    main()
