"""The strategies, in one table, and the DeepSpeed configuration of each, every key with a reason.

To add a strategy, add a `Strategy` to `STRATEGIES`; nothing in the package parses a strategy's name. What DeepSpeed
needs to know about it is decided in `deepspeed_config`, and what it holds in memory in `state_memory`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minisft.errors import UserError


@dataclass(frozen=True)
class Strategy:
    """One way to train a model on one or several ranks.

    `stage` is the ZeRO stage (Rajbhandari et al. 2020), or None where DeepSpeed is not used. Offloaded states lie in
    main memory instead of the GPU's.
    """

    name: str
    launcher: Literal["python", "torchrun", "deepspeed"]
    stage: int | None = None
    offloads_optimizer: bool = False
    offloads_parameters: bool = False

    def __post_init__(self) -> None:
        if (self.offloads_optimizer and not self.stage) or (self.offloads_parameters and self.stage != 3):
            raise ValueError(f"{self.name}: an optimizer is offloaded at stage 1 to 3, parameters at stage 3 only")

    @property
    def is_one_process(self) -> bool:
        """Whether there is one rank only, without any communication."""
        return self.launcher == "python"

    @property
    def is_ddp(self) -> bool:
        """Whether PyTorch's DistributedDataParallel averages the gradients."""
        return self.launcher == "torchrun"

    @property
    def offloads(self) -> bool:
        """Whether any state is kept in main memory."""
        return self.offloads_optimizer or self.offloads_parameters

    @property
    def partitions(self) -> tuple[str, ...]:
        """What is split over the ranks; everything else is held whole by every rank."""
        return ("optimizer states", "gradients", "parameters")[: self.stage or 0]


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("vanilla", "python"),
        Strategy("ddp", "torchrun"),
        Strategy("zero0", "deepspeed", stage=0),
        Strategy("zero1", "deepspeed", stage=1),
        Strategy("zero2", "deepspeed", stage=2),
        Strategy("zero3", "deepspeed", stage=3),
        Strategy("zero2-offload", "deepspeed", stage=2, offloads_optimizer=True),
        Strategy("zero3-offload", "deepspeed", stage=3, offloads_optimizer=True, offloads_parameters=True),
    )
}

# DeepSpeed's defaults where a configuration is silent, in elements: buckets, and at stage 3 the tensors that are kept
# whole and the size of what is stepped at once.
DEFAULT_BUCKET = 500_000_000
DEFAULT_PERSISTENCE = 100_000
DEFAULT_SUB_GROUP = 1_000_000_000

# All numbers are explicit, not "auto": the file holds what runs, and Trainer checks that they agree.
REASONS = {
    "train_batch_size": "rows per optimizer step over all ranks: micro-batch x accumulation x ranks",
    "train_micro_batch_size_per_gpu": "rows that one rank puts through the model at once",
    "gradient_accumulation_steps": "micro-batches per optimizer step",
    "gradient_clipping": "the global gradient norm is scaled down to this",
    "fp16": "half-precision compute with dynamic loss scaling; masters stay fp32",
    "bf16": "bfloat16 compute; masters stay fp32",
    "zero_optimization.stage": "0 splits nothing, 1 optimizer states, 2 and gradients, 3 and parameters",
    "zero_optimization.reduce_bucket_size": "elements reduced together; holds the model's largest tensor",
    "zero_optimization.allgather_bucket_size": "elements gathered together after the step (stages 1 and 2)",
    "zero_optimization.use_multi_rank_bucket_allreduce": "false sends each gradient only to the rank that owns it: "
    "two thirds of the default's traffic",
    "zero_optimization.overlap_comm": "reduce during backward: pays where a GPU has a second stream",
    "zero_optimization.contiguous_gradients": "copy gradients into the bucket at once: less fragmentation",
    "zero_optimization.stage3_param_persistence_threshold": "smaller tensors (norms) stay whole: not worth a gather",
    "zero_optimization.stage3_prefetch_bucket_size": "elements gathered ahead of use",
    "zero_optimization.stage3_max_live_parameters": "gathered elements held at once; the default 1e9 holds all of "
    "a small model and so undoes stage 3",
    "zero_optimization.stage3_max_reuse_distance": "keep a gathered tensor if it is used again within this many "
    "elements; the default 1e9 never lets go",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "without it a stage-3 checkpoint has no "
    "model.safetensors",
    "zero_optimization.offload_optimizer": "masters, optimizer states and gradients lie in main memory; the step is "
    "computed there; pinned, so that the GPU copies while it computes",
    "zero_optimization.offload_param": "the slices of the parameters, too: the GPU holds what a layer needs just now",
    "zero_force_ds_cpu_optimizer": "false steps with PyTorch's fused AdamW, which is vectorised and needs no compiler; "
    "DeepSpeed would otherwise build an Adam of its own",
}

CONTAINED = frozenset(REASONS) - {name for name in REASONS if "." in name} | {
    *("zero_optimization", "zero_allow_untested_optimizer", "communication_data_type", "data_types"),
    *("prescale_gradients", "gradient_predivide_factor", "steps_per_print", "wall_clock_breakdown"),
}


def strategy_named(name: str) -> Strategy:
    """The strategy of that name. Raises `UserError` if there is none."""
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}: use one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def deepspeed_config(
    strategy: str,
    *,
    micro_batch: int,
    accumulation: int,
    ranks: int,
    max_grad_norm: float,
    precision: str,
    largest_tensor: int,
    on_gpu: bool,
) -> dict[str, Any] | None:
    """The DeepSpeed JSON for one strategy, or None for `vanilla` and `ddp`.

    `precision` is `fp32`, `bf16` or `fp16`; `largest_tensor` is the number of elements of the model's largest
    parameter, to which the buckets are sized.
    """
    stage = strategy_named(strategy).stage
    if stage is None:
        return None
    unit = 10 ** max(0, len(str(largest_tensor)) - 2)
    bucket = -(-largest_tensor // unit) * unit  # the largest tensor, rounded up to two digits
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        zero |= {"reduce_bucket_size": bucket, "overlap_comm": on_gpu, "contiguous_gradients": True}
    if stage in (1, 2):
        zero |= {"allgather_bucket_size": bucket, "use_multi_rank_bucket_allreduce": False}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 10_000,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    in_main_memory = {"device": "cpu", "pin_memory": on_gpu}
    if STRATEGIES[strategy].offloads_optimizer:
        zero["offload_optimizer"] = in_main_memory
    if STRATEGIES[strategy].offloads_parameters:
        zero["offload_param"] = in_main_memory
    config = {
        "train_batch_size": micro_batch * accumulation * ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "fp16": {"enabled": precision == "fp16"},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
    }
    if STRATEGIES[strategy].offloads_optimizer:
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def reaching_out(config: Mapping[str, Any]) -> list[str]:
    """The settings of a DeepSpeed JSON that could write files, swap to a disk or load code.

    A run folder may come from somebody else, so its file may set only sizes, precision and how states are split.
    """
    zero = config.get("zero_optimization")
    inside = zero.items() if isinstance(zero, Mapping) else ()
    swapped = [key for key, value in inside if isinstance(value, Mapping) and "nvme" in json.dumps(value)]
    return sorted(set(config) - CONTAINED) + [f"zero_optimization.{key}" for key in swapped]
