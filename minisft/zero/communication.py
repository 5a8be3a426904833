"""The traffic between the ranks in one optimizer step, in bytes: predicted from shapes, and counted in a live engine.

A collective operation is counted by the tensor that it completes or reduces, whole: an all-gather of W slices of n
bytes counts W n. How much of that each rank sends depends on the algorithm; `bytes_sent` is that of a ring, as in
Rajbhandari et al. 2020, section 7, where an all-reduce is a reduce-scatter followed by an all-gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisft.zero.parameter_shapes import Shapes, split_size
from minisft.zero.state_memory import ELEMENT, generated_config
from minisft.zero.strategies import DEFAULT_PERSISTENCE, strategy_named

OPERATIONS = ("all-reduce", "reduce", "reduce-scatter", "all-gather")
# DeepSpeed's names for them. Its logger counts a gather by one rank's slice, so `stop` multiplies that size.
LOGGED = {
    "all_reduce": "all-reduce",
    "inference_all_reduce": "all-reduce",
    "reduce": "reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_gather": "all-gather",
    "all_gather_into_tensor": "all-gather",
}


def predict_traffic(
    shapes: Shapes,
    strategy: str,
    ranks: int,
    precision: str,
    accumulation: int = 1,
    deepspeed: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Bytes by operation in one optimizer step of `accumulation` micro-batches, without norms and flags (a few bytes).

    Exact except for stage 3, where it is an upper bound: a tensor that is still gathered from its last use is not
    gathered again (`stage3_max_reuse_distance`); a tensor that is used twice (tied embeddings) may be gathered twice.
    """
    stage, e, p = strategy_named(strategy).stage, ELEMENT[precision], shapes.parameters
    moved = dict.fromkeys(OPERATIONS, 0)
    if ranks == 1:
        return moved
    if stage is None:  # ddp: autocast leaves gradients in fp32
        moved["all-reduce"] = 4 * p
        return moved
    if stage == 0:
        moved["all-reduce"] = e * p
        return moved
    zero = (deepspeed or generated_config(shapes, strategy, ranks, precision))["zero_optimization"]
    if stage < 3:
        to_owner = zero.get("reduce_scatter", True) and not zero.get("use_multi_rank_bucket_allreduce", True)
        # Stage 1 keeps whole gradients and reduces them once; stage 2 keeps its slice and so reduces each time.
        moved["reduce" if to_owner else "all-reduce"] = e * p * (accumulation if stage == 2 else 1)
        moved["all-gather"] = e * ranks * sum(shapes.parts(ranks))
        return moved
    threshold = int(zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE))
    small = [parameter for parameter in shapes.named if parameter[1] <= threshold]
    padded, kept = (e * ranks * split_size(some, ranks) for some in (shapes.named, small))
    moved["reduce-scatter"] = accumulation * padded
    # Forward and backward each gather what is split; small tensors are kept whole and gathered once after the step.
    moved["all-gather"] = 2 * accumulation * (padded - kept) + kept
    return moved


def bytes_sent(moved: Mapping[str, float], ranks: int) -> float:
    """Bytes that each rank sends for these operations on a ring of `ranks`."""
    return sum(size * (2 if name == "all-reduce" else 1) for name, size in moved.items()) * (ranks - 1) / ranks


class Counter:
    """Counts by operation what DeepSpeed moves between `start` and `stop`, through its own communications logger."""

    def start(self) -> None:
        from deepspeed.comm import comm

        self.logger = comm.comms_logger
        self.before = self.logger.enabled, self.logger.prof_all, self.logger.comms_dict
        self.logger.enabled, self.logger.prof_all, self.logger.comms_dict = True, True, {}

    def stop(self) -> dict[str, int]:
        import torch

        found = self.logger.comms_dict
        self.logger.enabled, self.logger.prof_all, self.logger.comms_dict = self.before
        moved = dict.fromkeys(OPERATIONS, 0)
        for name, sizes in found.items():
            if name not in LOGGED:
                continue
            slices = torch.distributed.get_world_size() if name.startswith("all_gather") else 1
            moved[LOGGED[name]] += slices * sum(size * times[0] for size, times in sizes.items())
        return moved


def ddp_traffic(model: Any) -> dict[str, int]:
    """The same of a step of torch's DistributedDataParallel, which reduces each of its buckets once per step."""
    about = model._get_ddp_logging_data()
    sizes = about.get("rebuilt_bucket_sizes") or about["bucket_sizes"]
    return dict.fromkeys(OPERATIONS, 0) | {"all-reduce": sum(int(size) for size in str(sizes).split(","))}
