"""What the Megatron engine cannot do, checked from the configuration alone."""

from __future__ import annotations

from dataflex_mega.config.fates import check_fates
from dataflex_mega.config.fates_megatron import FSDP_DOES, MEGATRON_FATES
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import ConfigError

# How attention is computed: torch's own, which is flash attention on a GPU, or Transformer Engine's.
ATTENTION = ("auto", "sdpa", "fa2")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def check_megatron(config: RunConfig) -> list[str]:
    """Notes on keys that have no effect on this engine. Raises ConfigError naming the key, its value and what is allowed."""
    tuning = config.llamafactory.get("finetuning_type", "lora")
    if tuning != "full":
        raise ConfigError(
            f"finetuning_type: engine: megatron trains all parameters (full), found {tuning!r}; {FSDP_DOES} LoRA"
        )
    notes = check_fates(config.llamafactory, MEGATRON_FATES, "engine: megatron")
    attention = str(config.llamafactory.get("flash_attn", "auto"))
    if attention not in ATTENTION:
        raise ConfigError(f"flash_attn: engine: megatron takes {', '.join(ATTENTION)}, found {attention!r}")
    optim = str(config.llamafactory.get("optim", "adamw_torch"))
    if optim not in OPTIMIZERS:
        raise ConfigError(f"optim: engine: megatron takes {', '.join(OPTIMIZERS)}, found {optim!r}")
    if config.dataflex.freeze_gate:
        raise ConfigError(f"freeze_gate: engine: megatron trains all parameters; {FSDP_DOES}")
    return notes
