"""What DeepSpeed does with each of many configurations: an engine of one layer, and one step of it on the CPU.

    python tests/lint_engines.py OUT.json '[{"zero_optimization": {"stage": 2}, …}, …]'

The worker of `test_lint_config`. Writes a JSON list: for each configuration `{"refused": why}`, or what the engine
made of it. The kernels, which would have to be compiled, are left out.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import torch
from torch.distributed import HashStore

from minisft.zero.lint_deepspeed import without_kernels

GIVEN = ("_param_dict", "optimizer_params")  # what was written, whether or not it is read


def outcome(config: dict[str, Any]) -> dict[str, str]:
    import deepspeed

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    # As Trainer does: its own optimizer, unless the configuration has one.
    own = None if "optimizer" in config else torch.optim.AdamW(model.parameters())
    parameters = model.parameters() if own is None else None
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=own, model_parameters=parameters, config=deepcopy(config)
        )
        dtype = next(engine.parameters()).dtype
        engine.backward(engine(torch.ones(1, 4, dtype=dtype)).sum())
        engine.step()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    parsed = {name: value for name, value in vars(engine._config).items() if name not in GIVEN}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    made = {"groups": repr(groups), "scheduler": type(engine.lr_scheduler).__name__}
    for name, value in parsed.items():
        made[name] = repr(vars(value) if hasattr(value, "__dict__") else value)
    engine.destroy()
    return made


def main() -> None:
    import deepspeed

    torch.set_num_threads(1)
    with without_kernels():
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed("gloo")
        gc.freeze()
        found = [outcome(config) for config in json.loads(sys.argv[2])]
    Path(sys.argv[1]).write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
