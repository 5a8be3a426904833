"""What is wrong with a DeepSpeed configuration, before it costs a run.

DeepSpeed refuses an unknown key inside `zero_optimization` and passes over one beside it; it fills what is missing
with defaults made for large models; and much of what a file says does nothing at the stage it asks for. Of a file
the installed DeepSpeed itself is asked as well (`minisft.zero.lint_deepspeed`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from minisft.errors import UserError
from minisft.files import parse_json, read_text
from minisft.zero.lint_finding import Finding, display_value, meant
from minisft.zero.lint_keys import (
    ALIASES,
    BATCH_KEYS,
    DEPRECATED_ZERO_KEYS,
    HALF_KEYS,
    OBJECT_KEYS,
    OFFLOAD_KEYS,
    REMOVED_KEYS,
    TOP_KEYS,
    ZERO_KEYS,
)
from minisft.zero.strategies import DEFAULT_BUCKET

MOST_BYTES = 250_000  # of a file: such configurations have a few thousand
MOST_DIGITS = 30


BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
DEFAULT_LIVE = 1_000_000_000
FLAGS = (
    "prescale_gradients",
    "managed_gradient_accumulation",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dataloader_drop_last",
    "use_data_before_expert_parallelism",
)
LOG_LEVELS = ["debug", "info", "warning", "error", "critical", None]
# What transformers' Trainer fills in where a file says "auto", and nowhere else.
AUTO_KEYS = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "reduce_bucket_size")
FILLED_BY_TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def lint_file(file: str | Path, **about: Any) -> list[Finding]:
    """`lint` of a file, and what DeepSpeed says of it. Raises `UserError` if it holds no JSON object of this kind."""
    from minisft.zero.lint_deepspeed import examined

    config, repeated = _read(Path(file))
    found = [Finding("error", key, "written twice: DeepSpeed refuses such a file") for key in repeated]
    found += lint(config, **about)
    known = {finding.key for finding in found if finding.severity == "error"}
    return sorted([*found, *examined(config, known)], key=_severity)


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a file, and the keys that are written twice."""
    if file.exists() and not file.is_file():
        raise UserError(f"{str(file)!r} is no text file: give a DeepSpeed configuration in JSON")
    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"there is no file {str(file)!r}: give a DeepSpeed configuration in JSON")
    parse_json(text, file, Any)  # refuses what is nested too deeply to be gone through
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counted = Counter(key for key, _ in pairs)
        repeated.extend(key for key in counted if counted[key] > 1)
        return dict(pairs)

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise UserError(f"{str(file)!r} holds a number of {len(digits)} digits: DeepSpeed has no such setting")
        return int(digits)

    config = json.loads(text, object_pairs_hook=once, parse_int=whole)
    if not isinstance(config, dict):
        kind = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
            type(config), "a number"
        )
        raise UserError(f"{str(file)!r} holds {kind}: a DeepSpeed configuration is a JSON object, in braces")
    return config, sorted(repeated)


def lint(config: Mapping[str, Any], ranks: int | None = None, parameters: int | None = None) -> list[Finding]:
    """All findings, errors first. With `ranks` and the model's `parameters` it can check batches and buckets, too."""
    found = [*_top(config), *_batch(config, ranks), *_scalars(config), *_precision(config), *_zero(config, parameters)]
    return sorted(found, key=_severity)


def _severity(finding: Finding) -> str:
    return finding.severity  # "error" comes before "warning", and sorting keeps the order of equals


def _top(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in config.items():
        if key in TOP_KEYS:
            if value == "auto" and key not in FILLED_BY_TRAINER:
                yield Finding(
                    "error", key, 'is "auto", which Trainer does not fill in here: DeepSpeed has no such value'
                )
            elif key in OBJECT_KEYS and not isinstance(value, Mapping):
                yield Finding(
                    "error", key, f"is {display_value(value)}: DeepSpeed refuses it, give an object in braces"
                )
        elif key in REMOVED_KEYS:
            yield Finding("error", key, "DeepSpeed 0.19 has no such feature any more: take it out")
        elif key in ZERO_KEYS or key in ALIASES:
            yield Finding("error", key, "DeepSpeed does not read it here: it belongs inside zero_optimization")
        elif key.startswith("_"):  # how people write comments
            yield Finding("warning", key, "is ignored by DeepSpeed")
        else:
            yield Finding("error", key, f"is ignored by DeepSpeed{meant(key, TOP_KEYS)}")
    for block in ("optimizer", "scheduler"):
        if block in config:
            yield Finding(
                "warning", block, "Trainer then leaves its own aside, and checks that the values of both agree"
            )
    if config.get("activation_checkpointing"):
        yield Finding(
            "warning",
            "activation_checkpointing",
            "is ignored under Trainer: models of transformers have their own, minisft's is --activation-checkpointing",
        )


def _batch(config: Mapping[str, Any], ranks: int | None) -> Iterator[Finding]:
    whole: Any
    micro: Any
    steps: Any
    whole, micro, steps = (config.get(name) for name in BATCH_KEYS)
    together = config.get("sequence_parallel_size")  # ranks that work on the same rows
    if ranks and _is_whole(together) and together > 0:
        ranks = max(1, ranks // together)
    for name, value in zip(BATCH_KEYS, (whole, micro, steps), strict=True):
        if value is not None and value != "auto" and (not _is_whole(value) or value < 1):
            yield Finding("error", name, f"is {display_value(value)}: give a whole number, at least 1")
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


def _scalars(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Single values, which DeepSpeed takes unchecked: it stops at the first step, or takes any text for true."""
    for key in FLAGS:
        value = config.get(key)
        if isinstance(value, str) and value != "auto":
            yield Finding("error", key, f"is {display_value(value)}, a text: give true or false, without quotes")
    for key in ("gradient_clipping", "gradient_predivide_factor", "steps_per_print"):
        value = config.get(key)
        if key not in config or value == "auto" or (value is None and key == "steps_per_print"):
            continue
        if not isinstance(value, int | float):
            yield Finding("error", key, f"is {display_value(value)}: DeepSpeed stops at the first step, give a number")
        elif key == "gradient_clipping" and not value >= 0:
            yield Finding("warning", key, f"is {display_value(value)}: nothing is clipped")
        elif key != "gradient_clipping" and not value > 0:
            yield Finding("error", key, f"is {display_value(value)}: give a number above 0")
    if "log_level" in config and config["log_level"] not in LOG_LEVELS:
        yield Finding(
            "error",
            "log_level",
            f"DeepSpeed refuses {display_value(config['log_level'])}: take debug, info, warning, error or critical",
        )


def _precision(config: Mapping[str, Any]) -> Iterator[Finding]:
    on = []
    for name in ("fp16", "bf16", "bfloat16"):
        block = config.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            yield Finding("error", name, f'is {display_value(block)}: give an object, {{"enabled": true}}')
            continue
        if _is_on(block.get("enabled")):
            on.append("bf16" if name == "bfloat16" else name)
        if block.get("enabled") is None and block:
            yield Finding("warning", f"{name}.enabled", "is not given, so the whole block does nothing")
        known = HALF_KEYS["bf16" if name == "bfloat16" else name]
        for key in block:
            if key not in known:
                yield Finding("error", f"{name}.{key}", f"DeepSpeed refuses it{meant(key, known)}")
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
        yield Finding("error", "zero_optimization", f"is {display_value(zero)}: give an object")
        return
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield Finding("error", "zero_optimization.stage", f"is {display_value(stage)}: give 0, 1, 2 or 3")
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
                    yield Finding("error", f"{name}.{inner}", f"DeepSpeed refuses it{meant(inner, OFFLOAD_KEYS[key])}")
            if value.get("device") == "nvme" and not value.get("nvme_path"):
                yield Finding("error", f"{name}.nvme_path", "is not given, though the device is nvme")
    yield from _together(config, zero, stage)
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
        yield Finding("error", name, f"DeepSpeed refuses it{meant(key, ZERO_KEYS)}")


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
            yield Finding("error", name, f"is {display_value(value)}: give a number of elements")
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


def _together(config: Mapping[str, Any], zero: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    """Settings that DeepSpeed's engine refuses beside others."""
    scatters = _is_on(zero.get("reduce_scatter", True)) and stage >= 2
    if scatters and str(config.get("gradient_allreduce_op")).lower() != "sum":
        for key, harmless in (("prescale_gradients", (False, None)), ("gradient_predivide_factor", (1, None))):
            if key in config and config[key] not in harmless:
                message = (
                    f"DeepSpeed refuses {display_value(config[key])} at stage {stage}, unless reduce_scatter is false"
                )
                yield Finding("error", key, message)
    if _is_on(zero.get("legacy_stage1")) and stage:
        yield Finding("error", "zero_optimization.legacy_stage1", "DeepSpeed refuses it: it is no more")
    for half in ("fp16", "bf16"):
        block, key = config.get(half), f"{half}_master_weights_and_grads"
        if stage not in (1, 2) or not isinstance(block, Mapping) or not _is_on(block.get(key)):
            continue
        away = zero.get("offload_optimizer")
        on_cpu = isinstance(away, Mapping) and away.get("device") == "cpu"
        if not on_cpu and not _is_on(block.get("bf16_optimizer_states")):
            yield Finding("error", f"{half}.{key}", "DeepSpeed refuses it unless offload_optimizer is on the cpu")
    if config.get("managed_gradient_accumulation") is False and stage < 2 and _is_on(zero.get("overlap_comm")):
        yield Finding(
            "error", "managed_gradient_accumulation", "DeepSpeed refuses false beside overlap_comm below stage 2"
        )


def _is_on(value: Any) -> bool:
    """Whether a value is true as DeepSpeed's classes read it."""
    return str(value).lower() in ("true", "1", "1.0", "yes", "on", "y", "t")


def _number(value: Any) -> float | None:
    """What DeepSpeed takes for a size, a string of digits included; None if it is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(int(value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
