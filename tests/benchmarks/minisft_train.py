"""minisft's side of `training_speed`: the worker's own trainer, on given rows in their order.

What `peer_train` prints, this prints; the run folder lies in a temporary place.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peer_train import Clock, sizes
from transformers import TrainerCallback
from worker import memory

from minisft.files import write_json
from minisft.labels.encode_row import Row
from minisft.run.config import RunConfig
from minisft.run.folder import Run
from minisft.system import cores
from minisft.training.batch_sampler import RankBatches
from minisft.training.build_trainer import make_trainer
from minisft.training.dataset import TEST_ROWS, TRAIN, write_rows
from minisft.training.heartbeat import Heartbeat
from minisft.training.preflight import resolve_precision

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


class InOrder(RankBatches):
    def global_batches(self) -> list[list[int]]:
        size = self.global_batch
        return [list(range(i, i + size)) for i in range(0, len(self.lengths), size)]


class Profiler(TrainerCallback):
    """The second step under PyTorch's profiler: seconds in matrix products, and their floating-point operations."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 1:
            self.profile = torch.profiler.profile(with_flops=True).__enter__()
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step != 2:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        self.profile.__exit__(None, None, None)
        products = [e for e in self.profile.key_averages() if e.key in PRODUCTS]
        on_gpu = torch.cuda.is_available()
        spent = sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in products) / 1e6
        self.found = {
            "profiled_seconds": seconds,
            "matmul_seconds": spent,
            "matmul_flops": sum(e.flops for e in products),
        }


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    accumulation = settings.get("accumulation", 1)
    config = RunConfig(
        name="benchmark",
        max_length=settings["max_length"],
        batch_size=settings["batch"] // accumulation,
        accumulation=accumulation,
        activation_checkpointing=settings["kind"] == "minisft-lean",
        max_steps=settings["steps"],
        precision=settings["precision"],
        eval_rows=0,
    )
    precision, on_gpu = resolve_precision(config.precision)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # TensorBoard may still be writing
        run = Run(Path(scratch))
        began = time.perf_counter()
        about = {"config": config.to_dict(), "model_folder": settings["model"], "precision": precision}
        write_json(run.folder / "run.json", about)
        (run.folder / "data").mkdir()
        write_rows([Row(r["id"], r["input_ids"], r["labels"]) for r in rows], run.folder / "data" / TRAIN)
        write_rows([], run.folder / "data" / TEST_ROWS)
        torch.set_num_threads(cores())
        trainer = make_trainer(run, rank=0, world=1, on_gpu=on_gpu, checkpoint=None, heartbeat=Heartbeat(run.folder, 0))
        trainer.batches.__class__ = InOrder
        trainer.args.save_strategy = "no"
        clock = Clock()
        trainer.add_callback(clock)
        profiler = Profiler()
        if settings.get("profile"):
            trainer.add_callback(profiler)
        ready = time.perf_counter()
        trainer.train()
    prepared = [sizes(row) for row in rows]
    steps = [prepared[i : i + settings["batch"]] for i in range(0, len(prepared), settings["batch"])]
    result = {
        "seconds": clock.seconds,
        "tokens": [sum(tokens for tokens, _ in step) for step in steps],
        "trained_tokens": [sum(trained for _, trained in step) for step in steps],
        "peak": torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM"),
        "start": ready - began,
        **profiler.found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
