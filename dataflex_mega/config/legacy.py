"""Keys that older LLaMA-Factory YAMLs use and the installed transformers has dropped: renamed, or left out with a note."""

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
    "use_mps_device": ((True, False, None), "the device is found by itself"),
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


def modernise(config: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The same configuration in today's keys, and a note for every change. Keys in `known` are left alone.

    Raises ConfigError when an old key and its successor disagree, or an old key asks for what is gone.
    """
    found = dict(config)
    notes: list[str] = []
    for key in [k for k in config if isinstance(k, str) and k not in known]:
        if key in RENAMED:
            _move(found, key, RENAMED[key], config[key], notes)
        elif key == "group_by_length":
            value = "group_by_length" if config[key] else "random"
            _move(found, key, "train_sampling_strategy", value, notes)
        elif key in INTO_FSDP_CONFIG:
            _move_inside(found, key, notes)
        elif key in DROPPED:
            allowed, why = DROPPED[key]
            if config[key] not in allowed:
                raise ConfigError(f"{key}: {config[key]!r} cannot be had any more: {why}")
            del found[key]
            notes.append(f"{key} is not used any more: {why}")
    return found, notes


def _move(found: dict[str, Any], old: str, new: str, value: Any, notes: list[str]) -> None:
    given = found.get(new, value)
    given = "no" if given is False and new.endswith("_strategy") else given
    if given != value:
        raise ConfigError(f"{old}: {found[old]!r} contradicts {new}: {given!r}; {old} is the old name, drop it")
    del found[old]
    found[new] = value
    notes.append(f"{old} is now {new}: {value}")


def _move_inside(found: dict[str, Any], old: str, notes: list[str]) -> None:
    inner = found.get("fsdp_config") or {}
    new = INTO_FSDP_CONFIG[old]
    if not isinstance(inner, Mapping) or inner.get(new, found[old]) != found[old]:
        raise ConfigError(f"{old}: {found[old]!r} contradicts fsdp_config: {found.get('fsdp_config')!r}; drop {old}")
    found["fsdp_config"] = {**inner, new: found.pop(old)}
    notes.append(f"{old} is now fsdp_config.{new}")
