"""Finds what the installed DeepSpeed refuses or ignores in a configuration, by running its own classes.

Its configuration class parses an object that records which keys are read: a key that is never read is ignored. Its
engine builds the optimizer and the scheduler for one parameter, without compiling their kernels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from pydantic import ValidationError

from minisft.system import silenced
from minisft.text import one_line
from minisft.zero import lint_keys as keys
from minisft.zero.lint_finding import Finding, display_value, is_number, suggest
from minisft.zero.lint_keys import ZERO

# Where in a file other configuration classes have their settings.
BLOCKS = {known.__name__: path for path, known in keys.CLASSES.items()} | {
    "CommsLoggerConfig": ("comms_logger",),
    "CompileConfig": ("compile",),
    "HybridEngineConfig": ("hybrid_engine",),
}
# Stand-ins, of the right type, for the values that Trainer fills in where a file says "auto".
FILLED: dict[str, dict[str, Any]] = {
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "scheduler": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1, "total_num_steps": 2},
}
NUMBERS = {"lr": 1, "eps": 1, "weight_decay": 1, "betas": 2}  # how many numbers each key takes
MUON_KEYS = ("muon_lr", "adam_lr", "adam_w_mode", "torch_adam", "fp32_optimizer_states")
_UNKNOWN = re.compile(r"unexpected keyword argument '(.+)'")
MOST_ERRORS = 50


def parse(config: Mapping[str, Any], known: Collection[str] = ()) -> tuple[Any, list[Finding]]:
    """DeepSpeed's reading of a configuration, and what it refuses or ignores, except the keys in `known`.

    What it refuses is left out and the rest is read again, so that one mistake hides no other. The reading is None if
    a combination is refused. `lint` checks the batch sizes, and "auto", which Trainer replaces beforehand or DeepSpeed
    drops.
    """
    settings = {
        key: value for key, value in _filled(config).items() if key not in {*keys.BATCH_KEYS, *keys.PARALLEL_KEYS}
    }
    with silenced("DeepSpeed"):
        parsed, block, findings = _parsed(settings, known)
        if parsed is not None:
            findings += [*_unread(block), *_engine_refuses(parsed, settings)]
    return parsed, [finding for finding in findings if finding.key not in known]


def _parsed(settings: dict[str, Any], known: Collection[str]) -> tuple[Any, keys.Block, list[Finding]]:
    """An instance of DeepSpeed's class, what it has read, and findings; removes from `settings` what it refuses."""
    findings: list[Finding] = []
    while True:
        block = keys.Block(settings | keys.ONE_ROW)
        try:
            return keys.DeepSpeedConfig(block), block, findings
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
            refused = [(*BLOCKS.get(error.title, ()), *map(str, each["loc"])) for each in errors]
            pairs = zip(refused, errors, strict=True)
            findings += [_refusal(path, each) for path, each in itertools.islice(pairs, MOST_ERRORS)]
        except Exception as error:  # its other functions raise exceptions of many types
            culprit = _culprit(block, str(error))
            refused = [(culprit,)]
            if culprit not in known and (culprit or not (known or findings)):
                because = f" because of {culprit}" if culprit else ""
                message = f"refuses the file{because}: {one_line(error, 200)}"
                findings.append(Finding("error", "DeepSpeed", message))
        removed = [_remove(settings, path) for path in refused]
        if not any(removed):
            return None, block, findings


def _refusal(path: tuple[str, ...], error: Mapping[str, Any]) -> Finding:
    """The finding for one error of a configuration class, at `path` in the file."""
    message = f"DeepSpeed refuses: {error['msg']}"
    if error["type"] == "extra_forbidden":
        *outer, key = path
        message = f"DeepSpeed refuses it{suggest(key, keys.names_in(*outer))}"
        if outer == [ZERO] and key in keys.TOP_KEYS:
            message = f"DeepSpeed refuses it here: move it out of {ZERO}, to the top level"
    return Finding("error", ".".join(path) or "DeepSpeed", message)


def _remove(settings: dict[str, Any], path: tuple[str, ...]) -> bool:
    """Remove what is at `path`, or else the block that it is in; whether there was anything to remove."""
    inner: Any = settings
    for key in path[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if isinstance(inner, dict) and path and path[-1] in inner:
        del inner[path[-1]]
        return True
    return bool(path) and settings.pop(path[0], None) is not None


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with each "auto" removed, or replaced where Trainer would fill in a value."""
    filled = _without_auto(config)
    for name, values in FILLED.items():
        block = config.get(name)
        if isinstance(block, Mapping) and isinstance(params := block.get("params"), Mapping):
            replaced = {key: values[key] for key, value in params.items() if value == "auto" and key in values}
            filled[name]["params"] = dict(params) | replaced
    return filled


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _culprit(block: keys.Block, reason: str) -> str:
    """The key that DeepSpeed refuses for this reason even on its own; empty if it only refuses a combination."""
    for key in [key for key in dict.keys(block) if key in keys.TOP_KEYS or key in keys.REMOVED_KEYS]:
        try:
            keys.DeepSpeedConfig(keys.Block({key: block[key]} | keys.ONE_ROW))
        except Exception as error:
            if str(error) == reason:
                return key
    return ""


def _unread(block: keys.Block, *path: str) -> Iterator[Finding]:
    """The keys that DeepSpeed did not read, in the blocks that it reads key by key."""
    for name, inner in dict.items(block):
        inner_path = (*path, name)
        if not isinstance(inner, keys.Block) or inner_path[1:] == ("params",):  # params are passed to a class
            continue
        yield from _unread(inner, *inner_path)
        if inner.whole or not inner.read:
            continue
        for key in [key for key in dict.keys(inner) if key not in inner.read]:
            severity = "warning" if key.startswith("_") else "error"
            hint = ": it belongs inside params" if key in FILLED.get(name, ()) else suggest(key, inner.read)
            yield Finding(severity, ".".join((*inner_path, key)), f"is ignored by DeepSpeed{hint}")


def _engine_refuses(parsed: Any, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What an engine refuses in a configuration that parses: its data types, optimizer and scheduler."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    class Engine(DeepSpeedEngine):
        """An engine with only the attributes that its settings decide."""

        def __init__(self) -> None:
            self.__dict__.update(_config=parsed, client_optimizer=None, has_moe_layers=False, overlap_step=False)
            self.__dict__.update(zenflow=parsed.zero_config.zenflow is not None)

    engine = Engine()
    yield from _data_types(engine)
    with without_kernels():
        if "optimizer" in config:
            yield from _optimizer(engine)
        if "scheduler" in config:
            yield from _scheduler(engine)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Lets any machine construct DeepSpeed's optimizers, which then cannot step: no kernels are compiled."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu.no_impl import NotImplementedBuilder

    with ExitStack() as stack:
        for builder in (OpBuilder, NotImplementedBuilder):
            stack.enter_context(mock.patch.object(builder, "load", lambda *args, **kwargs: mock.Mock()))
        yield


def _data_types(engine: Any) -> Iterator[Finding]:
    try:
        model_dtype, gradient_dtype = engine.get_data_types()
        engine._assert_valid_mixed_precision_config()
    except Exception as error:
        yield Finding("error", "data_types", f"DeepSpeed refuses it: {one_line(error, 200)}")
        return
    if not engine.zero_optimization() and model_dtype != gradient_dtype:
        message = f"DeepSpeed refuses {gradient_dtype} at stage 0 if the model computes in {model_dtype}"
        yield Finding("error", "data_types.grad_accum_dtype", message)


def _optimizer(engine: Any) -> Iterator[Finding]:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from torch import optim

    name, params = engine.optimizer_name(), engine.optimizer_params() or {}
    if name is None:
        yield Finding("error", "optimizer.type", "is not given, and DeepSpeed needs one: use AdamW, for example")
        return
    if not engine._is_supported_optimizer(name):
        hint = suggest(name, [*DEEPSPEED_OPTIMIZERS, *optim.__all__], "use AdamW, for example")
        yield Finding("error", "optimizer.type", f"DeepSpeed refuses {display_value(name)}{hint}")
        return
    for key, count in NUMBERS.items():
        if key in params and not _are_numbers(params[key], count):
            wanted = "a number" if count == 1 else f"a list of {count} numbers"
            yield Finding("error", f"optimizer.params.{key}", f"is {display_value(params[key])}: give {wanted}")
            return
    engine._config.optimizer_params = params = dict(params)
    built = yield from _build("optimizer", params, lambda: engine._configure_basic_optimizer([_parameter()]))
    if built and "lr" not in params:
        rate = built.param_groups[0].get("lr")
        message = f"is not given, so DeepSpeed trains at {rate}, regardless of Trainer's learning rate"
        yield Finding("warning", "optimizer.params.lr", message)
    if name == "muon":
        known = {*engine._MUON_HALF_KEYS, *engine._ADAM_HALF_KEYS, *MUON_KEYS}
        for key in [key for key in params if key not in known]:
            yield Finding("error", f"optimizer.params.{key}", f"is ignored by DeepSpeed{suggest(key, known)}")
        return
    tested = built is None or type(built) in ZERO_SUPPORTED_OPTIMIZERS or engine.zero_allow_untested_optimizer()
    if engine.zero_optimization() and not tested:
        message = f"DeepSpeed refuses {name} under ZeRO: use AdamW, or set zero_allow_untested_optimizer"
        yield Finding("error", "optimizer.type", message)


def _scheduler(engine: Any) -> Iterator[Finding]:
    from deepspeed.runtime import lr_schedules
    from torch import optim

    name, params = engine.scheduler_name(), engine.scheduler_params()
    own, of_torch = lr_schedules.VALID_LR_SCHEDULES, optim.lr_scheduler.__all__
    wrapped = engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled()
    if name is None:
        message = "is not given: DeepSpeed ignores the whole block, and Trainer creates no scheduler of its own"
        yield Finding("error", "scheduler.type", message)
    elif name in of_torch and wrapped:
        message = f"DeepSpeed refuses PyTorch's {name} under ZeRO or in half precision: use one of {', '.join(own)}"
        yield Finding("error", "scheduler.type", message)
    elif name not in (*own, *of_torch):
        hint = suggest(str(name), own if wrapped else [*own, *of_torch], f"use one of {', '.join(own)}")
        yield Finding("error", "scheduler.type", f"DeepSpeed refuses {display_value(name)}{hint}")
    elif not isinstance(params, Mapping):
        given = "is not given" if params is None else f"is {display_value(params)}"
        yield Finding("error", "scheduler.params", f"{given}, which DeepSpeed refuses: write at least {{}}")
    else:
        engine._config.scheduler_params = params = dict(params)
        optimizer = optim.AdamW([_parameter()])
        yield from _build("scheduler", params, lambda: engine._scheduler_from_config(optimizer))


def _are_numbers(value: Any, count: int) -> bool:
    values = value if count > 1 and isinstance(value, list) else [value]
    return len(values) == count and all(map(is_number, values))


def _parameter() -> Any:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    setattr(parameter, "use_muon", True)  # noqa: B010 (DeepSpeed reads it from the parameter)
    return parameter


def _build(block: str, params: dict[str, Any], make: Callable[[], Any]) -> Generator[Finding, None, Any]:
    """The result of `make`. Yields a finding per failure; removes unknown keys from `params` until it succeeds."""
    for _ in range(MOST_ERRORS):
        try:
            return make()
        except Exception as error:  # each class raises its own
            reason = "it needs the package mup" if isinstance(error, NameError) else one_line(error, 200)
            unknown = _UNKNOWN.search(reason)
            key = unknown[1] if unknown else None
            if key is None or key not in params:
                yield Finding("error", f"{block}.params" if params else block, f"DeepSpeed refuses it: {reason}")
                return None
            yield Finding(
                "error", f"{block}.params.{key}", f"DeepSpeed refuses it{suggest(key, FILLED[block].keys() - {key})}"
            )
            del params[key]
    return None
