"""Keys of older YAMLs: those that the installed transformers has dropped, and ours under their old names. They are renamed,
or left out, with a note."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dataflex_mega.errors import ConfigError

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "new_special_tokens": "add_special_tokens",  # LLaMA-Factory's before 0.9.5
    "checkpoint_dir": "adapter_name_or_path",
    "name_module_trainable": "freeze_trainable_modules",
    "num_layer_trainable": "freeze_trainable_layers",
    "image_resolution": "image_max_pixels",
    "video_resolution": "video_max_pixels",
    "dpo_beta": "pref_beta",
    "dpo_ftx": "pref_ftx",
    "dpo_loss": "pref_loss",
}
# Ours -> the new key, and the new word for each old one.
OUR_RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "candidates": ("candidate_fraction", {}),
    "rescore": ("score_reuse", {"full": "none", "incremental": "latest"}),
    "lookahead": ("weight_scope", {"micro": "micro_batch", "exact": "step"}),
    "nan_loss": ("on_non_finite", {}),
}
INTO_FSDP_CONFIG = {
    "fsdp_min_num_params": "min_num_params",
    "fsdp_transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
}
# Key -> the values under which leaving it out changes nothing, and why.
DROPPED: dict[str, tuple[tuple[Any, ...], str]] = {
    "save_safetensors": ((True, False, None), "weights are always saved as safetensors"),
    "half_precision_backend": (("auto", "cpu_amp", "cuda_amp", None), "there is one backend left"),
    "fp16_backend": (("auto", "cpu_amp", "cuda_amp", None), "there is one backend left"),
    "fp16_opt_level": (("O0", "O1", "O2", "O3", None), "it was for Apex's amp only"),
    "use_mps_device": ((True, False, None), "the device is detected"),
    "jit_mode_eval": ((False, None), "it is gone"),
    "use_ipex": ((False, None), "it is gone"),
    "use_legacy_prediction_loop": ((False, None), "it is gone"),
    "past_index": ((-1, None), "it is gone"),
    "include_inputs_for_metrics": ((False, None), "it is gone"),
    "tpu_num_cores": ((None,), "it is gone"),
    "tpu_metrics_debug": ((False, None), "it is gone"),
    "torchdynamo": ((None,), "use torch_compile"),
    "dispatch_batches": ((None,), "it is gone"),
    "split_batches": ((False, None), "it is gone"),
    "ray_scope": (("last", None), "it was for hyper-parameter search only"),
}


def migrate_keys(config: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The same configuration in today's keys, and a note for every change. Keys in `known` are left alone.

    Raises ConfigError when an old key and its successor disagree, or an old key asks for what is gone.
    """
    migrated = dict(config)
    notes: list[str] = []
    for key in [k for k in config if isinstance(k, str) and k not in known]:
        if key in RENAMED:
            _move(migrated, key, RENAMED[key], config[key], notes)
        elif key in OUR_RENAMED:
            new, words = OUR_RENAMED[key]
            _move(migrated, key, new, _translated(config[key], words), notes)
        elif key == "group_by_length":
            value = "group_by_length" if config[key] else "random"
            _move(migrated, key, "train_sampling_strategy", value, notes)
        elif key in INTO_FSDP_CONFIG:
            _move_inside(migrated, key, notes)
        elif key in DROPPED:
            allowed, why = DROPPED[key]
            if config[key] not in allowed:
                raise ConfigError(f"{key}: {config[key]!r} is not available any more: {why}")
            del migrated[key]
            notes.append(f"{key} is not used any more: {why}")
    if isinstance(migrated.get("resume_ignore"), list):  # it names keys
        migrated["resume_ignore"] = [OUR_RENAMED[k][0] if k in OUR_RENAMED else k for k in migrated["resume_ignore"]]
    return migrated, notes


def _translated(value: Any, words: Mapping[str, str]) -> Any:
    return words.get(value, value) if isinstance(value, str) else value


def _move(migrated: dict[str, Any], old: str, new: str, value: Any, notes: list[str]) -> None:
    current = migrated.get(new, value)
    current = "no" if current is False and new.endswith("_strategy") else current
    if current != value:
        raise ConfigError(f"{old}: {migrated[old]!r} contradicts {new}: {current!r}; {old} is the old name, drop it")
    del migrated[old]
    migrated[new] = value
    notes.append(f"{old} is now {new}: {value}")


def _move_inside(migrated: dict[str, Any], old: str, notes: list[str]) -> None:
    inner = migrated.get("fsdp_config") or {}
    new = INTO_FSDP_CONFIG[old]
    if not isinstance(inner, Mapping) or inner.get(new, migrated[old]) != migrated[old]:
        found = f"{migrated[old]!r} contradicts fsdp_config: {migrated.get('fsdp_config')!r}"
        raise ConfigError(f"{old}: {found}; drop {old}")
    migrated["fsdp_config"] = {**inner, new: migrated.pop(old)}
    notes.append(f"{old} is now fsdp_config.{new}")
