"""The gradients of a run's first step, through the worker's own trainer; run under torchrun for several ranks.

python tests/gradients.py RUN_FOLDER… : writes RUN_FOLDER/gradients.safetensors of each
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from minisft.run.folder import Run
from minisft.training.build_trainer import make_trainer
from minisft.training.heartbeat import Heartbeat


class _Stop(Exception):
    pass


class _Take(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model

    def on_pre_optimizer_step(self, *arguments, **kwargs):
        raise _Stop


def first_gradients(run: Run, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """What the optimizer would get in the first step: of the whole global batch, before clipping changes it."""
    trainer = make_trainer(run, rank, world, on_gpu=False, checkpoint=None, heartbeat=Heartbeat(run.folder, rank))
    taken = _Take()
    trainer.add_callback(taken)
    trainer._clip_grad_norm = lambda model: torch.tensor(0.0)
    try:
        trainer.train()
    except _Stop:
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    raise AssertionError("no step was taken")


if __name__ == "__main__":
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    for folder in map(Path, sys.argv[1:]):
        found = first_gradients(Run(folder), rank, world)
        if rank == 0:
            save_file(found, folder / "gradients.safetensors")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
