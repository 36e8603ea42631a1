"""The fates of LLaMA-Factory's keys that `engine: megatron` treats otherwise than `engine: fsdp` does."""

from __future__ import annotations

from dataflex_mega.config.fate import Fate, noted, refused

FSDP_DOES = "engine: fsdp does"
_SHARDED = "use_distributed_optimizer: true shards optimizer state, tensor and pipeline sizes the model"
_RECOMPUTED = "recompute_granularity says what is computed again in the backward pass"
_BUCKETS = "ddp_bucket_size and overlap_grad_reduce say how gradients are reduced"
_WHOLE = "all parameters are trained"
_NO_TOKENS = "the model does not grow, so no token is new"

MEGATRON_FATES: dict[str, Fate] = {
    "fsdp": refused(_SHARDED),
    "fsdp_config": refused(_SHARDED),
    **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens"), refused(FSDP_DOES)),
    "rope_scaling": refused("the model's own configuration says how positions are scaled"),
    "shift_attn": refused(FSDP_DOES),
    "use_llama_pro": refused(FSDP_DOES),
    "pure_bf16": refused("bf16: true keeps fp32 main weights"),
    "enable_liger_kernel": refused("transformer_impl: transformer_engine has fused kernels"),
    "adapter_name_or_path": refused(FSDP_DOES),
    "loraplus_lr_ratio": refused(FSDP_DOES),
    "optim_args": refused(FSDP_DOES),
    "upcast_layernorm": refused(FSDP_DOES),
    "upcast_lmhead_output": refused("token losses are float32 in any case"),
    "quantization_bit": refused(FSDP_DOES),
    **dict.fromkeys(
        ("use_muon", "use_galore", "use_apollo", "use_adam_mini", "use_badam", "optim_target_modules"),
        refused("megatron-core's optimizers are adam and sgd"),
    ),
    "use_asft_loss": refused(f"a second model is not laid out there; {FSDP_DOES}"),
    "neftune_noise_alpha": refused(FSDP_DOES),
    "debug": refused("on_non_finite says what becomes of a step whose loss is not finite"),
    "disable_gradient_checkpointing": noted(_RECOMPUTED),
    "gradient_checkpointing": noted(_RECOMPUTED),
    "use_reentrant_gc": noted(_RECOMPUTED, True, False),
    "ddp_find_unused_parameters": noted(_BUCKETS),
    "ddp_bucket_cap_mb": noted(_BUCKETS),
    "ddp_broadcast_buffers": noted(_BUCKETS),
    "ddp_static_graph": noted(_BUCKETS),
    "freeze_vision_tower": noted(_WHOLE, True),
    "freeze_multi_modal_projector": noted(_WHOLE, True),
    "freeze_language_model": noted(_WHOLE),
    "init_special_tokens": noted(_NO_TOKENS, "noise_init"),
    "new_special_tokens_config": noted(_NO_TOKENS),
    "use_v1_kernels": noted("transformer_impl says whose kernels run"),
    "low_cpu_mem_usage": noted("each process reads its own part of the weights", True),
    "print_param_status": noted("each process has a part of the parameters"),
}
