"""Many small live engines, one after the other, in one launch: what each rank of each holds, as one JSON file.

    torchrun --nproc_per_node W tests/zero_engines.py OUT.json '[{"stage": 0, "precision": "fp32", …}, …]'

The worker of `test_state_memory`. Every engine trains a tiny Llama two steps with AdamW and is measured in the second,
after backward and after the step; what its ranks tell each other in that step is counted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from minisft.zero.communication import Counter
from minisft.zero.measured_memory import measure

TOKENS = 7


def tiny(tied: bool) -> LlamaConfig:
    """Odd sizes, so that padding and parameters over a border are the rule."""
    return LlamaConfig(
        vocab_size=97,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
    )


def groups_of(model: Any, two: bool) -> list[dict[str, Any]]:
    if not two:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]


def engine_bytes(settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    import deepspeed

    accumulation = settings["deepspeed"]["gradient_accumulation_steps"]
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings["deepspeed"], enabled=settings["stage"] == 3):
        model = LlamaForCausalLM(tiny(settings["tied"]))
    optimizer = torch.optim.AdamW(groups_of(model, settings["two_groups"]), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings["deepspeed"])
    ids = torch.randint(5, 97, (1, TOKENS))
    found = {}
    counter = Counter()
    for micro_step in range(2 * accumulation):
        if micro_step == accumulation:
            counter.start()
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        del loss
        if micro_step == 2 * accumulation - 1:
            found["after backward"] = measure(engine.module, engine.optimizer, "cpu")
        engine.step()
    found["communication"] = counter.stop()
    gc.collect()
    found["at rest"] = measure(engine.module, engine.optimizer, "cpu")
    engine.destroy()
    return found


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gc.freeze()  # what was imported is no tensor of an engine, and need not be looked through again and again
    results = []
    for settings in cases:
        mine = engine_bytes(settings)
        gc.collect()
        ranks: list[Any] = [None] * world
        torch.distributed.all_gather_object(ranks, mine)
        results.append(ranks)
    if rank == 0:
        out.write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)  # tearing down the threads of a process group now and then aborts the process


if __name__ == "__main__":
    main()
