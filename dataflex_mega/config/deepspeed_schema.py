"""What becomes of each key of a DeepSpeed configuration when this package lays the run out.

Three fates: config/deepspeed.py acts on a key; a key only tunes DeepSpeed's own buffers, messages or logs (TUNING); a key
asks for something that is not done here (REFUSED). A key with no fate is unknown.
"""

from __future__ import annotations

COMMENT = "_comment"  # allowed everywhere
ACTED_ON = frozenset(
    """
    zero_optimization fp16 bf16 bfloat16 gradient_clipping gradient_accumulation_steps train_micro_batch_size_per_gpu
    train_batch_size optimizer scheduler activation_checkpointing data_types
    """.split()
)
TUNING = frozenset(
    """
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer comms_config comms_logger steps_per_print
    wall_clock_breakdown memory_breakdown dump_state monitor_config tensorboard csv_monitor wandb comet flops_profiler
    communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
    sparse_gradients disable_allgather checkpoint load_universal_checkpoint use_node_local_storage aio timers
    graph_harvesting use_data_before_expert_parallelism vocabulary_size dataloader_drop_last
    """.split()
)
NOT_THERE = "it is not there for a run with a role"
MEGATRON_SHARES = (
    "engine: megatron has tensor_model_parallel_size, pipeline_model_parallel_size and context_parallel_size"
)
# Refused when they are on: true, a mapping with `enabled: true`, or one that has no `enabled` and is not empty.
REFUSED: dict[str, str] = {
    "pipeline": MEGATRON_SHARES,
    "sequence_parallel": MEGATRON_SHARES,
    "fp8": "use bf16: true",
    "amp": "use fp16: true or bf16: true",
    "torch_autocast": "use fp16: true or bf16: true",
    "compile": "leave it out",
    **dict.fromkeys(
        (
            "elasticity", "autotuning", "compression_training", "data_efficiency", "curriculum_learning",
            "sparse_attention", "hybrid_engine", "inference", "progressive_layer_drop", "eigenvalue", "quantize_training",
            "weight_quantization", "nebula",
        ),
        NOT_THERE,
    ),
}  # fmt: skip
# Refused when they are above 1.
REFUSED_SIZES = {
    "sequence_parallel_size": MEGATRON_SHARES,
    "tensor_parallel.autotp_size": MEGATRON_SHARES,
    "tensor_parallel.tp_size": MEGATRON_SHARES,
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ is not there; fsdp: full_shard shards over all processes",
    "zero_optimization.mics_shard_size": "MiCS is not there; fsdp: full_shard shards over all processes",
}

ZERO_ACTED_ON = frozenset(
    "stage offload_optimizer offload_param cpu_offload cpu_offload_params cpu_offload_use_pin_memory".split()
)
ZERO_TUNING = frozenset(
    """
    overlap_comm contiguous_gradients allgather_partitions reduce_scatter round_robin_gradients reduce_bucket_size
    allgather_bucket_size sub_group_size use_multi_rank_bucket_allreduce load_from_fp32_weights elastic_checkpoint
    stage3_prefetch_bucket_size prefetch_bucket_size stage3_param_persistence_threshold param_persistence_threshold
    stage3_model_persistence_threshold model_persistence_threshold stage3_max_live_parameters max_live_parameters
    stage3_max_reuse_distance max_reuse_distance stage3_module_granularity_threshold module_granularity_threshold
    stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params ignore_unused_parameters legacy_stage1
    memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings
    enable_sanity_checks save_muon_momentum_buffer_in_memory
    """.split()
)
GATHERS_WEIGHTS = frozenset(
    """
    stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    """.split()
)
ZERO_REFUSED = {
    **dict.fromkeys(
        (
            "zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
            "zeropp_loco_param",
        ),
        "ZeRO++ is not there; leave it out",
    ),
    "mics_hierarchical_params_gather": "MiCS is not there; leave it out",
    "zenflow": "every step updates all parameters; leave it out",
}  # fmt: skip

SECTIONS: dict[str, frozenset[str]] = {
    "zero_optimization": ZERO_ACTED_ON
    | ZERO_TUNING
    | GATHERS_WEIGHTS
    | frozenset(ZERO_REFUSED)
    | {"zero_hpz_partition_size", "mics_shard_size"},
    "zero_optimization.offload_optimizer": frozenset(
        """
        device nvme_path buffer_count buffer_size pin_memory pipeline pipeline_read pipeline_write fast_init ratio
        super_offload cpuadam_cores_perc max_in_cpu
        """.split()
    ),
    "zero_optimization.offload_param": frozenset(
        "device nvme_path buffer_count buffer_size pin_memory max_in_cpu".split()
    ),
    "fp16": frozenset(
        """
        enabled auto_cast loss_scale loss_scale_window initial_scale_power hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """.split()
    ),
    "bf16": frozenset(
        """
        enabled auto_cast loss_scale loss_scale_window initial_scale_power hysteresis min_loss_scale
        immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states
        """.split()
    ),
    "optimizer": frozenset(("type", "params", "legacy_fusion")),
    "optimizer.params": frozenset(
        """
        lr betas eps weight_decay bias_correction amsgrad adam_w_mode torch_adam fused foreach adamw_mode
        """.split()
    ),
    "scheduler": frozenset(("type", "params")),
    "scheduler.params": frozenset(
        """
        warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps last_batch_iteration
        """.split()
    ),
    "activation_checkpointing": frozenset(
        """
        partition_activations cpu_checkpointing contiguous_memory_optimization number_checkpoints
        synchronize_checkpoint_boundary profile
        """.split()
    ),
    "data_types": frozenset(("grad_accum_dtype",)),
    "tensor_parallel": frozenset(
        """
        autotp_size tp_size tp_overlap_comm tensor_parallel injection_policy_tuple keep_module_on_host
        replace_with_kernel_inject enabled tp_grain_size dtype preset_model partition_config
        """.split()
    ),
}
TOP_LEVEL = ACTED_ON | TUNING | frozenset(REFUSED) | {"tensor_parallel", "sequence_parallel_size"}
