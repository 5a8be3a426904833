"""Compares runs by loss, speed, memory and communication, in rows, tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from minisft.run.folder import Run, checkpoint_step
from minisft.text import in_gigabytes, one_line
from minisft.training.dataset import training_rows_digest
from minisft.training.metrics_log import speed
from minisft.zero.communication import bytes_sent
from minisft.zero.measured_memory import OTHER
from minisft.zero.state_memory import MOMENTS

if TYPE_CHECKING:
    import pandas

NEAR = 0.05  # relative difference below which two speeds count as equal: repeating a run varies by as much


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row per run: first and last loss, tokens per second, bytes per rank."""
    rows = []
    for run in runs:
        metrics, memory = run.metrics, run.memory
        rows.append(
            {
                "run": run.name,
                "status": run.status,
                "ranks": run.config.ranks,
                "precision": run.precision,
                "steps": len(metrics),
                "first_loss": metrics[0]["loss"] if metrics else None,
                "last_loss": metrics[-1]["loss"] if metrics else None,
                **speed(metrics),
                "model_state_bytes": max((model_states(rank) for rank in memory), default=None),
                "peak_bytes": max((rank.get("peak") or 0 for rank in memory), default=None),
                "sent_bytes": bytes_sent(memory[0].get("communication", {}), run.config.ranks) if memory else None,
            }
        )
    return rows


def comparison_frames(runs: Sequence[Run]) -> dict[str, pandas.DataFrame]:
    """Return all that the runs recorded, as tidy tables with one observation per row, `run` first.

    metrics        a row per step: step, epoch, loss, lr, grad_norm, tokens, trained_tokens,
                   seconds, warm_up, and `bytes`, the most memory that a rank held
    memory         a row per rank, moment (`at rest`, `after backward`) and owner: bytes
    communication  a row per rank and operation: the bytes of one step
    checkpoints    a row per checkpoint: step, test_loss, bytes, best, folder
    logs           a row per log file: log (its name), lines (how many), and last (the last line)
    """
    import pandas

    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("metrics", "memory", "communication", "checkpoints", "logs")
    }
    for run in runs:
        name = {"run": run.name}
        tables["metrics"] += [name | line | {"bytes": max(line.get("bytes", [0]))} for line in run.metrics]
        for rank in run.memory:
            rank_key = name | {"rank": rank["rank"]}
            for moment in MOMENTS:
                for owner, size in rank.get(moment, {}).items():
                    tables["memory"].append(rank_key | {"moment": moment, "owner": owner, "bytes": size})
            for operation, size in rank.get("communication", {}).items():
                tables["communication"].append(rank_key | {"operation": operation, "bytes": size})
        losses, best = run.test_losses, run.best_checkpoint
        for folder in run.checkpoints:
            step = checkpoint_step(folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            checkpoint = {"step": step, "test_loss": losses.get(step), "bytes": size, "best": folder == best}
            tables["checkpoints"].append(name | checkpoint | {"folder": str(folder)})
        for file in sorted((run.folder / "logs").glob("*.log")):
            lines = file.read_text(errors="replace").splitlines()
            tables["logs"].append(name | {"log": file.name, "lines": len(lines), "last": lines[-1] if lines else ""})
    return {name: pandas.DataFrame(lines) for name, lines in tables.items()}


def verdict(runs: Sequence[Run]) -> str:
    """Say which run was fastest, which held the least state memory, and what limits the comparison.

    Returns "" if fewer than two runs have a speed and measured memory.
    """
    rows = [row | {"run": one_line(row["run"])} for row in summary_rows(runs)]
    rows = [row for row in rows if row["tokens_per_second"] and row["model_state_bytes"]]
    if len(rows) < 2:
        return ""
    most = max(row["tokens_per_second"] for row in rows)
    least = min(row["tokens_per_second"] for row in rows)
    fastest = fastest_runs(runs)
    states = {row["run"]: row["model_state_bytes"] for row in rows}
    heaviest = max(states, key=states.__getitem__)
    share = min(states.values()) / states[heaviest]
    speeds = (
        f"Fastest here: {join_names(fastest)}, with {most:,.0f} tokens/s; the slowest made {least / most:.0%} of that."
    )
    if len(fastest) == len(rows):
        speeds = "No run is measurably faster than the others: the speeds of their steps overlap."
    sentences = [
        speeds,
        "Each was measured once, so another try may change the order.",
        f"Leanest: {join_names(least_state_memory(rows))}, with {share:.0%} of {heaviest}'s states per rank.",
    ]
    if any(run.on_gpu for run in runs):
        sentences.append("With other GPUs, or over a network, communication takes a different share of each step.")
    else:
        ranks = max(row["ranks"] for row in rows)
        sentences.append(
            f"This holds for this machine only: up to {ranks} ranks share its cores, so more ranks compute no faster, "
            "and they communicate through its main memory. On GPUs each rank brings its own compute and memory, and "
            "the links between the GPUs decide."
        )
    return " ".join(sentences)


def step_speeds(run: Run) -> list[float]:
    """Return the tokens per second of each step after the warm-up."""
    return [m["tokens"] / m["seconds"] for m in run.metrics if not m["warm_up"] and m["seconds"] > 0]


def speed_quartiles(run: Run) -> tuple[float, float, float] | None:
    """Return the quartiles of `step_speeds`; half of the steps lie between the first and the last.

    None if fewer than two steps were measured.
    """
    speeds = step_speeds(run)
    if len(speeds) < 2:
        return None
    low, middle, high = quantiles(speeds, n=4, method="inclusive")
    return low, middle, high


def fastest_runs(runs: Sequence[Run]) -> list[str]:
    """Return the fastest run, and those that cannot be told from it, by name.

    A run cannot be told from the fastest if their speeds differ by less than `NEAR`, or if the
    quartiles of their steps overlap.
    """
    speeds = {one_line(run.name): (speed(run.metrics)["tokens_per_second"] or 0, speed_quartiles(run)) for run in runs}
    most, best = max(speeds.values(), key=lambda one: one[0])
    return [
        name
        for name, (rate, quartiles) in speeds.items()
        if rate and (rate > (1 - NEAR) * most or (quartiles and best and quartiles[2] >= best[0]))
    ]


def data_difference(runs: Sequence[Run]) -> str:
    """Say which runs have different training rows, whose losses do not compare; "" if all have the same.

    Runs of earlier versions recorded no checksum of their rows, and are left out.
    """
    names: dict[str, list[str]] = {}
    for run in runs:
        if digest := training_rows_digest(run.folder):
            names.setdefault(digest, []).append(one_line(run.name))
    if len(names) < 2:
        return ""
    groups = "; ".join(map(join_names, names.values()))
    return f"These runs were not made from the same training rows, so do not compare their losses: {groups}."


def least_state_memory(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the runs with the least model-state memory per rank, and those within 1% of it."""
    states = {row["run"]: row["model_state_bytes"] for row in rows if row["model_state_bytes"]}
    return [name for name, size in states.items() if size < 1.01 * min(states.values())]


def join_names(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def model_states(rank: dict[str, Any]) -> int:
    """Return the bytes that one rank, an entry of `memory.json`, holds between two steps.

    Only model states count: batches and other tensors without an owner are left out.
    """
    return sum(held for owner, held in rank.get("at rest", {}).items() if owner != OTHER)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `summary_rows` as a plain-text table."""
    if not rows:
        return "no runs yet: train one with ./launchers/run_zero.sh vanilla"
    lines = [
        f"{'run':<14} {'status':<10} {'ranks':>5} {'steps':>5} {'first loss':>10} {'last loss':>10} {'tokens/s':>9} "
        f"{'states/rank':>12} {'peak/rank':>10} {'sent/step':>10}"
    ]
    for row in rows:
        lines.append(
            f"{one_line(row['run']):<14} {row['status']:<10} {row['ranks']:>5} {row['steps']:>5} "
            f"{_number(row['first_loss'], '.4f'):>10} {_number(row['last_loss'], '.4f'):>10} "
            f"{_number(row['tokens_per_second'], ',.0f'):>9} {in_gigabytes(row['model_state_bytes']):>12} "
            f"{in_gigabytes(row['peak_bytes']):>10} {in_gigabytes(row['sent_bytes']):>10}"
        )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form if abs(value) < 1e12 else ".3g")
