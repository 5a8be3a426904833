"""The keys of a DeepSpeed 0.19 configuration: DeepSpeed's classes name most of them, and here is what they do not say.

They do not say which top-level keys there are (`runtime/config.py` reads them one by one), nor at which stage a key has
an effect. A test compares these lists with live engines.
"""

from __future__ import annotations

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
OBJECT_KEYS = _words(
    """
    optimizer scheduler activation_checkpointing flops_profiler data_types checkpoint tensorboard wandb csv_monitor
    comet comms_logger autotuning data_efficiency pipeline hybrid_engine tensor_parallel compile torch_autocast
    weight_quantization
    """
)
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PARALLEL_KEYS = ("sequence_parallel_size", "data_parallel_size")  # these need that many processes
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
