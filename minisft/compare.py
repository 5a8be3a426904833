"""Several runs side by side: losses, speed, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisft.observe import speed
from minisft.runs import Run
from minisft.zero_measure import OTHER


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run: first and last loss, median tokens per second after warm-up, bytes per rank."""
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
                "peak_bytes": max((rank["peak"] for rank in memory), default=None),
            }
        )
    return rows


def model_states(rank: dict[str, Any]) -> int:
    """Bytes that one rank, an entry of `memory.json`, holds between two steps, but for batches and the like."""
    return sum(held for owner, held in rank["at rest"].items() if owner != OTHER)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as plain text."""
    if not rows:
        return "no runs yet: train one with ./launchers/run_zero.sh vanilla"
    lines = [
        f"{'run':<14} {'status':<10} {'ranks':>5} {'steps':>5} {'first loss':>10} {'last loss':>10} {'tokens/s':>9} "
        f"{'states/rank':>12} {'peak/rank':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row['run']:<14} {row['status']:<10} {row['ranks']:>5} {row['steps']:>5} "
            f"{_number(row['first_loss'], '.4f'):>10} {_number(row['last_loss'], '.4f'):>10} "
            f"{_number(row['tokens_per_second'], ',.0f'):>9} {_size(row['model_state_bytes']):>12} "
            f"{_size(row['peak_bytes']):>10}"
        )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"
