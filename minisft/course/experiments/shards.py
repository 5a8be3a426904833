"""Print which part of a small model each of two real processes owns.

    python -m torch.distributed.run --standalone --nproc_per_node 2 --module minisft.course.experiments.shards --stage 1

The partition is read from a live DeepSpeed engine at stage 1, 2 or 3 on a tiny Llama; no file is
written. With `--set`, one engine per JSON object, with those keys of `zero_optimization` changed,
trains two steps and prints the bytes that rank 0 holds: between steps by owner, and at the peak of
a step.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from minisft.launch import cpu_comm_op
from minisft.system import skip_accelerator_search
from minisft.text import say


def main() -> None:
    """Run on every rank; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--set", nargs="+", metavar="JSON", help="e.g. {} '{\"reduce_bucket_size\": 500000}'")
    options = parser.parse_args()
    work_on_ranks(lambda rank, ranks: (_switch if options.set else _show_owners)(options, rank, ranks))


def work_on_ranks(work: Callable[[int, int], None]) -> None:
    """Join the other ranks of this command, call `work` with rank and number of ranks, and end the process."""
    skip_accelerator_search()
    cpu_comm_op.use_own_folder()
    import deepspeed
    import torch

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed()
    work(torch.distributed.get_rank(), torch.distributed.get_world_size())
    torch.distributed.barrier()
    os._exit(0)  # skip teardown: destroying a process group's threads sometimes aborts the process


def _switch(options: argparse.Namespace, rank: int, ranks: int) -> None:
    for number, text in enumerate(options.set):
        held = switched(options.stage, ranks, json.loads(text))
        if rank == 0:
            if number == 0:
                say(f"{'bytes':<8}" + "".join(f"{name:>12}" for name in held))
            settings = [f"{key.removeprefix('stage3_')} = {value}" for key, value in json.loads(text).items()]
            say(", ".join(settings) or "minisft's defaults")
            say(f"{'':<8}" + "".join(f"{size:>12,}" for size in held.values()))


def _show_owners(options: argparse.Namespace, rank: int, ranks: int) -> None:
    import torch

    lines_by_rank: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(lines_by_rank, owned(options.stage, ranks))
    if rank == 0:
        for other, lines in enumerate(lines_by_rank):
            say("\n".join([f"rank {other} owns", *(f"  {line}" for line in lines)]))


def tiny_config() -> Any:
    """Return the config of a Llama with 4,000 parameters, sized so that partition borders fall
    inside tensors.
    """
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
    model: Any = None,
    **settings: Any,
) -> Any:
    """Build a DeepSpeed engine in fp32, on every rank, of `model` or else of the tiny Llama.

    `changes` override keys of `zero_optimization`, `settings` override top-level keys.
    `optimizer_of` makes the model's optimizer; the default is AdamW with one param group.
    """
    import deepspeed
    import torch
    from transformers import LlamaForCausalLM

    from minisft.zero.parameter_shapes import Shapes
    from minisft.zero.state_memory import generated_config

    config = tiny_config()
    shapes = Shapes.of_model(model) if model else Shapes.of_config(config)
    settings = generated_config(shapes, f"zero{stage}", ranks, "fp32") | settings
    settings["zero_optimization"] |= changes or {}
    if model is None:
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
            model = LlamaForCausalLM(config)
    optimizer = optimizer_of(model) if optimizer_of else torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def switched(stage: int, ranks: int, changes: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that an engine with `changes` holds on this rank between steps, and what a
    step's peak adds.
    """
    import torch

    from minisft.zero.measured_memory import live_tensors, measure
    from minisft.zero.tensor_tracker import TensorTracker

    engine = live_engine(stage, ranks, changes)
    ids = torch.arange(24).view(1, -1)
    tracker = TensorTracker()
    for step in range(2):
        if step:
            for tensor in live_tensors():
                tracker.see(tensor, "before")
            base = tracker.peak.total
            tracker.__enter__()
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
    tracker.__exit__(None, None, None)
    gc.collect()
    held = measure(engine.module, engine.optimizer, "cpu")
    engine.destroy()
    states = sum(size for owner, size in held.items() if owner != "other tensors")
    columns = {"buckets": held["buckets"], "persistent": held["persistent parameters"]}
    return columns | {"all states": states, "step adds": tracker.peak.total - base}


def owned(stage: int, ranks: int) -> list[str]:
    """Return one line per tensor of which this rank owns a part: its name and its first-last
    element, from 0.
    """
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
    lines, offset = [], 0  # offset: where the tensor starts in the flat group
    for name, p in named:
        first, last = max(begin - offset, 0), min(end - offset, p.numel())
        if first < last:
            part = "all" if (first, last) == (0, p.numel()) else f"{first}-{last - 1}"
            lines.append(f"{name:<46} {part:>9} of {p.numel()}")
        offset += p.numel()
    if end > offset:
        lines.append(f"{'(padding)':<46} {end - max(offset, begin):>9}")
    return lines


def _slice_of_tensor(name: str, parameter: Any, rank: int) -> str:
    size = parameter.ds_tensor.ds_numel
    first, last = rank * size, min((rank + 1) * size, parameter.ds_numel)
    return f"{name:<46} {f'{first}-{last - 1}':>9} of {parameter.ds_numel}"


if __name__ == "__main__":
    main()
