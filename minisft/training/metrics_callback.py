"""Times every step and writes its metrics; stops the run if a loss or gradient is not finite."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from minisft.training.metrics_log import MetricsLogger
from minisft.zero.measured_memory import held_bytes

if TYPE_CHECKING:
    from minisft.training.trainer import RunTrainer

MOST_NAMED = 16  # row ids in an error


class MetricsCallback(TrainerCallback):
    """Writes a line of `metrics.jsonl` per optimizer step, gathered from all ranks.

    A step is timed from fetching its rows to the end of the optimizer's step; loading, saving and
    measuring do not count.
    """

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer
        self.logger: MetricsLogger | None = None
        self.step_seconds = 0.0
        self.seconds = 0.0  # time spent on recording

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.logger = MetricsLogger(self.trainer.run.folder, self.trainer.start, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.heartbeat.says("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.step_seconds = time.perf_counter() - self.trainer.step_began
        self.trainer.heartbeat.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            began = time.perf_counter()
            self._record(args, state, logs)
            self.seconds += time.perf_counter() - began

    def _record(self, args: Any, state: Any, logs: dict[str, float]) -> None:
        step, grad_norm, loss = state.global_step, logs.get("grad_norm"), logs["loss"]
        rows = [row for batch in self.trainer.rows for row in batch]
        # With fp16 an infinite gradient norm only lowers the loss scale; the step is skipped.
        overflow = grad_norm is not None and not math.isfinite(grad_norm) and not args.fp16
        bad_rows: list[str] = []
        if overflow or not math.isfinite(loss):
            batches = zip(self.trainer.rows, self.trainer.losses, strict=True)
            bad_rows = [row[0] for batch, loss in batches if not math.isfinite(loss.item()) for row in batch]
        recorded = {
            "tokens": sum(tokens for _, tokens, _ in rows),
            "trained_tokens": sum(trained for _, _, trained in rows),
            "bytes": held_bytes(args.device.type),
            "bad": bad_rows,
        }
        ranks = gather_object([recorded])
        if not math.isfinite(loss):
            bad_rows = [name for rank in ranks for name in rank["bad"]]
            raise FloatingPointError(f"the loss is {loss} at step {step}, in a batch of the rows {_first(bad_rows)}")
        if overflow:
            names = _first([row[0] for row in rows])
            raise FloatingPointError(f"the gradient norm is {grad_norm} at step {step}, in a batch of the rows {names}")
        if self.logger is None:
            return
        self.logger.write(
            {
                "step": step,
                "epoch": round(state.epoch, 4),
                "loss": loss,
                "lr": logs["learning_rate"],
                "grad_norm": grad_norm,
                "tokens": sum(rank["tokens"] for rank in ranks),
                "trained_tokens": sum(rank["trained_tokens"] for rank in ranks),
                "seconds": round(self.step_seconds, 4),
                "bytes": [rank["bytes"] for rank in ranks],
            }
        )


def _first(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
