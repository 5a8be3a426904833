"""What the installed DeepSpeed does with a configuration, found out by asking its own classes.

Its configuration class reads an object that notes which keys are read: what nobody reads is ignored. Its engine makes
the optimizer and the scheduler, for one parameter, without the kernels that it would compile for them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Container, Generator, ItemsView, Iterator, KeysView, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from minisft.text import one_line
from minisft.zero.lint_finding import Finding, display_value, is_number, meant
from minisft.zero.lint_keys import BATCH_KEYS, PARALLEL_KEYS, TOP_KEYS

# Of DeepSpeed's configuration classes, where in a file their settings are.
BLOCKS = {
    "DeepSpeedZeroConfig": ("zero_optimization",),
    "DeepSpeedFP16Config": ("fp16",),
    "DeepSpeedBF16Config": ("bf16",),
    "CommsLoggerConfig": ("comms_logger",),
    "CompileConfig": ("compile",),
    "HybridEngineConfig": ("hybrid_engine",),
}
# What Trainer fills in where a file says "auto", as values of the right kind.
FILLED: dict[str, dict[str, Any]] = {
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "scheduler": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1, "total_num_steps": 2},
}
NUMBERS = {"lr": 1, "eps": 1, "weight_decay": 1, "betas": 2}  # how many numbers each key takes
MUON_KEYS = ("muon_lr", "adam_lr", "adam_w_mode", "torch_adam", "fp32_optimizer_states")
_UNKNOWN = re.compile(r"unexpected keyword argument '(.+)'")
MOST_ERRORS = 50


class Block(dict):
    """A JSON object that records which of its keys are read; `whole` once it was iterated or copied."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__({key: Block(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.read: set[str] = set()
        self.whole = False

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.read.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.whole = True
        return super().__iter__()

    # A dict's own views and copies would bypass the methods above.
    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return dict(self)


def examined(config: Mapping[str, Any], known: Container[str] = ()) -> list[Finding]:
    """What DeepSpeed refuses or ignores in a configuration, except the keys in `known`; empty if it is not installed.

    The batch sizes are left to `lint`, and so is "auto", which Trainer fills in first or DeepSpeed drops.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # skips its probing for accelerators, and a warning
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    except ImportError:
        return []
    given = {key: value for key, value in _filled(config).items() if key not in BATCH_KEYS + PARALLEL_KEYS}
    block = Block(given | {"train_micro_batch_size_per_gpu": 1})
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        parsed = DeepSpeedConfig(block)
    except Exception as error:  # what it raises is of many kinds
        culprit = _culprit(DeepSpeedConfig, block, str(error))
        found = [] if culprit in known else _refused(error, culprit)
    else:
        found = [*_unread(block), *_engine_refuses(parsed, config)]
    finally:
        logger.setLevel(level)
    return [finding for finding in found if finding.key not in known]


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without "auto", or with what Trainer puts there."""
    filled = _without_auto(config)
    for name, values in FILLED.items():
        given = config.get(name)
        if isinstance(given, Mapping) and isinstance(params := given.get("params"), Mapping):
            own = {key: values[key] for key, value in params.items() if value == "auto" and key in values}
            filled[name]["params"] = dict(params) | own
    return filled


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _culprit(read: Callable[[Block], Any], block: Block, reason: str) -> str:
    """The key that DeepSpeed refuses for this reason even alone; empty if only several together are refused."""
    for key in [key for key in dict.keys(block) if key in TOP_KEYS]:
        try:
            read(Block({key: block[key], "train_micro_batch_size_per_gpu": 1}))
        except Exception as error:
            if str(error) == reason:
                return key
    return ""


def _refused(error: Exception, key: str) -> list[Finding]:
    if not hasattr(error, "errors"):
        of = f" for its {key}" if key else ""
        return [Finding("error", "DeepSpeed", f"refuses the file{of}: {one_line(error, 200)}")]
    block = BLOCKS.get(getattr(error, "title", ""), ())
    return [
        Finding("error", ".".join(map(str, (*block, *one["loc"]))) or "DeepSpeed", f"DeepSpeed refuses: {one['msg']}")
        for one in error.errors(include_url=False, include_input=False)[:MOST_ERRORS]
    ]


def _unread(block: Block, *place: str) -> Iterator[Finding]:
    """The keys that DeepSpeed did not read, in the blocks that it reads key by key."""
    for name, inner in dict.items(block):
        where = (*place, name)
        if not isinstance(inner, Block) or where[1:] == ("params",):  # those go to a class
            continue
        yield from _unread(inner, *where)
        if inner.whole or not inner.read:
            continue
        for key in [key for key in dict.keys(inner) if key not in inner.read]:
            severity = "warning" if key.startswith("_") else "error"
            belongs = ": it belongs inside params" if key in FILLED.get(name, ()) else meant(key, inner.read)
            yield Finding(severity, ".".join((*where, key)), f"is ignored by DeepSpeed{belongs}")


def _engine_refuses(parsed: Any, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What an engine raises of a configuration that the class takes: of data types, optimizer and scheduler."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    class Engine(DeepSpeedEngine):
        """Of an engine what its settings decide."""

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
    """DeepSpeed's optimizers can be made on any machine, and cannot step: their kernels are not compiled."""
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu.no_impl import NotImplementedBuilder

    with ExitStack() as stack:
        for builder in (OpBuilder, NotImplementedBuilder):
            stack.enter_context(mock.patch.object(builder, "load", lambda *given, **more: mock.Mock()))
        yield


def _data_types(engine: Any) -> Iterator[Finding]:
    try:
        computed, kept = engine.get_data_types()
        engine._assert_valid_mixed_precision_config()
    except Exception as error:
        yield Finding("error", "data_types", f"DeepSpeed refuses it: {one_line(error, 200)}")
        return
    if not engine.zero_optimization() and computed != kept:
        yield Finding(
            "error", "data_types.grad_accum_dtype", f"DeepSpeed refuses {kept} at stage 0, where {computed} computes"
        )


def _optimizer(engine: Any) -> Iterator[Finding]:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from torch import optim

    name, params = engine.optimizer_name(), engine.optimizer_params() or {}
    if name is None:
        yield Finding("error", "optimizer.type", "is not given: DeepSpeed refuses to train, for it has no optimizer")
        return
    if not engine._is_supported_optimizer(name):
        hint = meant(name, [*DEEPSPEED_OPTIMIZERS, *optim.__all__], "take AdamW, say")
        yield Finding("error", "optimizer.type", f"DeepSpeed refuses {display_value(name)}{hint}")
        return
    for key, numbers in NUMBERS.items():
        if key in params and not _numbers(params[key], numbers):
            wanted = "a number" if numbers == 1 else f"a list of {numbers} numbers"
            yield Finding("error", f"optimizer.params.{key}", f"is {display_value(params[key])}: give {wanted}")
            return
    engine._config.optimizer_params = params = dict(params)
    made = yield from _made("optimizer", params, lambda: engine._configure_basic_optimizer([_parameter()]))
    if made and "lr" not in params:
        rate = made.param_groups[0].get("lr")
        message = f"is not given, so DeepSpeed trains at {rate}, whatever Trainer's learning rate is"
        yield Finding("warning", "optimizer.params.lr", message)
    if name == "muon":
        known = {*engine._MUON_HALF_KEYS, *engine._ADAM_HALF_KEYS, *MUON_KEYS}
        for key in [key for key in params if key not in known]:
            yield Finding("error", f"optimizer.params.{key}", f"is ignored by DeepSpeed{meant(key, known)}")
        return
    tested = made is None or type(made) in ZERO_SUPPORTED_OPTIMIZERS or engine.zero_allow_untested_optimizer()
    if engine.zero_optimization() and not tested:
        message = f"DeepSpeed refuses {name} under ZeRO: take AdamW, or set zero_allow_untested_optimizer"
        yield Finding("error", "optimizer.type", message)


def _scheduler(engine: Any) -> Iterator[Finding]:
    from deepspeed.runtime import lr_schedules
    from torch import optim

    name, params = engine.scheduler_name(), engine.scheduler_params()
    own, of_torch = lr_schedules.VALID_LR_SCHEDULES, optim.lr_scheduler.__all__
    wrapped = engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled()
    if name is None:
        message = "is not given: the whole block is ignored by DeepSpeed, and Trainer makes no other"
        yield Finding("error", "scheduler.type", message)
    elif name in of_torch and wrapped:
        message = f"DeepSpeed refuses {name}, of PyTorch, under ZeRO or in half precision: take one of {', '.join(own)}"
        yield Finding("error", "scheduler.type", message)
    elif name not in (*own, *of_torch):
        hint = meant(str(name), own if wrapped else [*own, *of_torch], f"take one of {', '.join(own)}")
        yield Finding("error", "scheduler.type", f"DeepSpeed refuses {display_value(name)}{hint}")
    elif params is None:
        yield Finding("error", "scheduler.params", "is not given: DeepSpeed refuses it, write at least {}")
    else:
        engine._config.scheduler_params = params = dict(params)
        optimizer = optim.AdamW([_parameter()])
        yield from _made("scheduler", params, lambda: engine._scheduler_from_config(optimizer))


def _numbers(value: Any, how_many: int) -> bool:
    given = value if how_many > 1 and isinstance(value, list) else [value]
    return len(given) == how_many and all(map(is_number, given))


def _parameter() -> Any:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    setattr(parameter, "use_muon", True)  # noqa: B010 (DeepSpeed reads it from the parameter)
    return parameter


def _made(block: str, params: dict[str, Any], make: Callable[[], Any]) -> Generator[Finding, None, Any]:
    """What `make` returns for `params`, and the findings on the way; unknown keys are removed until it succeeds."""
    for _ in range(MOST_ERRORS):
        try:
            return make()
        except Exception as error:  # each class has its own
            reason = "it needs the package mup" if isinstance(error, NameError) else one_line(error, 200)
            unknown = _UNKNOWN.search(reason)
            key = unknown[1] if unknown else None
            if key is None or key not in params:
                yield Finding("error", f"{block}.params" if params else block, f"DeepSpeed refuses it: {reason}")
                return None
            yield Finding(
                "error", f"{block}.params.{key}", f"DeepSpeed refuses it{meant(key, FILLED[block].keys() - {key})}"
            )
            del params[key]
    return None
