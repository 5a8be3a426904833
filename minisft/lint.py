"""What is wrong with a DeepSpeed configuration, before it costs a run.

DeepSpeed refuses an unknown key inside `zero_optimization` and passes over one beside it; it fills what is missing
with defaults made for large models; and much of what a file says does nothing at the stage it asks for. Of a file
DeepSpeed itself is asked as well, where it is installed.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError
from minisft.zero_config import DEFAULT_BUCKET


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The keys that DeepSpeed 0.19 reads: `runtime/config.py` and what it imports.
TOP_KEYS = _words(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer fp16 bf16 bfloat16
    torch_autocast data_types gradient_clipping communication_data_type seq_parallel_communication_data_type
    prescale_gradients gradient_predivide_factor gradient_allreduce_op disable_allgather disable_python_gc
    steps_per_print dump_state wall_clock_breakdown memory_breakdown log_level timers comms_logger flops_profiler
    tensorboard wandb csv_monitor comet activation_checkpointing autotuning aio checkpoint datastates_ckpt
    dataloader_drop_last data_efficiency pipeline hybrid_engine tensor_parallel expert_parallel compile
    weight_quantization use_data_before_expert_parallelism vocabulary_size sequence_parallel_size data_parallel_size
    """
)
REMOVED_KEYS = _words(
    """
    nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity
    graph_harvesting curriculum_learning progressive_layer_drop
    """
)
# Of `zero_optimization`, the stages at which a key does something.
ZERO_KEYS: dict[str, tuple[int, ...]] = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "allgather_partitions": (1, 2),
    "allgather_bucket_size": (1, 2),
    "overlap_comm": (1, 2, 3),
    "compute_grad_norm": (1, 2),
    "load_from_fp32_weights": (1, 2),
    "elastic_checkpoint": (1, 2, 3),
    "offload_param": (3,),
    "offload_optimizer": (1, 2, 3),
    "zenflow": (1, 2, 3),
    "sub_group_size": (3,),
    "cpu_offload_param": (3,),
    "cpu_offload_use_pin_memory": (1, 2, 3),
    "cpu_offload": (1, 2, 3),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "stage3_gather_16bit_weights_on_model_save": (3,),
    "stage3_module_granularity_threshold": (3,),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "stage3_allgather_sequential": (3,),
    "stage3_gather_fp16_weights_on_model_save": (3,),
    "ignore_unused_parameters": (1, 2),
    "legacy_stage1": (1,),
    "round_robin_gradients": (1, 2),
    "parameter_alignment": (1, 2, 3),
    "zero_hpz_partition_size": (3,),
    "zero_quantized_weights": (3,),
    "zero_quantized_nontrainable_weights": (3,),
    "zero_quantized_gradients": (3,),
    "memory_efficient_linear": (3,),
    "pipeline_loading_checkpoint": (3,),
    "override_module_apply": (3,),
    "log_trace_cache_warnings": (3,),
    "enable_sanity_checks": (1, 2, 3),
    "save_muon_momentum_buffer_in_memory": (1, 2, 3),
    "leaf_module": (3,),
}
DEPRECATED_ZERO_KEYS = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory inside offload_optimizer",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
# DeepSpeed's own names of these fields, which it takes as well; Trainer does not look for them.
ALIASES = {
    key.removeprefix("stage3_"): key
    for key in ZERO_KEYS
    if key.startswith("stage3_") and key not in DEPRECATED_ZERO_KEYS
}
OFFLOAD_KEYS = {
    "offload_param": frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}),
    "offload_optimizer": _words(
        "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
        "cpuadam_cores_perc"
    ),
}
HALF_KEYS = {
    "fp16": _words(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads"
    ),
    "bf16": _words(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PARALLEL_KEYS = ("sequence_parallel_size", "data_parallel_size")  # they ask for as many processes
# Of DeepSpeed's configuration classes, where in a file their settings are.
BLOCKS = {
    "DeepSpeedZeroConfig": ("zero_optimization",),
    "DeepSpeedFP16Config": ("fp16",),
    "DeepSpeedBF16Config": ("bf16",),
    "CommsLoggerConfig": ("comms_logger",),
    "CompileConfig": ("compile",),
    "HybridEngineConfig": ("hybrid_engine",),
}
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
DEFAULT_LIVE = 1_000_000_000
# What transformers' Trainer fills in where a file says "auto", and nowhere else.
AUTO_KEYS = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "reduce_bucket_size")
FILLED_BY_TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


@dataclass(frozen=True)
class Finding:
    """One thing in a configuration. `error`: DeepSpeed refuses it, or does not do what it says; else a `warning`."""

    severity: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.key}: {self.message}"


def lint_file(file: str | Path, **about: Any) -> list[Finding]:
    """`lint` of a file. Raises `UserError` if there is none, or if it holds no JSON object."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {str(file)!r}: give a DeepSpeed configuration in JSON") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is no text file: give a DeepSpeed configuration in JSON") from error
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        kind = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
            type(config), "a number"
        )
        raise UserError(f"{str(file)!r} holds {kind}: a DeepSpeed configuration is a JSON object, in braces")
    twice = [Finding("error", key, "written twice: DeepSpeed refuses such a file") for key in repeated]
    found = twice + lint(config, **about)
    if any(finding.severity == "error" for finding in found):
        return found
    return [*refused(config), *found]


def refused(config: Mapping[str, Any]) -> list[Finding]:
    """What DeepSpeed's own configuration class raises, if it raises anything; nothing where it is not installed.

    Batches aside, which `lint` checks, and "auto", which somebody fills in before or DeepSpeed drops.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # skips its probing for accelerators, and a warning
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    except ImportError:
        return []
    asked = {key: value for key, value in _without_auto(config).items() if key not in BATCH_KEYS + PARALLEL_KEYS}
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        DeepSpeedConfig(asked | {"train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # what it raises is of many kinds
        if not hasattr(error, "errors"):
            return [Finding("error", "DeepSpeed", f"refuses the file: {' '.join(str(error).split())[:200]}")]
        block = BLOCKS.get(getattr(error, "title", ""), ())
        return [
            Finding(
                "error", ".".join(map(str, (*block, *one["loc"]))) or "DeepSpeed", f"DeepSpeed refuses it: {one['msg']}"
            )
            for one in error.errors()
        ]
    finally:
        logger.setLevel(level)
    return []


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def lint(config: Mapping[str, Any], ranks: int | None = None, parameters: int | None = None) -> list[Finding]:
    """All findings, errors first. With `ranks` and the model's `parameters` it can check batches and buckets, too."""
    found = [*_top(config), *_batch(config, ranks), *_precision(config), *_zero(config, parameters)]
    return sorted(found, key=lambda finding: finding.severity)  # stable: "error" comes before "warning"


def _top(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in config.items():
        if key in TOP_KEYS:
            if value == "auto" and key not in FILLED_BY_TRAINER:
                yield Finding(
                    "error", key, 'is "auto", which Trainer does not fill in here: DeepSpeed has no such value'
                )
        elif key in REMOVED_KEYS:
            yield Finding("error", key, "DeepSpeed 0.19 has no such feature any more: take it out")
        elif key in ZERO_KEYS or key in ALIASES:
            yield Finding("error", key, "DeepSpeed does not read it here: it belongs inside zero_optimization")
        elif key.startswith("_"):  # how people write comments
            yield Finding("warning", key, "DeepSpeed passes over it without a word")
        else:
            yield Finding("error", key, f"DeepSpeed passes over it without a word{_meant(key, TOP_KEYS)}")
    for block in ("optimizer", "scheduler"):
        if block in config:
            yield Finding(
                "warning", block, "Trainer then leaves its own aside, and checks that the values of both agree"
            )


def _batch(config: Mapping[str, Any], ranks: int | None) -> Iterator[Finding]:
    whole, micro, steps = (config.get(name) for name in BATCH_KEYS)
    together = config.get("sequence_parallel_size")  # ranks that work on the same rows
    if ranks and _is_whole(together) and together > 0:
        ranks = max(1, ranks // together)
    for name, value in zip(BATCH_KEYS, (whole, micro, steps), strict=True):
        if value is not None and value != "auto" and (not _is_whole(value) or value < 1):
            yield Finding("error", name, f"is {json.dumps(value)}: give a whole number, at least 1")
            return
    if whole is None and micro is None:
        yield Finding("error", BATCH_KEYS[0], "neither this nor train_micro_batch_size_per_gpu is given: one is needed")
    if not _is_whole(whole):
        return
    micro, steps = micro if _is_whole(micro) else None, steps if _is_whole(steps) else None
    product = (micro or 1) * (steps or 1) * (ranks or 1)
    if micro and steps and ranks:
        if product != whole:
            yield Finding("error", BATCH_KEYS[0], f"is {whole}, but {micro} x {steps} x {ranks} ranks are {product}")
    elif whole % product:
        given = " x ".join(str(n) for n in (micro, steps, ranks and f"{ranks} ranks") if n)
        yield Finding("error", BATCH_KEYS[0], f"is {whole}, which is no multiple of {given}")


def _precision(config: Mapping[str, Any]) -> Iterator[Finding]:
    on = []
    for name in ("fp16", "bf16", "bfloat16"):
        block = config.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            yield Finding("error", name, f'is {json.dumps(block)}: give an object, {{"enabled": true}}')
            continue
        if str(block.get("enabled")).lower() in ("true", "1", "1.0", "yes", "on", "y", "t"):  # as DeepSpeed reads it
            on.append("bf16" if name == "bfloat16" else name)
        if block.get("enabled") is None and block:
            yield Finding("warning", f"{name}.enabled", "is not given, so the whole block does nothing")
        known = HALF_KEYS["bf16" if name == "bfloat16" else name]
        for key in block:
            if key not in known:
                yield Finding("error", f"{name}.{key}", f"DeepSpeed refuses it{_meant(key, known)}")
    if len(set(on)) > 1:
        yield Finding("error", on[0], f"and {on[1]} are both enabled: DeepSpeed refuses that, choose one")


def _zero(config: Mapping[str, Any], parameters: int | None) -> Iterator[Finding]:
    zero = config.get("zero_optimization")
    if isinstance(zero, bool):
        yield Finding("warning", "zero_optimization", f'is old: write {{"stage": {int(zero)}}}')
        zero = {"stage": int(zero)}
    if "zero_optimization" not in config:
        yield Finding("warning", "zero_optimization", "is not given, so this is stage 0: plain data parallelism")
        return
    if not isinstance(zero, Mapping):
        yield Finding("error", "zero_optimization", f"is {json.dumps(zero)}: give an object")
        return
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield Finding("error", "zero_optimization.stage", f"is {json.dumps(stage)}: give 0, 1, 2 or 3")
        return
    if "stage" not in zero:
        yield Finding("warning", "zero_optimization.stage", "is not given, so it is 0, and nothing is split")
    for key in zero:
        if key in ALIASES:
            yield Finding("warning", f"zero_optimization.{key}", f"is better known as {ALIASES[key]}: write that")
    zero = {ALIASES.get(key, key): value for key, value in zero.items()}
    for key, value in zero.items():
        name = f"zero_optimization.{key}"
        if key not in ZERO_KEYS:
            yield from _strange(key, name)
            continue
        if key in DEPRECATED_ZERO_KEYS:
            yield Finding("warning", name, f"is old: write {DEPRECATED_ZERO_KEYS[key]}")
        if stage not in ZERO_KEYS[key] and value not in (False, None):
            stages = ", ".join(map(str, ZERO_KEYS[key]))
            yield Finding("warning", name, f"does nothing at stage {stage}; it is for stage {stages}")
        if value == "auto" and key not in AUTO_KEYS:
            yield Finding("warning", name, 'is "auto", for which nobody works out a value here: it becomes the default')
        if key in OFFLOAD_KEYS and isinstance(value, Mapping):
            for inner in value:
                if inner not in OFFLOAD_KEYS[key]:
                    yield Finding("error", f"{name}.{inner}", f"DeepSpeed refuses it{_meant(inner, OFFLOAD_KEYS[key])}")
            if value.get("device") == "nvme" and not value.get("nvme_path"):
                yield Finding("error", f"{name}.nvme_path", "is not given, though the device is nvme")
    yield from _sizes(zero, stage, parameters)
    if stage == 3 and not any(zero.get(f"stage3_gather_{kind}_weights_on_model_save") for kind in ("16bit", "fp16")):
        yield Finding(
            "warning",
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "is not true: checkpoints will have no model.safetensors, only each rank's part",
        )


def _strange(key: str, name: str) -> Iterator[Finding]:
    if key in TOP_KEYS:
        yield Finding("error", name, "DeepSpeed refuses it here: it belongs beside zero_optimization, not inside")
    else:
        yield Finding("error", name, f"DeepSpeed refuses it{_meant(key, ZERO_KEYS)}")


def _sizes(zero: Mapping[str, Any], stage: int, parameters: int | None) -> Iterator[Finding]:
    if stage == 0:
        return
    for key in BUCKETS:
        if stage not in ZERO_KEYS[key]:
            continue
        name, value = f"zero_optimization.{key}", zero.get(key)
        if value == "auto" or (value is None and key == "stage3_prefetch_bucket_size"):
            continue
        number = DEFAULT_BUCKET if value is None else _number(value)
        if number is None:
            yield Finding("error", name, f"is {json.dumps(value)}: give a number of elements")
            continue
        size = int(number)
        held = " and stays allocated all the time" if stage == 3 and key == "reduce_bucket_size" else ""
        if parameters is not None and size > parameters:
            what = f"is {size:,} elements" if value is not None else f"is not given, so it is {size:,} elements"
            yield Finding("warning", name, f"{what}: more than the model's {parameters:,}{held}")
        elif value is None and parameters is None:
            yield Finding("warning", name, f"is not given, so it is {size:,} elements{held}: size it to the model")
    if stage != 3:
        return
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        value = _number(zero.get(key, DEFAULT_LIVE))
        if parameters is not None and value is not None and value >= parameters:
            given = "is" if key in zero else "is not given, so it is"
            yield Finding(
                "warning",
                f"zero_optimization.{key}",
                f"{given} {int(value):,}, no less than the model's {parameters:,} parameters: once gathered they may "
                "all stay, and stage 3 saves nothing while it computes",
            )


def _number(value: Any) -> float | None:
    """What DeepSpeed takes for a size, a string of digits included; None if it is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(int(value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < math.inf else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _meant(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else ": no such key is known"
