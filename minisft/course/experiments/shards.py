"""Two real processes that say which part of a small model each of them owns.

    python -m torch.distributed.run --standalone --nproc_per_node 2 --module minisft.course.experiments.shards --stage 1

A live DeepSpeed engine at stage 1, 2 or 3 on a tiny Llama, asked rank by rank. Nothing is written. With `--set`, one
engine per JSON object, each with those keys of `zero_optimization` switched, trains two steps and says what rank 0
holds: between steps by owner, and at the worst moment of a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from minisft.text import say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--set", nargs="+", metavar="JSON", help="e.g. {} '{\"reduce_bucket_size\": 500000}'")
    options = parser.parse_args()
    stage = options.stage
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if options.set:
        for number, text in enumerate(options.set):
            held = switched(stage, ranks, json.loads(text))
            if rank == 0:
                lines = [_label(text), f"{'':<8}" + "".join(f"{size:>12,}" for size in held.values())]
                if number == 0:
                    lines.insert(0, f"{'bytes':<8}" + "".join(f"{name:>12}" for name in held))
                say("\n".join(lines))
        torch.distributed.barrier()
        os._exit(0)
    said: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(said, owned(stage, ranks))
    if rank == 0:
        for other, lines in enumerate(said):
            say("\n".join([f"rank {other} owns", *(f"  {line}" for line in lines)]))
    torch.distributed.barrier()
    os._exit(0)  # tearing down the threads of a process group now and then aborts the process


def _label(changes: str) -> str:
    said = [f"{key.removeprefix('stage3_')} = {value}" for key, value in json.loads(changes).items()]
    return ", ".join(said) or "as minisft sets it"


def tiny_config() -> Any:
    """A Llama of four thousand parameters with odd sizes, so that the cuts fall inside tensors."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=47,
        hidden_size=20,
        intermediate_size=26,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=32,
    )


def live_engine(
    stage: int,
    ranks: int,
    changes: Mapping[str, Any] | None = None,
    optimizer_of: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Any:
    """A DeepSpeed engine of the tiny model in fp32, `changes` in its `zero_optimization`, `settings` beside that.

    `optimizer_of` makes the model's optimizer; AdamW with one param group, if not given.
    """
    import deepspeed
    import torch
    from transformers import LlamaForCausalLM

    from minisft.zero.state_memory import Shapes, generated_config

    config = tiny_config()
    settings = generated_config(Shapes.of_config(config), f"zero{stage}", ranks, "fp32") | settings
    settings["zero_optimization"] |= changes or {}
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = LlamaForCausalLM(config)
    optimizer = optimizer_of(model) if optimizer_of else torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def switched(stage: int, ranks: int, changes: dict[str, Any]) -> dict[str, int]:
    """Bytes that a live engine with `changes` holds on this rank at rest, and what a step adds at its worst moment."""
    import torch

    from minisft.zero.measured_memory import live_tensors, measure
    from minisft.zero.tensor_tracker import TensorTracker

    engine = live_engine(stage, ranks, changes)
    ids = torch.arange(24).view(1, -1)
    following = TensorTracker()
    for step in range(2):
        if step:
            for tensor in live_tensors():
                following.see(tensor, "before")
            base = following.peak.total
            following.__enter__()
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    following.__exit__(None, None, None)
    gc.collect()
    held = measure(engine.module, engine.optimizer, "cpu")
    engine.destroy()
    states = sum(size for owner, size in held.items() if owner != "other tensors")
    some = {"buckets": held["buckets"], "persistent": held["persistent parameters"]}
    return some | {"all states": states, "step adds": following.peak.total - base}


def owned(stage: int, ranks: int) -> list[str]:
    """What this rank owns, a line per tensor: its name, and which of its elements, counted from 0."""
    import torch

    engine = live_engine(stage, ranks)
    model = engine.module
    rank = torch.distributed.get_rank()
    named = list(model.named_parameters())
    if stage == 3:
        return [_slice_of_tensor(name, p, rank) for name, p in named]
    zero = engine.optimizer
    # The flat fp32 master is this rank's slice of the group; its bounds come from the live partition.
    begin = rank * int(zero.partition_size[0])
    end = begin + zero.single_partition_of_fp32_groups[0].numel()
    lines, at = [], 0
    for name, p in named:
        first, last = max(begin - at, 0), min(end - at, p.numel())
        if first < last:
            part = "all" if (first, last) == (0, p.numel()) else f"{first}-{last - 1}"
            lines.append(f"{name:<46} {part:>9} of {p.numel()}")
        at += p.numel()
    if end > at:
        lines.append(f"{'(padding)':<46} {end - max(at, begin):>9}")
    return lines


def _slice_of_tensor(name: str, parameter: Any, rank: int) -> str:
    size = parameter.ds_tensor.ds_numel
    first, last = rank * size, min((rank + 1) * size, parameter.ds_numel)
    return f"{name:<46} {f'{first}-{last - 1}':>9} of {parameter.ds_numel}"


if __name__ == "__main__":
    main()
