"""What a checkpoint must agree with before it is resumed: the keys that decide what is computed, and the data.

Every key is in one list: DECIDES, FREE_KEYS, SECRET_KEYS or, of Megatron's, AFFECTS_RESULTS or LAYOUT_KEYS. Only those of
DECIDES and AFFECTS_RESULTS are compared and stored, so a key that nobody has thought about is neither. A test finds a key
of the installed LLaMA-Factory or transformers that is in no list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.config.parse import MEGATRON_KEYS, RunConfig
from dataflex_mega.redaction import without_secrets

ROLES = ("selector", "mixer", "reorder", "pipeline", "weighter")
# Keys that decide what is computed: another value gives another model.
DECIDES = frozenset(
    """
    model_name_or_path model_revision adapter_name_or_path adapter_folder trust_remote_code use_fast_tokenizer
    resize_vocab split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens
    train_from_scratch rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth use_unsloth_gc
    enable_liger_kernel use_liger_kernel liger_kernel_config use_v1_kernels moe_aux_loss_coef upcast_layernorm
    upcast_lmhead_output use_cache use_kv_cache quantization_bit quantization_method quantization_type
    quantization_device_map double_quantization use_kt kt_weight_path kt_expert_checkpoint_path
    kt_lora_expert_intermediate_size kt_lora_expert_num kt_use_lora_experts
    image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_fps video_max_pixels video_min_pixels
    video_maxlen audio_sampling_rate use_audio_in_video

    dataset eval_dataset template cutoff_len train_on_prompt mask_history streaming buffer_size mix_strategy
    interleave_probs max_samples val_size packing neat_packing tool_format default_system enable_thinking
    preserve_thinking ignore_pad_token_for_loss eval_num_beams eval_on_each_dataset

    stage finetuning_type pure_bf16 additional_target create_new_adapter module_dropout lora_alpha lora_dropout lora_rank
    lora_target loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert oft_rank
    oft_block_size oft_target freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
    freeze_vision_tower freeze_multi_modal_projector freeze_language_model use_llama_pro use_galore galore_target
    galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo apollo_target
    apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise
    apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
    badam_mask_mode use_adam_mini use_muon use_hyper_parallel hyper_parallel_args use_dft_loss use_asft_loss asft_alpha
    use_eaft_loss eaft_alpha disable_shuffling compute_accuracy pref_beta pref_ftx pref_bco_weight pref_loss
    dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ld_alpha ppo_buffer_size ppo_epochs
    ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model
    reward_model_adapters reward_model_quantization_bit reward_model_type

    seed data_seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_type
    lr_scheduler_kwargs warmup_ratio warmup_steps optim optim_args optim_target_modules bf16 fp16 fp8 fp8_backend
    fp8_enable_fsdp_float8_all_gather bf16_full_eval fp16_full_eval tf32 full_determinism torch_compile
    torch_compile_backend torch_compile_mode label_smoothing_factor neftune_noise_alpha label_names length_column_name
    remove_unused_columns dataloader_drop_last train_sampling_strategy average_tokens_across_devices
    auto_find_batch_size accelerator_config parallelism_config deepspeed ignore_data_skip
    restore_callback_states_from_checkpoint include_for_metrics batch_eval_metrics prediction_loss_only
    metric_for_best_model greater_is_better

    plugins candidate_fraction freeze_gate init_mixture_proportions loss_normalization max_epochs max_proportion
    min_proportion mixer_eval_dataset mixture_sample_rule reference_dtype reference_model score_reuse static_mix
    update_step update_times warmup_step weight_scope
    """.split()
)
# Keys that may change between the runs of one training: where things go, how often, how the global batch is cut, and
# how long to train, what is predicted or exported afterwards.
FREE_KEYS = frozenset(
    """
    output_dir overwrite_output_dir logging_dir logging_steps logging_strategy logging_first_step logging_nan_inf_filter
    log_level log_level_replica log_on_each_node disable_tqdm report_to run_name plot_loss project trackio_space_id
    trackio_bucket_id trackio_static_space_id save_steps save_strategy save_total_limit save_on_each_node eval_steps
    eval_strategy eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object do_eval early_stopping_steps early_stopping_min_delta per_device_train_batch_size
    load_best_model_at_end gradient_accumulation_steps dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor dataloader_persistent_workers preprocessing_num_workers overwrite_cache cache_dir
    preprocessing_batch_size fsdp fsdp_config ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_broadcast_buffers ddp_static_graph use_cpu local_rank master_addr master_port ray_num_workers ray_init_kwargs
    enable_jit_checkpoint resume_from_checkpoint push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push
    hub_revision disable_gradient_checkpointing gradient_checkpointing gradient_checkpointing_kwargs use_reentrant_gc
    max_steps num_train_epochs train_step save_only_model dataset_dir corpus_dir eval_corpus_dir media_dir tokenized_path
    data_shared_file_system callbacks resume_ignore score_batch_size prefetch tensorboard on_non_finite engine use_mca
    components_cfg_file component_name save_on_signal train_type selector mixer reorder pipeline weighter verify
    reference_cache init_mixture_proportions_file do_train skip_memory_metrics debug torch_empty_cache_steps
    include_num_input_tokens_seen include_effective_tokens_per_second low_cpu_mem_usage offload_folder
    print_param_status badam_verbose enable_torch_profiler profile_modules profiler_active_steps profiler_output_dir
    profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps
    profiler_with_stack use_swanlab swanlab_logdir swanlab_mode swanlab_project swanlab_run_name swanlab_workspace
    save_hf_checkpoints

    do_predict predict_with_generate sortish_sampler generation_config generation_max_length generation_num_beams
    do_sample length_penalty max_length max_new_tokens num_beams repetition_penalty skip_special_tokens temperature
    top_k top_p infer_backend infer_dtype vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank vllm_maxlen
    sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size export_device export_dir
    export_hub_model_id export_legacy_format export_quantization_bit export_quantization_dataset
    export_quantization_maxlen export_quantization_nsamples export_size
    """.split()
)
# Neither stored nor printed, so they are not compared either: a token is renewed without a new training.
SECRET_KEYS = frozenset(
    """
    hub_token hf_hub_token ms_hub_token om_hub_token swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url
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
# Names that an older checkpoint may have stored and that are not compared any more.
UNCOMPARED = (FREE_KEYS | SECRET_KEYS | LAYOUT_KEYS) - {*ROLES, "engine"}


def identity(
    config: RunConfig, global_batch_size: int, data: Mapping[str, str], roles: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain values by name, without secrets. `roles`: the resolved specifications, however they were written in the YAML."""
    decisive = {key: value for key, value in config.all_keys.items() if key in DECIDES or key in AFFECTS_RESULTS}
    return without_secrets(
        {
            **decisive,
            **({"engine": "megatron"} if config.engine == "megatron" else {}),  # whose files an FSDP run cannot read
            "global_batch_size": global_batch_size,
            **{f"data of {name}": value for name, value in data.items()},
            **{role: roles.get(role) for role in ROLES},
        }
    )
