"""The keys that DeepSpeed 0.19 reads, taken from its `runtime/config.py`; a test compares them with its classes."""

from __future__ import annotations


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
REMOVED_KEYS = _words(
    """
    nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity
    graph_harvesting curriculum_learning progressive_layer_drop
    """
)
OBJECT_KEYS = _words(
    """
    optimizer scheduler activation_checkpointing flops_profiler data_types checkpoint tensorboard wandb csv_monitor
    comet comms_logger autotuning data_efficiency pipeline hybrid_engine tensor_parallel compile torch_autocast
    weight_quantization
    """
)
# The keys of `zero_optimization`, each with the stages at which it has an effect.
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
# DeepSpeed's own names for these fields, which it also accepts; Trainer does not look for them.
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
PARALLEL_KEYS = ("sequence_parallel_size", "data_parallel_size")  # these need that many processes
