"""The keys of a DeepSpeed 0.19 configuration: DeepSpeed's classes name most of them, and here is what they do not say.

The top-level keys have no class: they are those that DeepSpeed reads of an empty configuration. At which stages a key
has an effect is in its engine alone, and so in the lists below.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping
from typing import Any

from minisft.system import skip_accelerator_search

skip_accelerator_search()

from deepspeed.runtime import config  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.runtime.zero.offload_config import (  # noqa: E402
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

DeepSpeedConfig = config.DeepSpeedConfig
REMOVED_KEYS = frozenset(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
ZERO = "zero_optimization"
ONE_ROW = {"train_micro_batch_size_per_gpu": 1}
# The class that checks each of these blocks, by its place in a file.
CLASSES: dict[tuple[str, ...], Any] = {
    (ZERO,): DeepSpeedZeroConfig,
    (ZERO, "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
    (ZERO, "offload_param"): DeepSpeedZeroOffloadParamConfig,
    ("fp16",): DeepSpeedFP16Config,
    ("bf16",): DeepSpeedBF16Config,
}
_FIELDS = DeepSpeedZeroConfig.model_fields
# DeepSpeed's own names for some fields, which it also accepts; Trainer does not look for them.
ALIASES: dict[str, str] = {name: field.alias for name, field in _FIELDS.items() if field.alias}
ZERO_KEYS = [field.alias or name for name, field in _FIELDS.items()]
_ABOUT = {name: field.json_schema_extra for name, field in _FIELDS.items() if isinstance(field.json_schema_extra, dict)}
DEPRECATED_ZERO_KEYS = {name: about["new_param"] for name, about in _ABOUT.items() if about.get("deprecated")}


class Block(dict):
    """A JSON object that records which of its keys are read; `whole` means that it was iterated or copied."""

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

    def __copy__(self) -> Block:  # DeepSpeed reads a copy
        return self

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return dict(self)


def canonical(key: str) -> str:
    """The name of a key of `zero_optimization` that Trainer looks for, too."""
    return ALIASES.get(key, key)


def names_in(*path: str) -> list[str]:
    """The keys of the block at `path`, as DeepSpeed's class names them; empty for another block."""
    if path == (ZERO,):
        return ZERO_KEYS
    return list(CLASSES[path].model_fields) if path in CLASSES else []


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_read = Block(ONE_ROW)
_defaults = vars(DeepSpeedConfig(_read))
PARALLEL_KEYS = frozenset({"sequence_parallel_size", "data_parallel_size"})  # these need that many processes
TOP_KEYS = frozenset(_read.read) - REMOVED_KEYS | PARALLEL_KEYS
# Those whose value is true or false; DeepSpeed takes any text for true.
FLAGS = [key for key in sorted(TOP_KEYS) if isinstance(_defaults.get(key), bool)]
OBJECT_KEYS = _words(
    """
    optimizer scheduler activation_checkpointing flops_profiler data_types checkpoint tensorboard wandb csv_monitor
    comet comms_logger autotuning data_efficiency pipeline hybrid_engine tensor_parallel compile torch_autocast
    weight_quantization
    """
)
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# The keys of `zero_optimization` that have an effect at some stages only, besides those that begin with `stage3_`.
AT_STAGE_3 = _words(
    """
    offload_param cpu_offload_param sub_group_size zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings leaf_module
    """
)
AT_STAGES_1_AND_2 = _words(
    """
    use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size compute_grad_norm load_from_fp32_weights
    ignore_unused_parameters round_robin_gradients
    """
)


def stages_of(key: str) -> tuple[int, ...]:
    """The stages at which a key of `zero_optimization` has an effect."""
    if key == "stage":
        return (0, 1, 2, 3)
    if key == "legacy_stage1":
        return (1,)
    if key in AT_STAGE_3 or key.startswith("stage3_"):
        return (3,)
    return (1, 2) if key in AT_STAGES_1_AND_2 else (1, 2, 3)
