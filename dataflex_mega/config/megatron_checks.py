"""What the Megatron engine cannot do, checked from the configuration alone."""

from __future__ import annotations

from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import ConfigError

FSDP_DOES = "engine: fsdp does"
# LLaMA-Factory's key -> what to do instead. Refused when set to anything but false, 0, nothing or an empty list.
REFUSED = {
    "fsdp": "use_distributed_optimizer: true shards optimizer state, tensor and pipeline sizes the model",
    "fsdp_config": "use_distributed_optimizer: true shards optimizer state, tensor and pipeline sizes the model",
    **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens"), FSDP_DOES),
    "rope_scaling": "the model's own configuration says how positions are scaled",
    "shift_attn": FSDP_DOES,
    "use_llama_pro": FSDP_DOES,
    "pure_bf16": "bf16: true keeps fp32 main weights",
    "enable_liger_kernel": "transformer_impl: transformer_engine has fused kernels",
    "adapter_name_or_path": FSDP_DOES,
    "loraplus_lr_ratio": FSDP_DOES,
    "optim_args": FSDP_DOES,
    "upcast_layernorm": FSDP_DOES,
    "upcast_lmhead_output": "token losses are float32 in any case",
}
# How attention is computed: torch's own, which is flash attention on a GPU, or Transformer Engine's.
ATTENTION = ("auto", "sdpa", "fa2")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def check_megatron(config: RunConfig) -> None:
    """Raises ConfigError naming the key, its value and what is allowed."""
    tuning = config.llamafactory.get("finetuning_type", "lora")
    if tuning != "full":
        raise ConfigError(
            f"finetuning_type: engine: megatron trains all parameters (full), found {tuning!r}; {FSDP_DOES} LoRA"
        )
    for key, instead in REFUSED.items():
        value: Any = config.llamafactory.get(key)
        if not (value is None or value is False or value == 0 or value in ("", [], {})):
            raise ConfigError(f"{key}: engine: megatron does not do this; {instead}")
    attention = str(config.llamafactory.get("flash_attn", "auto"))
    if attention not in ATTENTION:
        raise ConfigError(f"flash_attn: engine: megatron takes {', '.join(ATTENTION)}, found {attention!r}")
    optim = str(config.llamafactory.get("optim", "adamw_torch"))
    if optim not in OPTIMIZERS:
        raise ConfigError(f"optim: engine: megatron takes {', '.join(OPTIMIZERS)}, found {optim!r}")
    if config.dataflex.freeze_gate:
        raise ConfigError(f"freeze_gate: engine: megatron trains all parameters; {FSDP_DOES}")
