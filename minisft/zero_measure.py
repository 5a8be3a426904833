"""What a live engine really holds, in bytes per owner: tensors found through the garbage collector.

Each storage counts once, however many views it has. On a GPU only tensors on that GPU count.
"""

from __future__ import annotations

import gc
from typing import Any

OWNERS = ("parameters", "gradients", "fp32 masters", "optimizer states", "other tensors")


def measure(model: Any, optimizer: Any, device_type: str) -> dict[str, int]:
    """Bytes that this rank holds between two steps, by owner, plus its peak: `peak` of the device, or of the process.

    `model` is the engine's module and `optimizer` what the Trainer steps (a wrapper of torch's or DeepSpeed's).
    `fp32 masters` are optimizer parameters that are no model parameters. `other tensors` are buckets, buffers,
    batches, and everything else that is alive.
    """
    import torch

    owner_of: dict[int, str] = {}
    bytes_of: dict[int, int] = {}

    def claim(owner: str, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != device_type:
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr():
            owner_of.setdefault(storage.data_ptr(), owner)
            bytes_of[storage.data_ptr()] = storage.nbytes()

    for parameter in model.parameters():
        claim("parameters", parameter.data)
        claim("parameters", getattr(parameter, "ds_tensor", None))  # this rank's part at stage 3
        claim("gradients", parameter.grad)
    inner = optimizer
    while hasattr(inner, "optimizer"):  # Trainer's and DeepSpeed's wrappers, outermost first
        inner = inner.optimizer
        # Stage 3 lends its masters to the inner optimizer only while it steps, and keeps its gradients allocated.
        for tensor in getattr(inner, "fp32_partitioned_groups_flat", []):
            claim("fp32 masters", tensor)
        claim("gradients", getattr(inner, "grad_partitions_flat_buffer", None))
    for group in inner.param_groups:
        for parameter in group["params"]:
            claim("fp32 masters", parameter)
            claim("gradients", parameter.grad)
    for state in inner.state.values():
        for tensor in state.values():
            claim("optimizer states", tensor)
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would wake up proxies and deprecated names
            claim("other tensors", thing)

    held = dict.fromkeys(OWNERS, 0)
    for pointer, owner in owner_of.items():
        held[owner] += bytes_of[pointer]
    return held | {"peak": peak_bytes(device_type)}


def peak_bytes(device_type: str) -> int:
    """The most this process has held so far: allocated on the GPU, or resident in memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(device_type: str) -> int:
    """What this process holds now: allocated on the GPU, or resident in memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
