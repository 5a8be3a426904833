"""Train the character model of notebook 07 with live DeepSpeed engines at stages 1, 2 and 3.

    live_stages(task)[2]["weights"]      # after the last step at stage 2

Two processes train the same rows as the functions that learners write (`two_ranks`), with
PyTorch's AdamW inside DeepSpeed. Clipping is off: a norm is a sum, and its last bit depends on
how the gradients are cut.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisft import processes
from minisft.course.experiments.by_hand import CONTEXT, RANKS, Task, character_model, pytorch_adamw
from minisft.course.experiments.shards import live_engine, work_on_ranks
from minisft.files import read_text

STAGES = (1, 2, 3)


def live_stages(task: Task) -> dict[int, dict[str, Any]]:
    """Return, by stage, what live engines compute: losses [step][rank], flat weights, bytes by owner [rank].

    Raises `RuntimeError` if a process fails.
    """
    return _live_stages(json.dumps(asdict(task)))


@functools.cache
def _live_stages(task: str) -> dict[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task.json").write_text(task, encoding="utf-8")
        command = processes.python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS))
        command += ["--module", "minisft.course.experiments.live_stages", name]
        # A first run may have to compile an operator.
        done = processes.run(command, {"OMP_NUM_THREADS": "1"}, timeout=600)
        if done.returncode:
            raise RuntimeError(f"the DeepSpeed engines ended with {done.returncode}:\n{done.stderr[-2000:]}")
        reports = json.loads(read_text(folder / "reports.json") or "")
    return {stage: reports[str(stage)] for stage in STAGES}


def _work(folder: Path, rank: int, ranks: int) -> None:
    task = Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))
    reports = {stage: _trained(stage, task, rank, ranks) for stage in STAGES}
    if rank == 0:
        (folder / "reports.json").write_text(json.dumps(reports), encoding="utf-8")


def _trained(stage: int, task: Task, rank: int, ranks: int) -> dict[str, Any]:
    """Train `task` at one stage; the report is the same on all ranks."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param
    from torch.nn.functional import cross_entropy

    from minisft.zero.measured_memory import measure

    changes = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    engine = live_engine(
        stage, ranks, changes, lambda m: pytorch_adamw(m.parameters()), character_model(), gradient_clipping=0.0
    )
    losses, held = [], {}
    for step in range(task.steps):
        rows = torch.tensor(task.data[step][rank])
        loss = cross_entropy(engine(rows[:, :CONTEXT]), rows[:, CONTEXT])
        engine.backward(loss)
        if step == task.steps - 1:  # AdamW's averages exist by now
            held = measure(engine.module, engine.optimizer, "cpu")
        engine.step()
        losses.append(loss.item())
    weights = torch.cat([safe_get_full_fp32_param(p).flatten() for p in engine.module.parameters()])
    reports: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(reports, (losses, held))
    engine.destroy()
    by_step = [list(pair) for pair in zip(*(losses for losses, _ in reports), strict=True)]
    return {"losses": by_step, "weights": weights.tolist(), "bytes": [held for _, held in reports]}


if __name__ == "__main__":
    processes.end_with_parent()  # the launcher gives its ranks sessions of their own
    work_on_ranks(functools.partial(_work, Path(sys.argv[1])))
