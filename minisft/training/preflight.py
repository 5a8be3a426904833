"""Checks whether a `RunConfig` fits the data, the model, the device, the memory and the disk.

`prepare` runs these checks before anything starts: they raise an error for what cannot work, and
warn of what may not work.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

from minisft import system
from minisft.errors import UserError
from minisft.model.configs import require_positions
from minisft.run.config import RunConfig
from minisft.run.folder import outputs_root

GB = 1e9


def resolve_precision(asked: str) -> tuple[str, bool]:
    """Return the precision (`fp32`, `bf16` or `fp16`), and whether there is a GPU.

    `auto` chooses a precision that the device computes fast. Raises `UserError` if the device does
    not support the precision `asked` for.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if asked == "fp16" and not on_gpu:
        raise UserError("fp16 needs a GPU: use --precision bf16 or fp32 on a CPU")
    if asked == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bf16: use --precision fp16 or fp32")
    if asked != "auto":
        return asked, on_gpu
    if on_gpu:
        return ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"), True
    capabilities = torch.cpu.get_capabilities()
    return ("bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "fp32"), False


def require_fit(config: RunConfig, model: Any, rows: int) -> None:
    """Raise `UserError` if the data or the model (its config) is too small for the settings."""
    require_positions(model, config.max_length)
    if not rows:
        raise UserError(
            f"no training row is left of {config.data} (max length {config.max_length}, max characters "
            f"{config.max_characters}, truncation {config.truncation}): allow more, or give more data"
        )
    if rows < config.global_batch and config.batching != "packed":
        raise UserError(
            f"{rows} training rows do not fill one global batch of {config.global_batch} (batch size "
            f"{config.batch_size} x accumulation {config.accumulation} x ranks {config.ranks}): lower one of them, or "
            "give more data"
        )


def require_space(config: RunConfig, rows: int, parameters: int) -> None:
    """Raise `UserError` if the checkpoints, with `parameters` weights each, will not fit on disk.

    A checkpoint needs 4 bytes per parameter, or 16 with the optimizer states.
    """
    per_epoch = max(1, rows // config.global_batch)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    saves = math.ceil(steps / (config.save_steps or per_epoch))
    each = parameters * (16 if config.resumable else 4)
    # In addition to those to keep: the best one, and the one that is being written.
    need = each * min(saves, saves if config.keep_checkpoints is None else config.keep_checkpoints + 2)
    outputs = outputs_root()
    outputs.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(outputs).free) < need:
        raise UserError(
            f"no space left for {saves} checkpoints: they need {need / GB:.1f} GB and {outputs} has "
            f"{free / GB:.1f} GB free; free some, save less often (--save-steps), or keep fewer (--keep-checkpoints)"
        )


def run_state_bytes(config: RunConfig, model: Any, precision: str, on_gpu: bool) -> float:
    """Predict the model-state bytes of the fullest rank; on a GPU, only GPU memory counts."""
    from minisft.zero import state_memory
    from minisft.zero.parameter_shapes import Shapes

    shapes = Shapes.of_config(model, config.trust_remote_code)
    deepspeed = state_memory.generated_config(shapes, config.strategy, config.ranks, precision)
    held = state_memory.predict_states(shapes, config.strategy, config.ranks, precision, deepspeed)
    if on_gpu:
        ranks = state_memory.distinct(held)
        return max(
            state_memory.total_bytes(state_memory.bytes_on_gpu(rank["after backward"], deepspeed)) for rank in ranks
        )
    return state_memory.most_bytes(held, "after backward")


def activation_bytes(config: RunConfig, model: Any, precision: str) -> float:
    """Estimate the bytes that one micro-batch keeps for the backward pass.

    34 bytes per token, layer and hidden unit in half precision (Korthikanti et al. 2022, eq. 2,
    without the attention matrices, which are not kept), twice that in fp32; with activation
    checkpointing, only the layers' inputs.
    """
    text = model.get_text_config()
    per_unit = (2 if config.activation_checkpointing else 34) * (2 if precision == "fp32" else 1)
    return config.batch_size * config.max_length * text.num_hidden_layers * text.hidden_size * per_unit


def warn_of_memory(config: RunConfig, model: Any, precision: str, on_gpu: bool, say: Callable[[str], None]) -> None:
    """Warn if a run will probably need more memory than is free."""
    states = run_state_bytes(config, model, precision, on_gpu)
    try:
        activations = activation_bytes(config, model, precision)
    except AttributeError:  # this architecture's config has other names for its layers
        activations = 0.0
    if on_gpu:
        import torch

        need, free, what = states + activations, torch.cuda.mem_get_info()[0], "of GPU memory"
    else:
        need, free, what = config.ranks * (states + activations), system.memory()[1], "of memory"
    if need > free:
        say(
            f"Warning: this run may need about {need / GB:.1f} GB {what} ({config.ranks} x {states / GB:.1f} GB of "
            f"model states, up to {activations / GB:.1f} GB of activations each) and {free / GB:.1f} GB are free: a "
            "smaller --batch-size with more --accumulation trains the same, --activation-checkpointing saves more"
        )


def warn_of_cores(config: RunConfig, say: Callable[[str], None]) -> None:
    """Warn if a run on CPUs has more ranks than this machine has cores."""
    cores = system.cores()
    if config.ranks > cores:
        say(
            f"Warning: {config.ranks} ranks share {cores} core{'s' if cores > 1 else ''} here, and each waits for all "
            f"others: this is far slower than --ranks {cores}, which computes the same with the same global batch"
        )
