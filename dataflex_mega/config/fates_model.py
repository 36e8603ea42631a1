"""The fates of ModelArguments' keys: model, quantization, media, kernels, export and serving."""

from __future__ import annotations

from dataflex_mega.config.fate import STATIC_DOES, Fate, Switch, acts, acts_with, noted, refused

QUANTIZATION = Switch(("quantization_bit",))
KTRANSFORMERS = Switch(("use_kt",))
NEW_TOKENS = Switch(("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"))
GENERATION = Switch(("do_predict", "predict_with_generate"))
_SERVING = "llamafactory-cli export, chat and api read it"

MODEL_FATES: dict[str, Fate] = {
    # which model, and how it is read
    **acts(
        "model_name_or_path", "adapter_name_or_path", "adapter_folder", "cache_dir", "use_fast_tokenizer",
        "resize_vocab", "split_special_tokens", "add_tokens", "add_special_tokens", "new_special_tokens_config",
        "model_revision", "low_cpu_mem_usage", "train_from_scratch", "trust_remote_code",
        "hf_hub_token", "ms_hub_token", "om_hub_token", "print_param_status",
    ),
    **acts_with(NEW_TOKENS, {"init_special_tokens": "noise_init"}),
    # how it computes
    **acts(
        "rope_scaling", "flash_attn", "shift_attn", "enable_liger_kernel", "disable_gradient_checkpointing",
        "use_reentrant_gc", "upcast_layernorm", "upcast_lmhead_output", "use_v1_kernels",
    ),
    "mixture_of_depths": refused(STATIC_DOES),
    "use_unsloth": refused(STATIC_DOES),
    "use_unsloth_gc": refused("other gradient checkpointing is on unless disable_gradient_checkpointing is set"),
    **acts("moe_aux_loss_coef"),
    # quantization
    **acts("quantization_bit"),
    **acts_with(
        QUANTIZATION,
        {
            "quantization_method": "bnb", "quantization_type": "nf4", "double_quantization": True,
            "quantization_device_map": None,
        },
    ),
    # media
    **acts(
        "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
        "video_min_pixels", "video_fps", "video_maxlen", "audio_sampling_rate",
    ),
    "use_audio_in_video": noted("Qwen-Omni models alone have it, and roles do not train them"),
    # the model after training
    "infer_backend": noted(_SERVING, "huggingface"),
    "offload_folder": noted(_SERVING, "offload"),
    **acts_with(GENERATION, {"use_kv_cache": True, "infer_dtype": "auto"}),
    "export_dir": noted(_SERVING),
    "export_size": noted(_SERVING, 5),
    "export_device": noted(_SERVING, "cpu"),
    "export_quantization_bit": noted(_SERVING),
    "export_quantization_dataset": noted(_SERVING),
    "export_quantization_nsamples": noted(_SERVING, 128),
    "export_quantization_maxlen": noted(_SERVING, 1024),
    "export_legacy_format": noted(_SERVING),
    "export_hub_model_id": noted(_SERVING),
    "vllm_maxlen": noted(_SERVING, 4096),
    "vllm_gpu_util": noted(_SERVING, 0.7),
    "vllm_enforce_eager": noted(_SERVING),
    "vllm_max_lora_rank": noted(_SERVING, 32),
    "vllm_config": noted(_SERVING),
    "sglang_maxlen": noted(_SERVING, 4096),
    "sglang_mem_fraction": noted(_SERVING, 0.7),
    "sglang_tp_size": noted(_SERVING, -1),
    "sglang_config": noted(_SERVING),
    "sglang_lora_backend": noted(_SERVING, "triton"),
    # KTransformers
    "use_kt": refused(STATIC_DOES),
    **acts_with(
        KTRANSFORMERS,
        dict.fromkeys(
            (
                "kt_weight_path", "kt_expert_checkpoint_path", "kt_use_lora_experts", "kt_lora_expert_num",
                "kt_lora_expert_intermediate_size",
            )
        ),
    ),
}  # fmt: skip
