"""How fast and how lean training is: minisft against what people would use instead, in alternating runs.

    python tests/benchmarks/training_speed.py [--rounds 3] [--max-length 512] [--batch 8] [--precision bf16]
        [--kinds minisft minisft-lean trl trl-plain hf original] [--steps 1] [--give-up 300]

Every run is a process of its own that trains SmolLM2-135M on the same real rows of ShareGPT, in the same order, with
the same batch per step, maximum length, precision, learning rate and AdamW. The first step, on short rows, is warm-up:
it allocates the optimizer's states and fills caches, and does not count. In every round each kind has one run, in
changing order; medians count, and the spread is printed. Ratios are taken round by round.

minisft        as it is: padding-free rows, loss at the trained positions alone
minisft-lean   the same batch as micro-batches of one row, and activations computed again in the backward pass
trl            TRL's SFTTrainer, assistant-only loss, its own defaults (activation checkpointing is one)
trl-plain      the same without activation checkpointing
hf             the plain Trainer: padded batches, full logits
original       the recipe of the original work: every row padded to 2048, full logits, and as many rows at once as fit.
               Every row costs the same there, so one such micro-batch is timed in place of the whole batch

Peak memory is that of the process up to the end of the last step (VmHWM), or what PyTorch allocated on the GPU.
With `--give-up`, a run whose timed step takes longer than so many seconds is ended: its speed is then below what is
printed, a ratio above, and its peak memory at least what it had held by then (marked with < and >; on a GPU it is
not known from outside, and a dash). One timed step only.

TRL's environment is made as `encoding_speed` makes it. Needs Linux; runs on CUDA unchanged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from encoding_speed import trl_environment

from minisft.chat.registry import template_for
from minisft.chat.tokenizers import load_tokenizer
from minisft.data.download import find_data, find_model
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.errors import UserError
from minisft.labels.encode_row import IGNORE_INDEX, encode

HERE = Path(__file__).resolve().parent
KINDS = ("minisft", "minisft-lean", "trl", "trl-plain", "hf", "original")
TARGETS = {"trl": 2.5, "hf": 1.3, "original": 6.0}  # times as many trained tokens per second, in bf16 at 512
MEMORY_TARGET = 0.4  # of TRL's peak
SHORT = 64  # tokens of a row of the warm-up step
ORIGINAL_ROW = 6e9  # bytes that one row padded to 2048 may take, its logits and their gradient in it: where to begin


def main() -> None:
    options = _options()
    try:
        run(options)
    except UserError as error:
        print(f"training_speed: {error}", file=sys.stderr)
        sys.exit(2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed steps of each run")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--give-up", type=float, help="seconds after which a timed step is not waited for")
    options = parser.parse_args()
    if options.give_up and options.steps > 1:
        parser.error("--give-up goes with one timed step")
    return options


def run(options: argparse.Namespace) -> None:
    model = find_model().path
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        tokens = write_rows(rows, options.batch, options.steps, options.max_length)
        print(
            f"{options.batch} rows per step, {tokens:,} tokens in {options.steps} timed step(s), max length "
            f"{options.max_length}, {options.precision}, {options.rounds} rounds",
            flush=True,
        )
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        at_once = min(options.batch, max(1, int((memory_free() - 4e9) / ORIGINAL_ROW)))
        for turn in range(options.rounds):
            order = options.kinds[turn % len(options.kinds) :] + options.kinds[: turn % len(options.kinds)]
            for kind in order:
                settings = {
                    **{key: getattr(options, key) for key in ("batch", "max_length", "precision")},
                    **{"kind": kind, "model": str(model), "rows": str(rows), "steps": 1 + options.steps},
                    "give_up": options.give_up,
                }
                if kind == "original":
                    result, at_once = measure_original(settings, at_once)
                else:
                    result = measure(kind, settings)
                found[kind].append(result)
                latest = found[kind][-1]
                below, above = ("<", ">") if latest["given_up"] else ("", "")
                peak = "-" if math.isnan(latest["peak"]) else f"{above}{latest['peak'] / 1e9:.2f} GB"
                print(
                    f"  round {turn + 1}: {kind:<13} {below + format(latest['trained'], ',.1f'):>9} trained tokens/s  "
                    f"{below + format(latest['tokens'], ',.1f'):>9} tokens/s  peak {peak}",
                    flush=True,
                )
        print(table(found))


def measure(kind: str, settings: dict[str, Any]) -> dict[str, float]:
    if kind == "minisft-lean":
        settings["accumulation"] = settings["batch"]
    python, script = sys.executable, "peer_train.py"
    if kind.startswith("trl"):
        python = str(trl_environment())
    elif kind.startswith("minisft"):
        script = "minisft_train.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(settings)], stdout=out, stderr=errors, env=environment
        )
        gave_up = wait(process, errors, settings["give_up"])
        for stream in (out, errors):
            stream.seek(0)
        said, failed = out.read(), errors.read()
    if gave_up is not None:
        rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()][settings["batch"] :]
        tokens = {"tokens": sum(len(row["input_ids"]) for row in rows), "trained": sum(map(trained, rows))}
        elapsed, peak = gave_up
        return {key: count / elapsed for key, count in tokens.items()} | {"peak": peak, "given_up": True}
    if process.returncode == -signal.SIGKILL or "out of memory" in failed or "can't allocate memory" in failed:
        raise MemoryError
    if process.returncode:
        last = (failed.strip() or "no message").splitlines()[-1]
        raise UserError(f"{kind} failed with exit code {process.returncode}: {last}")
    result = json.loads(said.splitlines()[-1])
    seconds = sum(result["seconds"][1:])
    return {
        "tokens": sum(result["tokens"][1:]) / seconds,
        "trained": sum(result["trained_tokens"][1:]) / seconds,
        "peak": result["peak"],
        "given_up": False,
    }


def wait(process: subprocess.Popen, errors: Any, give_up: float | None) -> tuple[float, float] | None:
    """Wait for a run's end; if its timed step takes `give_up` seconds, end it.

    Returns how long it took so far, and the most it held in main memory (nan if it is on a GPU).
    """
    warm_up_ended = None
    while process.poll() is None:
        time.sleep(0.2)
        if warm_up_ended is None:
            said = os.pread(errors.fileno(), 1 << 20, 0)
            warm_up_ended = time.monotonic() if b"ended step 1" in said else None
        elif give_up and (elapsed := time.monotonic() - warm_up_ended) > give_up:
            peak = most_resident(process.pid)
            process.kill()
            process.wait()
            return elapsed, peak
    return None


def most_resident(pid: int) -> float:
    """VmHWM of a living process, in bytes."""
    if torch.cuda.is_available():
        return math.nan
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure_original(settings: dict[str, Any], at_once: int) -> tuple[dict[str, float], int]:
    """One micro-batch of the original recipe, as large as fits: its result for the mean row, and its rows."""
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    short, real = rows[: settings["batch"]], rows[settings["batch"] :]
    file = Path(settings["rows"]).with_name("original.jsonl")
    while True:
        file.write_text("".join(json.dumps(row) + "\n" for row in short[:at_once] + real[:at_once]))
        try:
            result = measure("original", settings | {"rows": str(file), "batch": at_once, "steps": 2})
        except MemoryError:
            if at_once == 1:
                raise UserError("not even one row padded to 2048 fits: leave out the kind original") from None
            at_once //= 2
            continue
        # From the rows that it happened to take to the mean row of all, at the same seconds per row.
        for key, count in (("tokens", lambda r: len(r["input_ids"])), ("trained", trained)):
            result[key] *= sum(map(count, real)) / len(real) / (sum(map(count, real[:at_once])) / at_once)
        return result, at_once


def trained(row: dict[str, Any]) -> int:
    return sum(label != IGNORE_INDEX for label in row["labels"][1:])


def memory_free() -> float:
    """Bytes for one more process: of the GPU, or of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def write_rows(file: Path, batch: int, steps: int, max_length: int) -> int:
    """First a batch of short conversations, then `steps` batches of those as they come; returns the latter's tokens."""
    tokenizer = load_tokenizer("smollm2")
    template = template_for(tokenizer)
    short, real = [], []
    for conversation in itertools.islice(read(find_data().path, Ledger()), 6000):
        row = encode(conversation, template, tokenizer, max_length)
        if row is None:
            continue
        entry = {
            "id": conversation.id,
            "messages": [{"role": m.role, "content": m.content} for m in conversation.messages],
            "input_ids": row.input_ids,
            "labels": row.labels,
        }
        if len(row.input_ids) <= SHORT and len(short) < batch:
            short.append(entry)
        elif len(real) < batch * steps:
            real.append(entry)
        if len(short) == batch and len(real) == batch * steps:
            break
    file.write_text("".join(json.dumps(entry) + "\n" for entry in short + real))
    return sum(len(entry["input_ids"]) for entry in real)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"\n{'':<14}{'trained tokens/s':>24}{'tokens/s':>11}{'peak GB':>9}{'speed-up':>22}{'memory':>9}"]
    ours = found.get("minisft") or found.get("minisft-lean")
    for kind, runs in found.items():
        trained = [r["trained"] for r in runs]
        ratios = [a["trained"] / b["trained"] for a, b in zip(ours or runs, runs, strict=True)]
        peaks = [r["peak"] for r in runs if not math.isnan(r["peak"])]
        below, above = ("<", ">") if any(r["given_up"] for r in runs) else ("", "")
        spread = f"{below}{median(trained):,.1f} ({min(trained):,.1f}-{max(trained):,.1f})"
        times = f"{above}{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        peak, memory = "-", "-"
        if peaks:
            peak = f"{above}{median(peaks) / 1e9:.2f}"
            memory = f"{below}{median(r['peak'] for r in ours or runs) / median(peaks):.0%}"
        tokens = below + format(median(r["tokens"] for r in runs), ",.1f")
        lines.append(f"{kind:<14}{spread:>24}{tokens:>11}{peak:>9}{times:>22}{memory:>9}")
    lines.append("speed-up and memory: minisft against each, the median of the rounds' ratios (and their range)")
    for kind, target in TARGETS.items():
        if kind in found and ours:
            ratio = median(a["trained"] / b["trained"] for a, b in zip(ours, found[kind], strict=True))
            lines.append(f"{ratio:.2f}x of {kind}: {'at least' if ratio >= target else 'BELOW'} the {target}x aimed at")
    lean = found.get("minisft-lean") or ours
    peaks = [r["peak"] for r in found.get("trl", []) if not math.isnan(r["peak"])]
    if peaks and lean:
        share = median(r["peak"] for r in lean) / median(peaks)
        verdict = "within" if share <= MEMORY_TARGET else "ABOVE"
        lines.append(
            f"the leaner of ours takes {share:.0%} of trl's peak memory: {verdict} the {MEMORY_TARGET:.0%} aimed at"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
