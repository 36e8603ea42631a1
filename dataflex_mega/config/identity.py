"""What a checkpoint must agree with before it is resumed: the keys that decide what is computed, and the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.config.parse import MEGATRON_KEYS, RunConfig

# Keys that may change between the runs of one training: where things go, how often, how the global batch is cut, and
# how long to train. Everything else is part of what the run is.
FREE_KEYS = frozenset(
    """
    output_dir overwrite_output_dir logging_dir logging_steps logging_strategy logging_first_step logging_nan_inf_filter
    log_level log_level_replica log_on_each_node disable_tqdm report_to run_name plot_loss project trackio_space_id
    save_steps save_strategy save_total_limit save_on_each_node eval_steps eval_strategy eval_delay eval_on_start
    per_device_eval_batch_size eval_accumulation_steps do_eval early_stopping_steps early_stopping_min_delta
    per_device_train_batch_size gradient_accumulation_steps dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor dataloader_persistent_workers preprocessing_num_workers overwrite_cache cache_dir
    preprocessing_batch_size fsdp fsdp_config ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_broadcast_buffers use_cpu resume_from_checkpoint push_to_hub hub_model_id hub_token hub_strategy
    hub_private_repo disable_gradient_checkpointing use_reentrant_gc max_steps num_train_epochs train_step
    save_only_model dataset_dir corpus_dir eval_corpus_dir media_dir tokenized_path data_shared_file_system
    callbacks resume_ignore score_batch_size prefetch tensorboard on_non_finite engine components_cfg_file component_name
    save_on_signal train_type selector mixer reorder pipeline weighter
    """.split()
)
# Those of Megatron's keys that decide what is computed. The others say how the same is laid out.
AFFECTS_RESULTS = frozenset(
    """
    moe_aux_loss_coeff moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy moe_router_dtype
    mixed_precision optimizer megatron_pretrained_checkpoint additional_configs extra_config sequence_packing
    use_packed_sequences
    """.split()
)
LAYOUT_KEYS = MEGATRON_KEYS - AFFECTS_RESULTS


def identity(
    config: RunConfig, global_batch_size: int, data: Mapping[str, str], roles: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain values by name. `roles` are the resolved specifications, however they were written in the YAML."""
    decisive = {key: value for key, value in config.all_keys.items() if key not in FREE_KEYS and key not in LAYOUT_KEYS}
    return {
        **decisive,
        **({"engine": "megatron"} if config.engine == "megatron" else {}),  # whose files an FSDP run cannot read
        "global_batch_size": global_batch_size,
        **{f"data of {name}": value for name, value in data.items()},
        **{role: roles.get(role) for role in ("selector", "mixer", "reorder", "pipeline", "weighter")},
    }
