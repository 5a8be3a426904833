"""Finds the mistakes in a DeepSpeed configuration before they cost a run.

The installed DeepSpeed reads it first (`minisft.zero.lint_deepspeed`): that finds what its classes refuse. Here is what
they let pass: DeepSpeed ignores unknown keys at the top level, fills in defaults made for large models, does not check
many single values, and many keys have no effect at the configured stage.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeGuard

from minisft.errors import UserError
from minisft.files import parse_json, read_text
from minisft.zero import lint_keys as keys
from minisft.zero.lint_deepspeed import parse
from minisft.zero.lint_finding import Finding, display_value, suggest
from minisft.zero.lint_keys import ZERO

MOST_BYTES = 250_000  # size limit of a file: real configurations have a few thousand bytes
MOST_DIGITS = 30  # of an integer
SEVERITY = attrgetter("severity")  # "error" sorts before "warning", and the sort is stable


BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
LOG_LEVELS = ["debug", "info", "warning", "error", "critical", None]
# The keys whose "auto" transformers' Trainer fills in: inside zero_optimization, and at the top level.
AUTO_KEYS = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "reduce_bucket_size")
FILLED_BY_TRAINER = (*keys.BATCH_KEYS, "gradient_clipping")


def lint_file(file: str | Path, **options: Any) -> list[Finding]:
    """`lint` of a file, plus the keys that are in it twice. Raises `UserError` if it is not a JSON object."""
    config, repeated = _read(Path(file))
    twice = [Finding("error", key, "appears twice, which DeepSpeed refuses: keep one") for key in repeated]
    return sorted([*twice, *lint(config, **options)], key=SEVERITY)


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in a file, and the keys that appear twice."""
    if file.exists() and not file.is_file():
        raise UserError(f"{str(file)!r} is not a text file: give a DeepSpeed configuration in JSON")
    text = read_text(file, most=MOST_BYTES)
    if text is None:
        raise UserError(f"there is no file {str(file)!r}: give a DeepSpeed configuration in JSON")
    parse_json(text, file, Any)  # refuses JSON that is nested too deeply to walk
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        repeated.extend(key for key in counts if counts[key] > 1)
        return dict(pairs)

    def parse_integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise UserError(f"{str(file)!r} holds a number of {len(digits)} digits: no DeepSpeed setting is that large")
        return int(digits)

    config = json.loads(text, object_pairs_hook=note_repeated, parse_int=parse_integer)
    if not isinstance(config, dict):
        kind = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
            type(config), "a number"
        )
        raise UserError(f"{str(file)!r} holds {kind}: a DeepSpeed configuration is a JSON object, in braces")
    return config, sorted(repeated)


def lint(config: Mapping[str, Any], ranks: int | None = None, parameters: int | None = None) -> list[Finding]:
    """All findings, errors first. `ranks` and the model's number of `parameters` allow batch and bucket checks too."""
    findings = [*_top(config), *_batch(config, ranks), *_scalars(config), *_precision(config), *_zero(config)]
    parsed, refusals = parse(config, {finding.key for finding in findings if finding.severity == "error"})
    findings += refusals
    errors = {finding.key for finding in findings if finding.severity == "error"}
    if parsed is not None and f"{ZERO}.stage" not in errors:
        sizes = [finding for finding in _sizes(config, parsed, parameters) if finding.key not in errors]
        findings += [*_combinations(config, parsed), *sizes]
    return sorted(findings, key=SEVERITY)


def _top(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in config.items():
        if key in keys.TOP_KEYS:
            if value == "auto" and key not in FILLED_BY_TRAINER:
                yield Finding("error", key, 'is "auto", which Trainer does not fill in here: DeepSpeed needs a value')
            elif key in keys.OBJECT_KEYS and not isinstance(value, Mapping):
                yield Finding(
                    "error", key, f"is {display_value(value)}, which DeepSpeed refuses: give an object in braces"
                )
        elif key in keys.REMOVED_KEYS:
            yield Finding("error", key, "DeepSpeed 0.19 no longer has this feature: remove the key")
        elif key in keys.ZERO_KEYS or key in keys.ALIASES:
            yield Finding("error", key, "DeepSpeed does not read it here: it belongs inside zero_optimization")
        elif key.startswith("_"):  # a common way to write a comment in JSON
            yield Finding("warning", key, "is ignored by DeepSpeed")
        else:
            yield Finding("error", key, f"is ignored by DeepSpeed{suggest(key, keys.TOP_KEYS)}")
    for block in ("optimizer", "scheduler"):
        if block in config:
            yield Finding("warning", block, "replaces Trainer's own, and Trainer checks that the values of both agree")
    if config.get("activation_checkpointing"):
        yield Finding(
            "warning",
            "activation_checkpointing",
            "is ignored under Trainer: transformers models have their own; in minisft use --activation-checkpointing",
        )


def _batch(config: Mapping[str, Any], ranks: int | None) -> Iterator[Finding]:
    batch: Any
    micro: Any
    steps: Any
    batch, micro, steps = (config.get(name) for name in keys.BATCH_KEYS)
    sequence_parallel = config.get("sequence_parallel_size")  # number of ranks that share the same rows
    if ranks and _is_integer(sequence_parallel) and sequence_parallel > 0:
        ranks = max(1, ranks // sequence_parallel)
    for name, value in zip(keys.BATCH_KEYS, (batch, micro, steps), strict=True):
        if value is not None and value != "auto" and (not _is_integer(value) or value < 1):
            yield Finding("error", name, f"is {display_value(value)}: give a whole number, at least 1")
            return
    if batch is None and micro is None:
        yield Finding("error", keys.BATCH_KEYS[0], "neither this nor train_micro_batch_size_per_gpu is given: give one")
    if not _is_integer(batch):
        return
    micro, steps = micro if _is_integer(micro) else None, steps if _is_integer(steps) else None
    product = (micro or 1) * (steps or 1) * (ranks or 1)
    if micro and steps and ranks:
        if product != batch:
            yield Finding("error", keys.BATCH_KEYS[0], f"is {batch}, but {micro} x {steps} x {ranks} ranks = {product}")
    elif batch % product:
        factors = " x ".join(str(n) for n in (micro, steps, ranks and f"{ranks} ranks") if n)
        yield Finding("error", keys.BATCH_KEYS[0], f"is {batch}, which is not a multiple of {factors}")


def _scalars(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Single values that DeepSpeed does not check: it fails at the first step, or treats any string as true."""
    for key in (*keys.FLAGS, "use_data_before_expert_parallelism"):
        value = config.get(key)
        if isinstance(value, str) and value != "auto":
            yield Finding("error", key, f"is {display_value(value)}, a string: give true or false, without quotes")
    for key in ("gradient_clipping", "gradient_predivide_factor", "steps_per_print"):
        value = config.get(key)
        if key not in config or value == "auto" or (value is None and key == "steps_per_print"):
            continue
        if not isinstance(value, int | float):
            yield Finding("error", key, f"is {display_value(value)}: DeepSpeed fails at the first step; give a number")
        elif key == "gradient_clipping" and not value >= 0:
            yield Finding("warning", key, f"is {display_value(value)}: nothing is clipped")
        elif key != "gradient_clipping" and not value > 0:
            yield Finding("error", key, f"is {display_value(value)}: give a number above 0")
    if "log_level" in config and config["log_level"] not in LOG_LEVELS:
        yield Finding(
            "error",
            "log_level",
            f"DeepSpeed refuses {display_value(config['log_level'])}: use debug, info, warning, error or critical",
        )


def _precision(config: Mapping[str, Any]) -> Iterator[Finding]:
    enabled = []
    for name in ("fp16", "bf16", "bfloat16"):
        block = config.get(name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            yield Finding("error", name, f'is {display_value(block)}: give an object, {{"enabled": true}}')
            continue
        if _is_on(block.get("enabled")):
            enabled.append("bf16" if name == "bfloat16" else name)
        if block.get("enabled") is None and block:
            yield Finding("warning", f"{name}.enabled", "is not given, so the whole block does nothing")
    if len(set(enabled)) > 1:
        yield Finding("error", enabled[0], f"and {enabled[1]} are both enabled, which DeepSpeed refuses: choose one")


def _zero(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What DeepSpeed's class takes, but an engine or Trainer does not use as it is written."""
    zero = config.get(ZERO)
    if isinstance(zero, bool):
        yield Finding("warning", ZERO, f'is deprecated: write {{"stage": {int(zero)}}}')
        return
    if ZERO not in config:
        yield Finding("warning", ZERO, "is not given, so this is stage 0: plain data parallelism")
        return
    if not isinstance(zero, Mapping):
        yield Finding("error", ZERO, f"is {display_value(zero)}: give an object")
        return
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield Finding("error", f"{ZERO}.stage", f"is {display_value(stage)}: give 0, 1, 2 or 3")
        return
    if "stage" not in zero:
        yield Finding("warning", f"{ZERO}.stage", "is not given, so it is 0, and nothing is split")
    for key in zero:
        if key in keys.ALIASES:
            yield Finding("warning", f"{ZERO}.{key}", f"is an alias: write {keys.ALIASES[key]}")
    for key, value in _without_aliases(zero).items():
        name = f"{ZERO}.{key}"
        if key not in keys.ZERO_KEYS:
            continue  # DeepSpeed's class refuses it
        if key in keys.DEPRECATED_ZERO_KEYS:
            yield Finding("warning", name, f"is deprecated: write {keys.DEPRECATED_ZERO_KEYS[key]}")
        if stage not in keys.stages_of(key) and value not in (False, None):
            stages = ", ".join(map(str, keys.stages_of(key)))
            yield Finding("warning", name, f"does nothing at stage {stage}; it is for stage {stages}")
        if value == "auto" and key not in AUTO_KEYS:
            yield Finding("warning", name, 'is "auto", which Trainer does not fill in here: the default is used')
        if key in BUCKETS and isinstance(value, bool):  # the class takes true for 1
            yield Finding("error", name, f"is {display_value(value)}: give a number of elements")
        if isinstance(value, Mapping) and value.get("device") == "nvme" and not value.get("nvme_path"):
            yield Finding("error", f"{name}.nvme_path", "is not given, though the device is nvme: give a folder")


def _without_aliases(zero: Any) -> dict[str, Any]:
    return {keys.canonical(key): value for key, value in zero.items()} if isinstance(zero, Mapping) else {}


def _sizes(config: Mapping[str, Any], parsed: Any, parameters: int | None) -> Iterator[Finding]:
    """Sizes that do not suit a model of this number of `parameters`, and defaults that suit few models."""
    stage, values = parsed.zero_optimization_stage, parsed.zero_config
    zero = _without_aliases(config.get(ZERO))
    for key in BUCKETS:
        value = zero.get(key)
        if (
            stage not in keys.stages_of(key)
            or value == "auto"
            or (value is None and key == "stage3_prefetch_bucket_size")
        ):
            continue
        size = getattr(values, key.removeprefix("stage3_"))
        is_given = f"{'is' if value is not None else 'is not given, so it is'} {size:,} elements"
        when_held = " and stays allocated all the time" if stage == 3 and key == "reduce_bucket_size" else ""
        if parameters is not None and size > parameters:
            yield Finding("warning", f"{ZERO}.{key}", f"{is_given}: more than the model's {parameters:,}{when_held}")
        elif value is None and parameters is None:
            yield Finding("warning", f"{ZERO}.{key}", f"{is_given}{when_held}: size it to the model")
    if stage != 3:
        return
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        size = getattr(values, key.removeprefix("stage3_"))
        if parameters is not None and size >= parameters and zero.get(key) != "auto":
            verb = "is" if key in zero else "is not given, so it is"
            yield Finding(
                "warning",
                f"{ZERO}.{key}",
                f"{verb} {size:,}, no less than the model's {parameters:,} parameters: once gathered they may "
                "all stay, and stage 3 saves nothing while it computes",
            )
    # DeepSpeed moves the value of the deprecated key to the one that replaces it.
    if not values.gather_16bit_weights_on_model_save:
        message = "is not true: checkpoints will have no model.safetensors, only each rank's part"
        yield Finding("warning", f"{ZERO}.stage3_gather_16bit_weights_on_model_save", message)


def _combinations(config: Mapping[str, Any], parsed: Any) -> Iterator[Finding]:
    """Combinations of settings that DeepSpeed's engine refuses."""
    stage, zero = parsed.zero_optimization_stage, parsed.zero_config
    if zero.reduce_scatter and stage >= 2 and str(config.get("gradient_allreduce_op")).lower() != "sum":
        for key, harmless in (("prescale_gradients", (False, None)), ("gradient_predivide_factor", (1, None))):
            if key in config and config[key] not in harmless:
                value = display_value(config[key])
                message = f"DeepSpeed refuses {value} at stage {stage}, unless reduce_scatter is false"
                yield Finding("error", key, message)
    if zero.legacy_stage1 and stage:
        yield Finding("error", f"{ZERO}.legacy_stage1", "no longer exists, so DeepSpeed refuses it: remove it")
    on_cpu = zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"
    in_half = {
        "fp16.fp16_master_weights_and_grads": parsed.float16_config.fp16_master_weights_and_grads,
        "bf16.bf16_master_weights_and_grads": parsed.bfloat16_config.bf16_master_weights_and_grads
        and not parsed.bfloat16_config.bf16_optimizer_states,
    }
    for key, is_set in in_half.items():
        if is_set and stage in (1, 2) and not on_cpu:
            yield Finding("error", key, "DeepSpeed refuses it unless offload_optimizer's device is cpu")
    if config.get("managed_gradient_accumulation") is False and stage < 2 and zero.overlap_comm:
        message = "DeepSpeed refuses false together with overlap_comm below stage 2"
        yield Finding("error", "managed_gradient_accumulation", message)


def _is_on(value: Any) -> bool:
    """Whether DeepSpeed's classes read a value as true."""
    return str(value).lower() in ("true", "1", "1.0", "yes", "on", "y", "t")


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
