"""The fates of TrainingArguments' keys: those of transformers' Seq2SeqTrainingArguments and what LLaMA-Factory adds."""

from __future__ import annotations

from dataflex_mega.config.fate import OFF, STATIC_DOES, Fate, Switch, acts, acts_with, noted, refused, takes
from dataflex_mega.config.fates_model import GENERATION

_ORDER = "the order follows from seed and step"
_EVALUATION = "evaluation gives the loss only"
_NO_OUTPUTS = "evaluation adds sums up and keeps no outputs"
_PREFETCH = "prefetch says how many steps of data are prepared ahead"
_HUB = "nothing is uploaded during a run"
_RAY = "Ray starts processes itself; torchrun --nproc_per_node N does it here"
_LAUNCHER = "the launcher says it"
# What accelerate's own classes have where nothing is said.
ACCELERATOR_DEFAULTS = {
    "split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True,
    "non_blocking": False, "gradient_accumulation_kwargs": None, "use_configured_state": False,
}  # fmt: skip
PARALLELISM_DEFAULTS = dict.fromkeys(("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"), 1)

TRAINING_FATES: dict[str, Fate] = {
    # what a run does, and where
    "do_train": takes((True,), "a dynamic run trains"),
    **acts(
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "data_seed", "full_determinism",
        "do_eval", "do_predict",
        "predict_with_generate",
    ),
    **acts_with(
        GENERATION, {"generation_max_length": None, "generation_num_beams": None, "generation_config": None}
    ),
    "ignore_data_skip": noted("where the data goes on is arithmetic, nothing is skipped"),
    "restore_callback_states_from_checkpoint": noted("callbacks are restored from every checkpoint"),
    # the batch and the length of the run
    **acts("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    "auto_find_batch_size": refused("the batch size decides which samples a step has"),
    "train_sampling_strategy": takes(("random", "sequential"), _ORDER),
    **acts_with(
        Switch(("train_sampling_strategy",), ("group_by_length",), default="random"), {"length_column_name": "length"}
    ),
    "sortish_sampler": refused(_ORDER),
    # the optimizer, its schedule, the loss
    **acts(
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim_args",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    ),
    **acts("optim", "optim_target_modules"),  # optimizers.py says which go with what
    "average_tokens_across_devices": refused("a token counts the same on every rank", None, True),
    **acts("label_smoothing_factor", "neftune_noise_alpha"),
    "logging_nan_inf_filter": noted("on_non_finite says what becomes of a step without a finite loss", None, True),
    # precision, memory and speed
    **acts("bf16", "fp16", "tf32", "use_cpu", "gradient_checkpointing"),
    **acts_with(GENERATION, {"bf16_full_eval": False, "fp16_full_eval": False}),
    "fp8": refused("use bf16"),
    **acts_with(Switch(("fp8",)), {"fp8_backend": "auto"}),
    "fp8_enable_fsdp_float8_all_gather": refused("use bf16"),
    "gradient_checkpointing_kwargs": noted("use_reentrant_gc and disable_gradient_checkpointing say how"),
    "torch_compile": refused(STATIC_DOES),
    "torch_compile_backend": refused(STATIC_DOES, *OFF),
    "torch_compile_mode": refused(STATIC_DOES, *OFF),
    "use_liger_kernel": refused("use enable_liger_kernel"),
    **acts_with(Switch(("use_liger_kernel",)), {"liger_kernel_config": None}),
    "use_cache": noted("training keeps no cache of keys and values"),
    "torch_empty_cache_steps": noted("the cache is left to torch"),
    "debug": takes(("underflow_overflow", ["underflow_overflow"], *OFF), "there is no TPU here"),
    "skip_memory_metrics": refused(STATIC_DOES, None, True),
    # the data
    **acts("dataloader_num_workers"),
    "dataloader_pin_memory": noted(_PREFETCH, None, True, False),
    "dataloader_persistent_workers": noted(_PREFETCH),
    "dataloader_prefetch_factor": noted(_PREFETCH, None),
    "dataloader_drop_last": noted("every step has a full batch"),
    "remove_unused_columns": noted("a sample is its tokens and targets; other columns are not read", True),
    "label_names": noted("the targets are the column labels"),
    # logging
    **acts(
        "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
        "log_level_replica", "disable_tqdm", "report_to", "logging_dir",
    ),
    **acts("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    "include_num_input_tokens_seen": noted("metrics.jsonl counts the tokens", None, False, "no"),
    # evaluation
    **acts(
        "eval_strategy", "per_device_eval_batch_size", "metric_for_best_model",
        "greater_is_better",
    ),
    **acts_with(Switch(("eval_strategy",), ("steps",), default="no"), {"eval_steps": None}),
    **acts_with(Switch(("eval_strategy",), ("steps", "epoch"), default="no"), {"eval_delay": 0}),
    **acts("eval_on_start", "load_best_model_at_end"),
    "prediction_loss_only": noted(_EVALUATION),
    "include_for_metrics": noted(_EVALUATION),
    "batch_eval_metrics": noted(_EVALUATION),
    "eval_do_concat_batches": noted(_NO_OUTPUTS, True),
    "eval_use_gather_object": noted(_NO_OUTPUTS),
    "eval_accumulation_steps": noted(_NO_OUTPUTS),
    # checkpoints and what is uploaded
    **acts("save_steps", "save_total_limit", "save_only_model"),
    **acts("save_strategy"),
    "save_on_each_node": noted("one process writes what all need; the nodes share output_dir"),
    "enable_jit_checkpoint": refused("use save_steps"),
    "push_to_hub": refused("upload output_dir afterwards"),
    "hub_token": noted(_HUB),
    "hub_private_repo": noted(_HUB),
    "hub_model_id": noted(_HUB),
    "hub_strategy": noted(_HUB, "every_save"),
    "hub_always_push": noted(_HUB),
    "hub_revision": noted(_HUB),
    # processes
    **acts(
        "fsdp", "fsdp_config", "deepspeed", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
    ),
    "accelerator_config": refused(STATIC_DOES, ACCELERATOR_DEFAULTS),
    "parallelism_config": refused("use fsdp: full_shard, or engine: megatron", PARALLELISM_DEFAULTS),
    "local_rank": noted(_LAUNCHER, -1),
    "master_addr": noted(_LAUNCHER),
    "master_port": noted(_LAUNCHER),
    "ray_num_workers": refused(_RAY, None, 1),
    "ray_init_kwargs": refused(_RAY),
    # profilers
    **acts("enable_torch_profiler"),
    **acts_with(
        Switch(("enable_torch_profiler",)),
        {
            "profiler_output_dir": None, "profiler_wait_steps": 1, "profiler_warmup_steps": 1,
            "profiler_active_steps": 1, "profiler_repeat": 1, "profiler_record_shapes": True,
            "profiler_profile_memory": True, "profiler_with_stack": True,
        },
    ),
    **acts("profile_modules"),
}  # fmt: skip
