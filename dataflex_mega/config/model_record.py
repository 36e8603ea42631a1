"""The keys that say how the model of a run is built, as a checkpoint stores them for `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.redaction import without_secrets

# What a model is built from and what its training parts are. Not among them: keys by which code is executed
# (trust_remote_code, plugins, callbacks), since a checkpoint may come from somebody else.
MODEL_KEYS = frozenset(
    """
    model_name_or_path model_revision adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
    split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens train_from_scratch
    rope_scaling flash_attn shift_attn enable_liger_kernel moe_aux_loss_coef upcast_layernorm upcast_lmhead_output
    quantization_bit quantization_method quantization_type double_quantization

    stage template cutoff_len tool_format default_system enable_thinking seed bf16 fp16 pure_bf16 fsdp fsdp_config

    finetuning_type additional_target create_new_adapter module_dropout lora_alpha lora_dropout lora_rank lora_target
    use_rslora use_dora pissa_init pissa_iter oft_rank oft_block_size oft_target freeze_trainable_layers
    freeze_trainable_modules freeze_extra_modules freeze_vision_tower freeze_multi_modal_projector freeze_language_model
    use_llama_pro freeze_gate
    """.split()
)
PATHS = ("model_name_or_path", "adapter_name_or_path", "cache_dir")


def model_record(config: RunConfig) -> dict[str, Any]:
    """Plain values by name, without secrets. Folders that are there are named in full, for a command that runs elsewhere."""
    keys = {key: value for key, value in config.all_keys.items() if key in MODEL_KEYS and value is not None}
    for key in PATHS:
        if key in keys:
            keys[key] = _in_full(keys[key])
    return without_secrets({**keys, "engine": config.engine})


def _in_full(value: Any) -> Any:
    names = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
    found = [Path(str(name).strip()).expanduser() for name in names]
    whole = [
        str(path.resolve()) if path.is_dir() else str(name).strip() for path, name in zip(found, names, strict=True)
    ]
    return ",".join(whole)
