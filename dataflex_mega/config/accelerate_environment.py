"""What `accelerate launch --config_file ...` tells the processes it starts, in variables -> keys of a run.

LLaMA-Factory and transformers act on these variables wherever they find them. A run that this package lays out acts on
them once, here, and then removes them (`LAYOUT_VARIABLES`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dataflex_mega.config import deepspeed
from dataflex_mega.config.deepspeed_values import Ranks
from dataflex_mega.config.launcher_keys import LauncherKeys, contradiction, show
from dataflex_mega.errors import ConfigError, did_you_mean

LABEL = "accelerate launch"
# Variables that would lay a run out, or change its arithmetic, a second time.
LAYOUT_VARIABLES = re.compile(
    r"FSDP_[A-Z0-9_]+|PARALLELISM_CONFIG_\w+|MEGATRON_LM_\w+"
    r"|ACCELERATE_(USE_\w+|MIXED_PRECISION|DYNAMO_\w+|DEEPSPEED_\w+|GRADIENT_\w+|CONFIG_DS_FIELDS|FP8_\w+)"
)
# Variable that is true -> why it is refused.
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "write tensor_model_parallel_size, pipeline_model_parallel_size and "
    "use_distributed_optimizer into the configuration, for engine: megatron",
    "ACCELERATE_USE_TP": "engine: megatron has tensor_model_parallel_size",
}
ACTED_ON = frozenset(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"))
WITHOUT_EFFECT = frozenset(
    ("ACCELERATE_USE_IPEX", "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_USE_XPU", "ACCELERATE_USE_PARALLELISM_CONFIG")
)
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # FSDP's numbers, from 1
WORDS = {"FULL_SHARD": "full_shard", "SHARD_GRAD_OP": "shard_grad_op", "NO_SHARD": ""}
FSDP_WITHOUT_EFFECT = frozenset(
    f"FSDP_{name}"
    for name in (
        "STATE_DICT_TYPE CPU_RAM_EFFICIENT_LOADING SYNC_MODULE_STATES USE_ORIG_PARAMS BACKWARD_PREFETCH "
        "FORWARD_PREFETCH IGNORED_MODULES MIN_NUM_PARAMS AUTO_WRAP_POLICY"
    ).split()
)
TRUE = ("1", "true", "yes", "y", "on", "t")
FALSE = ("0", "false", "no", "n", "off", "f", "", "none")


def translate(environment: Mapping[str, str], keys: LauncherKeys, ranks: Ranks) -> dict[str, Any]:
    """Add what the variables ask for to `keys` -> keys of Megatron, with `engine: megatron`.

    Raises ConfigError naming a variable that cannot be heeded, or both sides of a contradiction.
    """
    _refuse(environment)
    megatron: dict[str, Any] = {}
    set_keys = [*_take_precision(environment, keys), *_take_cpu(environment, keys)]
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        megatron = _take_deepspeed(environment, keys, ranks)
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        if ranks.engine == "megatron":
            raise ConfigError(contradiction("ACCELERATE_USE_FSDP=true (accelerate launch)", "engine: megatron"))
        layout, clauses = _take_fsdp(environment, keys)
        idle = len(FSDP_WITHOUT_EFFECT & set(environment))
        clauses += [f"{idle} FSDP variable{'s have' if idle > 1 else ' has'} no counterpart"] if idle else []
        keys.notes.append(f"{LABEL}: {'; '.join([', '.join([*layout, *set_keys]), *clauses])}")
    elif set_keys:
        keys.notes.append(f"{LABEL}: {', '.join(set_keys)}")
    if is_true(environment, "ACCELERATE_USE_CPU") and "WORLD_SIZE" not in environment:
        keys.notes.append(
            f"{LABEL} started one process (ACCELERATE_USE_CPU is set, WORLD_SIZE is not); "
            "torchrun --nproc_per_node N starts several"
        )
    return megatron


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes, as accelerate reads it. Raises ConfigError for another word than yes or no."""
    value = environment.get(name, "").strip().lower()
    if value in TRUE:
        return True
    if value in FALSE:
        return False
    raise ConfigError(f"{name}: expected true or false, found {environment[name]!r}")


def _refuse(environment: Mapping[str, str]) -> None:
    for name, instead in REFUSED.items():
        if is_true(environment, name):
            raise ConfigError(f"{name}=true ({LABEL}): not supported with a role; {instead}")
    for name in environment:
        known = name in REFUSED or name in ACTED_ON or name in WITHOUT_EFFECT
        if name.startswith("ACCELERATE_USE_") and not known and is_true(environment, name):
            raise ConfigError(f"{name}=true ({LABEL}): not supported with a role; train_type: static does")
    if is_true(environment, "ACCELERATE_USE_FSDP") and is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(contradiction("ACCELERATE_USE_FSDP=true", "ACCELERATE_USE_DEEPSPEED=true"))
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() not in ("NO", ""):
        raise ConfigError(
            f"ACCELERATE_DYNAMO_BACKEND={backend} ({LABEL}): a run with a role is not compiled; dynamo_backend: 'no'"
        )
    if is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        _refuse_meshes(environment)


def _refuse_meshes(environment: Mapping[str, str]) -> None:
    """Sizes above 1 of accelerate's own meshes, but for sharding over all processes."""
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE", "DP_REPLICATE_SIZE", "DP_SHARD_SIZE"):
        variable = f"PARALLELISM_CONFIG_{name}"
        value = environment.get(variable, "1")
        sharding = name == "DP_SHARD_SIZE" and is_true(environment, "ACCELERATE_USE_FSDP")
        if value not in ("1", "0", "None", "") and not sharding:
            instead = "engine: megatron has tensor_model_parallel_size and context_parallel_size"
            instead = "fsdp: full_shard shards over all processes" if name.startswith("DP") else instead
            raise ConfigError(f"{variable}={value} ({LABEL}): not supported with a role; {instead}")


def _take_precision(environment: Mapping[str, str], keys: LauncherKeys) -> list[str]:
    value = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    source = f"ACCELERATE_MIXED_PRECISION={value} ({LABEL})"
    if value == "fp8":
        raise ConfigError(f"{source}: not supported with a role; use bf16")
    if value not in ("no", "bf16", "fp16"):
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION: expected no, fp16 or bf16, found {value!r}")
    if value == "no" or not keys.take_precision(value, source):
        return []
    return [f"{value}: true"]


def _take_cpu(environment: Mapping[str, str], keys: LauncherKeys) -> list[str]:
    if not is_true(environment, "ACCELERATE_USE_CPU"):
        return []
    return ["use_cpu: true"] if keys.take("use_cpu", True, f"ACCELERATE_USE_CPU=true ({LABEL})") else []


# -- FSDP --------------------------------------------------------------------------------------------------------------


def _take_fsdp(environment: Mapping[str, str], keys: LauncherKeys) -> tuple[list[str], list[str]]:
    """(the layout, remarks) for the note."""
    words, source = _words(environment)
    offload = bool(words) and is_true(environment, "FSDP_OFFLOAD_PARAMS")
    classes = [name.strip() for name in environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip()]
    checkpointing = is_true(environment, "FSDP_ACTIVATION_CHECKPOINTING")
    if checkpointing and keys.given.get("disable_gradient_checkpointing"):
        said = "FSDP_ACTIVATION_CHECKPOINTING=true (accelerate launch)"
        raise ConfigError(contradiction(said, "disable_gradient_checkpointing: true"))
    layout = f"{words}{' offload' * offload}"
    if keys.given.get("fsdp"):
        _check_agreement(keys.given, words, offload, source)
    else:
        _check_config(keys.given, words, offload, source)
        keys.take("fsdp", layout, source)
    if classes and words:
        _take_classes(keys, classes)
    clauses = []
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if words and policy in ("SIZE_BASED_WRAP", "NO_WRAP"):
        clauses.append(f"each layer is a unit of its own in spite of {policy}")
    return [f"fsdp: {layout}" if layout else "DistributedDataParallel"], clauses


def _words(environment: Mapping[str, str]) -> tuple[str, str]:
    """(full_shard, shard_grad_op or nothing, the variable that says so)."""
    version = environment.get("FSDP_VERSION", "1")
    if version == "2":
        reshards = is_true({"FSDP_RESHARD_AFTER_FORWARD": "true", **environment}, "FSDP_RESHARD_AFTER_FORWARD")
        source = f"FSDP_RESHARD_AFTER_FORWARD={str(reshards).lower()} ({LABEL})"
        return ("full_shard" if reshards else "shard_grad_op"), source
    if version != "1":
        raise ConfigError(f"FSDP_VERSION: expected 1 or 2, found {version!r}")
    value = environment.get("FSDP_SHARDING_STRATEGY", STRATEGIES[0]).upper()
    if value.isdecimal() and 1 <= int(value) <= len(STRATEGIES):
        value = STRATEGIES[int(value) - 1]
    if value not in STRATEGIES:
        near = did_you_mean(value, STRATEGIES)
        raise ConfigError(f"FSDP_SHARDING_STRATEGY: expected one of {', '.join(STRATEGIES)}, found {value!r}{near}")
    source = f"FSDP_SHARDING_STRATEGY={value} ({LABEL})"
    if value not in WORDS:
        raise ConfigError(f"{source}: not supported; FULL_SHARD shards over all processes")
    return WORDS[value], source


def _check_agreement(given: Mapping[str, Any], words: str, offload: bool, source: str) -> None:
    """Raises ConfigError when the configuration's own `fsdp` is another layout."""
    value = given["fsdp"]
    text = "full_shard" if value is True else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    own = text.split()
    config = _fsdp_config(given)
    reshards = config.get("reshard_after_forward", "shard_grad_op" not in own)
    sharded = any(word in own for word in ("full_shard", "shard_grad_op", "auto_wrap", "offload"))
    strategy = "" if not sharded else "full_shard" if reshards else "shard_grad_op"
    if strategy != words:
        raise ConfigError(contradiction(source, f"fsdp: {text}"))
    offloads = "offload" in own or bool(config.get("cpu_offload") or config.get("offload_params"))
    if sharded and offloads != offload:
        said = f"FSDP_OFFLOAD_PARAMS={str(offload).lower()} ({LABEL})"
        within = "" if "offload" in own or not offloads else " with its fsdp_config"
        raise ConfigError(contradiction(said, f"fsdp: {text}{within}"))


def _check_config(given: Mapping[str, Any], words: str, offload: bool, source: str) -> None:
    """Raises ConfigError when a `fsdp_config` without `fsdp` says otherwise."""
    config = _fsdp_config(given)
    wanted = {"reshard_after_forward": words == "full_shard", "offload_params": offload, "cpu_offload": offload}
    for key, value in wanted.items():
        if config.get(key) is not None and bool(config[key]) != value:
            said = source if key == "reshard_after_forward" else f"FSDP_OFFLOAD_PARAMS={str(offload).lower()} ({LABEL})"
            raise ConfigError(contradiction(said, f"fsdp_config.{key}: {show(config[key])}"))


def _take_classes(keys: LauncherKeys, classes: list[str]) -> None:
    own = _fsdp_config(keys.given).get("transformer_layer_cls_to_wrap")
    said = f"FSDP_TRANSFORMER_CLS_TO_WRAP={','.join(classes)} ({LABEL})"
    if own:
        names = [own] if isinstance(own, str) else list(own)
        if sorted(names) != sorted(classes):
            raise ConfigError(contradiction(said, f"fsdp_config.transformer_layer_cls_to_wrap: {show(own)}"))
        return
    given = keys.given.get("fsdp_config") or {}
    keys.taken["fsdp_config"] = {**given, "transformer_layer_cls_to_wrap": classes}


def _fsdp_config(given: Mapping[str, Any]) -> dict[str, Any]:
    config = given.get("fsdp_config") or {}
    if not isinstance(config, Mapping):
        raise ConfigError(f"fsdp_config: expected a mapping, found {config!r}")
    return {str(key).removeprefix("fsdp_"): value for key, value in config.items()}


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------


def _take_deepspeed(environment: Mapping[str, str], keys: LauncherKeys, ranks: Ranks) -> dict[str, Any]:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and file.lower() != "none":
        return deepspeed.translate(file, keys, ranks, "ACCELERATE_DEEPSPEED_CONFIG_FILE")
    zero: dict[str, Any] = {"stage": _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)}
    for name in ("offload_optimizer", "offload_param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none").lower()
        if device != "none":
            zero[name] = {"device": device}
    config: dict[str, Any] = {"zero_optimization": zero}
    steps = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    if steps != 1:  # accelerate's default, which nobody need have written
        config["gradient_accumulation_steps"] = steps
    clipping = _number(environment, "ACCELERATE_GRADIENT_CLIPPING", None)
    if clipping is not None:
        config["gradient_clipping"] = clipping
    return deepspeed.translate(config, keys, ranks, "ACCELERATE_USE_DEEPSPEED")


def _number(environment: Mapping[str, str], name: str, default: int | None) -> Any:
    text = environment.get(name, "none").lower()
    if text in ("none", "auto", ""):
        return default
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a number, found {text!r}") from None
    return int(value) if value.is_integer() else value
