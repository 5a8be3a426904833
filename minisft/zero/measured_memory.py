"""Measures what a live engine really holds, in bytes per owner. The garbage collector lists the tensors.

Each storage counts once, no matter how many views it has. On a GPU only tensors on that GPU count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minisft.zero.state_memory import OWNERS as PREDICTED_OWNERS

OTHER = "other tensors"
OWNERS = (*PREDICTED_OWNERS, OTHER)


def measure(model: Any, optimizer: Any, device_type: str, buckets: Mapping[int, int] | None = None) -> dict[str, int]:
    """Bytes that this rank holds now, by owner: those of `minisft.zero.state_memory`, and one for everything else.

    `model` is the engine's module and `optimizer` what steps it (torch's, or Trainer's or DeepSpeed's wrapper of it).
    `fp32 masters` are optimizer parameters that are not model parameters; DeepSpeed reduces gradients through its
    `buckets`; stage 3 keeps `persistent parameters` whole in addition to its slices; `offload buffers` are used for
    copies between a GPU and offloaded states. `other tensors` are model buffers, batches, and all other live tensors.
    The argument `buckets` maps addresses to bytes, for live storages that Python may not see: those of DDP.
    """
    held = dict.fromkeys(OWNERS, 0)
    for owner, size in owned_storages(model, optimizer, device_type, buckets).values():
        held[owner] += size
    return held


def owned_storages(
    model: Any, optimizer: Any, device_type: str, buckets: Mapping[int, int] | None = None
) -> dict[int, tuple[str, int]]:
    """Every storage that `measure` counts, by address: its owner and its bytes."""
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
        slice_at_stage_3 = getattr(parameter, "ds_tensor", None)
        claim("parameters", slice_at_stage_3)
        claim("parameters" if slice_at_stage_3 is None else "persistent parameters", parameter.data)
        claim("gradients", parameter.grad)
    inner = optimizer
    while hasattr(inner, "optimizer"):  # Trainer's and DeepSpeed's wrappers, outermost first
        inner = inner.optimizer
        _claim_deepspeed(inner, claim)
    _claim_deepspeed(optimizer, claim)
    for group in inner.param_groups:
        for parameter in group["params"]:
            claim("fp32 masters", parameter)
            claim("gradients", parameter.grad)
    for state in inner.state.values():
        for tensor in state.values():
            claim("optimizer states", tensor)
    for pointer, size in (buckets or {}).items():
        owner_of.setdefault(pointer, "buckets")
        bytes_of[pointer] = size
    for tensor in live_tensors():
        claim(OTHER, tensor)
    return {pointer: (owner, bytes_of[pointer]) for pointer, owner in owner_of.items()}


def live_tensors() -> list[Any]:
    """Every tensor with values that Python can reach, on any device."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    # isinstance would resolve lazy proxies and deprecated names
    kinds = ((thing, type(thing)) for thing in gc.get_objects())
    return [thing for thing, kind in kinds if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor)]


def _claim_deepspeed(wrapper: Any, claim: Callable[[str, Any], None]) -> None:
    """Claim what a ZeRO optimizer holds in addition to the optimizer that it wraps."""
    # Stage 3 gives its masters to the inner optimizer only while that steps, and keeps its gradients allocated.
    for tensor in getattr(wrapper, "fp32_partitioned_groups_flat", []):
        claim("fp32 masters", tensor)
        claim("gradients", tensor.grad)
    claim("gradients", getattr(wrapper, "grad_partitions_flat_buffer", None))
    # Stages 1 and 2 keep the gradients of every parameter that touches the rank's slice, and its padding.
    for tensors in (getattr(wrapper, "averaged_gradients", None) or {}).values():
        for tensor in tensors or ():
            claim("gradients", tensor)
    for bucket in getattr(wrapper, "ipg_buckets", {}).values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        for tensor in buffers:
            claim("buckets", tensor)
    # Offloading copies gradients through one buffer on each side; steps and accumulation have their own.
    claim("buckets", getattr(wrapper, "temp_grad_buffer_for_gpu_offload", None))
    claim("offload buffers", getattr(wrapper, "temp_grad_buffer_for_cpu_offload", None))
    for tensor in getattr(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups", []):
        claim("offload buffers", tensor)
    for tensor in getattr(wrapper, "accumulated_grads_in_cpu", {}).values():
        claim("offload buffers", tensor)


def peak_bytes(device_type: str) -> int:
    """The most this process has held so far: allocated on the GPU, or resident in memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        # Linux's peak of this program alone: `ru_maxrss` starts at what the parent process held.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def held_bytes(device_type: str) -> int:
    """What this process holds now: allocated on the GPU, or resident in memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
